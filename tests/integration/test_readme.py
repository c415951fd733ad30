"""The README's Python blocks run, one after the other, as a reader would paste them."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    blocks = _blocks("python")
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    for name in ("model.safetensors", "secateur.json", "model.onnx", "report.html"):
        assert (tmp_path / "small" / name).is_file()
    import secateur

    assert secateur.load("small").manifest.recipe.cost_after["macs"] <= names["result"].report.before.macs / 2
    assert "Verification(" in capsys.readouterr().out


def test_opens_with_the_two_commands():
    first = _blocks("sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_commands_and_flags_exist():
    from typer.testing import CliRunner

    from secateur.cli import app

    commands = [line.replace("\\\n", " ") for line in _blocks("sh")[1].replace("\\\n", " ").splitlines()]
    assert commands
    for line in commands:
        words = line.split()
        assert words[0] == "secateur"
        shown = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"})
        assert shown.exit_code == 0
        for flag in (word for word in words if word.startswith("--")):
            assert f"{flag} " in shown.output, f"{words[1]} has no {flag}"
