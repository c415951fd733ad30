"""Every recipe can be read, its commands are those of the command line, and one of each kind runs at its smoke size."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import secateur

from benchmarks.study.__main__ import parser as study_parser
from secateur.cli.app import app
from secateur.cli.options import CutFlags, SearchFlags
from secateur.cli.parsing import check_published, strategy
from secateur.cost import Budget

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
FILES = sorted(RECIPES.glob("*/*.toml"))
KINDS = ("3as", "tas", "swp", "study")

spec = importlib.util.spec_from_file_location("recipes_run", RECIPES / "run.py")
assert spec is not None
assert spec.loader is not None
recipes_run = importlib.util.module_from_spec(spec)
with pytest.MonkeyPatch.context() as patch:
    patch.setitem(sys.modules, "recipes_run", recipes_run)
    spec.loader.exec_module(recipes_run)


def all_words(path: Path, *, smoke: bool) -> list[list[str]]:
    recipe = recipes_run.Recipe.read(path)
    each = [recipe.words("digits", Path("out"), variant, smoke=smoke) for variant in (None, *recipe.variants)]
    return [words for commands in each for words, _ in commands]


def test_every_published_row_has_its_recipe() -> None:
    names = {f"{path.parent.name}/{path.stem}" for path in FILES}
    assert names >= {f"tas/resnet{depth}_cifar{c}" for depth in (20, 32, 56, 110) for c in (10, 100)}
    assert names >= {f"3as/{net}_cifar{c}" for net in ("resnet56", "resnet110", "vgg16") for c in (10, 100)}
    assert {path.parent.name for path in FILES} == set(KINDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_command_line_takes_every_command(path: Path) -> None:
    for smoke in (False, True):
        for words in all_words(path, smoke=smoke):
            if words[0] == "study":
                study_parser().parse_args(words[1:])
                continue
            _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
            if words[0] != "compress":
                bound.arguments["recipe"].to_recipe()
                continue
            assert Budget.parse(bound.arguments["budget"])
            search = bound.arguments.get("search", SearchFlags())
            cut = bound.arguments.get("cut", CutFlags())
            assert strategy(search) is not None or search.strategy is None
            check_published(search, cut.space)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_published_numbers_say_how_they_are_known(path: Path) -> None:
    recipe = recipes_run.Recipe.read(path)
    assert recipe.gpu_hours > 0
    for number in recipe.published:
        known = ("memory", "text", "notes", "recounted", "could not be read", "no number", "reruns", "without KD")
        assert any(word in number for word in known), number


def test_what_is_wrong_with_a_recipe_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('title = "x"\n')
    for words, message in (
        ([str(wrong)], "must have commands, gpu_hours, notes, paper, published; got none"),
        ([str(FILES[0]), "--variant", "nothing", "--print"], "`--variant` must be one of"),
        ([str(FILES[0])], "`--data` must name the images of the recipe"),
    ):
        with pytest.raises(SystemExit) as ended:
            recipes_run.main(words)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_the_numbers_are_printed_with_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    recipes_run.main([str(RECIPES / "tas" / "resnet56_cifar10.toml"), "--data", "cifar10", "--print"])
    said = capsys.readouterr().out
    assert "published: accuracy 93.69 %, drop 0.77 points (from memory, not verified)" in said
    assert "--tas-preset paper-cifar" in said


def smoke(kind: str, out: Path, *more: str) -> None:
    chosen = {"3as": "3as/resnet56_cifar10", "tas": "tas/ablation_resnet32_cifar100", "swp": "swp/resnet56_cifar10",
              "study": "study/cifar10"}[kind]  # fmt: skip
    recipes_run.main([str(RECIPES / f"{chosen}.toml"), "--smoke", "--out", str(out), *more])


def test_the_smoke_of_one_kind_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, and without measuring times, which take longer than all the rest."""
    ran: list[str] = []

    def here(command: list[str], **_: object) -> SimpleNamespace:
        ran.append(command[3])
        found = secateur(*command[3:])
        return SimpleNamespace(returncode=found.exit_code)

    monkeypatch.setattr(recipes_run.subprocess, "run", here)
    monkeypatch.setattr("secateur.pipeline.finalize.latency_between", lambda *_: ((), ()))
    monkeypatch.setattr("secateur.pipeline.finalize.both_files", lambda *_: ())
    smoke("3as", tmp_path, "--variant", "l1")
    assert (tmp_path / "l1" / "report.html").is_file()
    smoke("3as", tmp_path, "--variant", "l1")
    assert ran == ["train", "compress"]  # Nothing is repeated.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"), [("3as", ("--variant", "student")), ("tas", ("--variant", "tas")), ("swp", ()), ("study", ())]
)
def test_the_smoke_of_every_kind_runs(kind: str, more: tuple[str, ...], tmp_path: Path) -> None:
    smoke(kind, tmp_path, *more)
    found = {path.name for path in (tmp_path / (more[-1] if more else "result")).iterdir()}
    assert found & {"secateur.json", "study.html"}
