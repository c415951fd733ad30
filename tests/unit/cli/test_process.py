"""Streams that are closed or full, and the last guard: whatever happens, one message and a code."""

import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import outcome, secateur

from secateur.cli import main, process
from secateur.cli.process import BUG, last_guard

pytestmark = pytest.mark.skipif(os.name == "nt", reason="streams of POSIX")

RUN = [sys.executable, "-m", "secateur"]
INSPECT = ["--model", "digits_resnet"]


def shell(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = f'SEC="{sys.executable} -m secateur"; {script}'
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_closed_stream_changes_nothing(closed: str, tmp_path: Path) -> None:
    drawn = tmp_path / "graph.dot"
    found = shell(f"$SEC inspect --model digits_resnet --draw {drawn} {closed}")
    assert (found.returncode, "Traceback" in found.stderr) == (0, False)
    assert drawn.read_text().rstrip().endswith("}")  # and not what was meant for a stream


def test_a_package_that_cannot_be_imported_is_no_bug_of_secateur() -> None:
    found = shell("$SEC inspect --model digits_resnet", TORCH_LOGS="nonsense")
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    said = (
        r"the package torch must be importable; got ValueError: Invalid log settings: nonsense.* environment variables"
    )
    assert re.search(said, found.stderr)


INTERRUPTED_IMPORT = """
import builtins, runpy, sys
genuine = builtins.__import__
def interrupted(name, *rest, **named):
    if name == sys.argv[1]:
        raise KeyboardInterrupt
    return genuine(name, *rest, **named)
builtins.__import__ = interrupted
sys.argv = ["secateur", "inspect", "--model", "digits_resnet"]
runpy.run_module("secateur", run_name="__main__")
"""


@pytest.mark.parametrize("module", ["cyclopts", "secateur.cli.options", "torch"])
def test_ctrl_c_while_modules_are_loaded_ends_with_a_line(module: str) -> None:
    script = INTERRUPTED_IMPORT.replace("sys.argv[1]", repr(module))
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (130, "Interrupted. Nothing was written.\n")


def test_a_reader_that_leaves_changes_nothing() -> None:
    found = shell("$SEC --help | head -c 1; exit ${PIPESTATUS[0]}")
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux")
def test_a_full_disk_is_said() -> None:
    found = shell("$SEC --help > /dev/full")
    assert found.returncode == 2
    assert found.stderr.startswith("Error: Standard output could not be written: No space left")
    assert shell("$SEC --help 2> /dev/full").returncode == 0


def test_a_locale_without_the_characters_shows_escapes(tmp_path: Path) -> None:
    found = shell(f"$SEC verify '{tmp_path}/Größe'", LC_ALL="C", PYTHONUTF8="0")
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert "Error" in found.stderr


class SurpriseError(Exception):
    """Nobody expects it."""


def broken(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def parse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(import_module("secateur.cli.app"), "app", SimpleNamespace(parse_args=parse))


@pytest.mark.parametrize(
    "error", [SurpriseError("first\nsecond"), RecursionError(), MemoryError(), AssertionError("x")]
)
def test_a_bug_is_one_line_a_log_and_a_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception) -> None:
    broken(monkeypatch, error)
    monkeypatch.setattr(process, "tempfile", SimpleNamespace(mkstemp=partial(tempfile.mkstemp, dir=tmp_path)))
    found = outcome(main, "inspect", *INSPECT)
    assert (found.exit_code, found.exception) == (BUG, None)
    assert len(found.stderr.splitlines()) == 1
    assert f"this is a bug in Secateur ({type(error).__name__}" in found.stderr
    assert "Please report it" in found.stderr
    (log,) = tmp_path.iterdir()
    assert str(log) in found.stderr
    assert f"{type(error).__name__}" in log.read_text()
    assert "Traceback" in log.read_text()


def test_with_debug_the_traceback_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    broken(monkeypatch, SurpriseError("x"))
    with pytest.raises(SurpriseError):
        main(["inspect", *INSPECT, "--debug"])


def test_the_log_lies_beside_the_output_and_the_work_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.work").mkdir()
    with pytest.raises(SystemExit) as ended, last_guard(debug=False, out_folder=tmp_path / "out"):
        raise SurpriseError("\x1b[31m\udcff")
    assert ended.value.code == BUG
    said = capfd.readouterr().err
    assert f"{tmp_path / 'out.error.log'}" in said
    assert f"kept in {tmp_path / 'out.work'}: --resume" in said
    assert "\x1b" not in said
    assert "SurpriseError" in (tmp_path / "out.error.log").read_text()
    assert (tmp_path / "out.work").is_dir()


def test_without_any_place_for_a_log_it_is_still_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    absent = partial(tempfile.mkstemp, dir=tmp_path / "absent")
    monkeypatch.setattr(process, "tempfile", SimpleNamespace(mkstemp=absent))
    with pytest.raises(SystemExit), last_guard(debug=False, out_folder=tmp_path / "absent" / "out"):
        raise SurpriseError
    assert "The log could not be written." in capfd.readouterr().err


def test_interrupts_and_ends_come_through() -> None:
    for error, code in ((KeyboardInterrupt(), 130), (SystemExit(3), 3)):
        with pytest.raises(SystemExit) as ended, last_guard(debug=False, out_folder=None):
            raise error
        assert ended.value.code == code


def test_every_command_of_the_tests_would_show_a_bug() -> None:
    assert secateur("--version").exit_code == 0


@pytest.mark.parametrize("place", ["", ".", "..", "/"])
def test_an_output_folder_without_a_name_breaks_no_guard(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(process, "_written", lambda _text, _folder: None)
    with pytest.raises(SystemExit) as ended, last_guard(debug=False, out_folder=Path(place)):
        raise ZeroDivisionError("a")
    assert ended.value.code == BUG
    assert "this is a bug in Secateur (ZeroDivisionError: a)" in capfd.readouterr().err
