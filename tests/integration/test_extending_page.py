"""All code blocks of docs/extending.md run, one after the other, and each extension is shorter than 40 lines.

Blocks that begin with a file name are written to that file and imported, as a user would do.
"""

import re
import shlex
from pathlib import Path

import pytest
import torch
from command_line import Run

from secateur.search import Importance, Strategy

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
FILES = {block.split()[1]: block for _, block in BLOCKS if block.startswith("# my_")}
MODULES = [Path(name).stem for name in FILES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the user's modules and results."""
    made = tmp_path_factory.mktemp("extending")
    for name, block in FILES.items():
        (made / name).write_text(block, encoding="utf-8")
    return made


@pytest.fixture
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)


def test_there_is_an_example_of_every_kind_in_under_40_lines() -> None:
    assert MODULES == ["my_strategy", "my_importance", "my_loss", "my_rule", "my_exporter"]
    for block in FILES.values():
        assert len(block.splitlines()) < 40


@pytest.mark.long
@pytest.mark.usefixtures("_in_folder")
def test_python_blocks_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for language, block in BLOCKS:
            if language == "python" and block not in FILES.values():
                exec(compile(block, str(PAGE), "exec"), names)
    assert "WideAtTheInput(slope=0.3" in capsys.readouterr().out
    for name in ("result", "found"):
        found = getattr(names[name], "search", names[name])
        assert 0.99 <= found.notes["utilization"]["macs"] <= 1
    assert "disagreement" in names["trained"].history[-1].parts
    assert names["small"].hidden.out_features == 4
    assert names["agreed"].batch_sizes == (1, 4)
    assert (folder / "model.onnx.txt").read_text(encoding="utf-8").lstrip().startswith("ir_version")


@pytest.mark.long
@pytest.mark.usefixtures("_in_folder")
@pytest.mark.parametrize("line", [block.replace("\\\n", " ") for language, block in BLOCKS if language == "sh"])
def test_commands_run(line: str, folder: Path, run: Run) -> None:
    words = shlex.split(line)
    assert words.pop(0) == "secateur"
    refused = run(*(word for word in words if word != "--trust-source"))
    assert refused.exit_code == 2
    assert "--trust-source" in " ".join(refused.output.split())
    done = run(*words, "--threads", 1, "--quiet")
    assert done.exit_code == 0, done.output
    assert (folder / words[words.index("--out") + 1] / "secateur.json").is_file()


@pytest.mark.usefixtures("_in_folder")
def test_classes_are_what_the_command_line_asks_for() -> None:
    import my_importance
    import my_strategy

    assert issubclass(my_strategy.WideAtTheInput, Strategy)
    assert issubclass(my_importance.WeightSpread, Importance)
