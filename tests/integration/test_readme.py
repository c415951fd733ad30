"""The README's Python blocks run, one after the other, as a reader would paste them."""

import re
import shlex
from pathlib import Path

import pytest
from command_line import Run

README = Path(__file__).resolve().parents[2] / "README.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def _commands() -> list[str]:
    """Every command, one a line."""
    return [line for block in _blocks("sh")[1:] for line in block.replace("\\\n", " ").splitlines()]


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    blocks = _blocks("python")
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    for name in ("model.safetensors", "secateur.json", "model.onnx", "report.html"):
        assert (tmp_path / "small" / name).is_file()
    import secateur

    assert secateur.load("small").manifest.recipe.cost_after["macs"] <= names["result"].report.before.macs / 2
    said = capsys.readouterr().out
    assert "Verification(" in said
    assert "kept whole: matched exclude pattern '*.conv2'" in said


def test_opens_with_the_two_commands():
    first = _blocks("sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_commands_and_flags_exist():
    from typer.testing import CliRunner

    from secateur.cli.app import app

    commands = _commands()
    assert len(commands) > 5
    for line in commands:
        words = line.split()
        assert words[0] == "secateur"
        shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        for flag in (word for word in words if word.startswith("--")):
            assert f"{flag} " in shown.output, f"{words[1]} has no {flag}"


def test_inspect_commands_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for line in [line for line in _commands() if line.startswith("secateur inspect") and "--model torch" in line]:
        found = run(*shlex.split(line)[1:])
        assert found.exit_code == 0, found.output
    assert [path.name for path in tmp_path.iterdir()] == ["resnet18.svg"]
