"""How the command line is started, and what it calls itself."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from secateur.cli.output import command_line


def test_python_m_secateur_is_the_command():
    said = subprocess.run([sys.executable, "-m", "secateur", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"secateur {version('secateur')}\n"
    wrong = subprocess.run([sys.executable, "-m", "secateur", "prune"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "Usage: secateur COMMAND [OPTIONS]" in wrong.stderr
    assert 'Unknown command "prune"' in wrong.stderr


@pytest.mark.parametrize("program", ["/opt/bin/secateur", "/opt/lib/secateur/__main__.py"])
def test_the_record_says_secateur_however_it_was_started(monkeypatch: pytest.MonkeyPatch, program: str):
    monkeypatch.setattr(sys, "argv", [program, "verify", "my folder"])
    assert command_line() == "secateur verify 'my folder'"


def test_the_record_says_which_other_program_ran_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/opt/other/__main__.py", "verify"])
    assert command_line() == "secateur (__main__.py)"
