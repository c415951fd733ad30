"""Models whose code does what no model should: one clear message and exit code 2, never success or a traceback."""

import sys
from pathlib import Path

import pytest
from command_line import secateur

SOURCE = """
import sys
from torch import nn


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


class Unreadable(Exception):
    def __str__(self):
        raise ValueError("no text")


class Ends(BaseException):
    pass


class Raising(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.inner, self.error = net(), error

    def forward(self, x):
        raise self.error


class Trains(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = net()

    def train(self, mode=True):
        raise RuntimeError("never\\nsecond line")


def exits():
    sys.exit(0)


def exits_later():
    return Raising(SystemExit(0))


def ends():
    return Raising(Ends("\\x1b[2J"))


def groups():
    return Raising(BaseExceptionGroup("several", [ValueError("a"), KeyboardInterrupt()]))


def unreadable():
    return Raising(Unreadable())


def trains():
    return Trains()


def holds_itself():
    found = net()
    found._modules["again"] = found
    return found


def nests():
    found = net()
    for _ in range(3000):
        found = nn.Sequential(found)
    return found


def vast():
    found = net()
    found.register_buffer("vast", found[0].bias.detach()[:1].expand(2**42))
    return found
"""


@pytest.mark.parametrize("command", ["inspect", "evaluate"])
@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("exits", "ended the process with the exit code 0"),
        ("exits_later", "ended the process with the exit code 0"),
        ("ends", "raised Ends: \\u001b[2J"),
        ("groups", "raised BaseExceptionGroup: several"),
        ("unreadable", "no text"),
        ("trains", "raised RuntimeError: never ("),
        ("holds_itself", "Does a module hold itself?"),
        ("nests", "Does a module hold itself?"),
    ],
)
def test_code_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, factory: str, words: str
) -> None:
    (tmp_path / "odd_models.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_models", raising=False)
    found = secateur(command, "--model", f"python:odd_models:{factory}", "--trust-source", "--data", "digits")
    assert found.exit_code == 2, found.output
    assert words in found.stderr
    assert "Traceback" not in found.output
    assert all(c.isprintable() or c == "\n" for c in found.output)


def test_too_little_memory_is_no_bug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_models.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_models", raising=False)
    found = secateur("inspect", "--model", "python:odd_models:vast", "--trust-source", "--data", "digits")
    assert found.exit_code == 2, found.output
    assert "enough memory" in found.stderr


def test_with_debug_an_exit_is_still_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_models.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_models", raising=False)
    words = ("--model", "python:odd_models:exits", "--trust-source", "--data", "digits", "--debug")
    found = secateur("inspect", *words)
    assert found.exit_code == 2
    assert "in exits" in found.stderr
