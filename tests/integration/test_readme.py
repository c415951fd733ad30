"""The code blocks of README.md and docs/guide.md run, and README's table agrees with its record."""

import pkgutil
import re
import shlex
from pathlib import Path
from statistics import mean

import pytest
from command_line import Run

ROOT = Path(__file__).resolve().parents[2]
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"


def _blocks(language: str, *pages: Path) -> list[str]:
    return [
        block
        for page in pages
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    ]


def _commands() -> list[str]:
    """Every command of both pages, one a line."""
    blocks = _blocks("sh", README, GUIDE)[1:]
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.long
def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    blocks = _blocks("python", README, GUIDE)
    assert len(blocks) == 7
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
    first = _blocks("sh", README)[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_commands_and_flags_exist(run: Run):
    commands = _commands()
    assert len(commands) > 5
    for line in commands:
        words = line.split()
        assert words[0] == "secateur"
        shown = run(words[1], "--help")
        assert shown.exit_code == 0
        for flag in (word for word in words if word.startswith("--")):
            assert f"{flag} " in shown.output, f"{words[1]} has no {flag}"


def test_inspect_commands_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    lines = [line for line in _commands() if line.startswith("secateur inspect") and "--model torch" in line]
    assert len(lines) == 4
    for line in lines:
        found = run(*shlex.split(line)[1:])
        assert found.exit_code == 0, found.output
    assert [path.name for path in tmp_path.iterdir()] == ["resnet18.svg"]


def test_accuracies_are_those_of_the_record():
    record = (ROOT / "benchmarks" / "results" / "recover.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in record.splitlines() if "cifar_" in line]
    by_key = {(row[0], row[2], row[1]): row for row in rows if row[3] == "0.02"}
    shown = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| cifar_")]
    assert len(shown) == 4
    for line in shown:
        model, method, macs, *accuracies = (cell.strip() for cell in line.split("|")[1:-1])
        one, three = (by_key[model, {"Secateur": "ours"}.get(method, "peer-kd"), epochs] for epochs in "13")
        before = mean(map(float, one[5].split(", ")))
        assert (macs, accuracies) == (one[4], [f"{before:.2f} %", f"{one[7]} %", f"{three[7]} %"])


def test_counts_are_those_of_the_coverage_record():
    page = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    (total,) = (line for line in page.splitlines() if line.startswith("| **all but tests' zoo**"))
    counts = re.findall(r"\d+(?= |$)", total.replace("(", "( "))
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"{counts[0]} models from timm" in text
    assert f"All {counts[1]} succeeded; Torch-Pruning processes {counts[-1]} of them" in text


def test_links_exist():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert len(pages) > 15
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_export_page_shows_the_example():
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    assert f"```python\n{(ROOT / 'examples' / 'consume_onnx.py').read_text(encoding='utf-8')}```" in page


def test_names_of_the_package_exist():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    # History names what there was.
    history = {"CHANGELOG.md", "log.md", "decisions.md"}
    text = "".join(page.read_text(encoding="utf-8") for page in pages if page.name not in history)
    names = set(re.findall(r"`(secateur(?:\.\w+)+)[`(]", text)) - {"secateur.json"}
    assert len(names) > 8
    for name in names:
        pkgutil.resolve_name(name)
