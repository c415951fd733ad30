"""Bad input through the command line: one clear message, exit code 2, no traceback, nothing half-written."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest
import torch
from command_line import Result, Run, Small, compress_words, outcome
from safetensors.torch import load_file, save_file


@contextmanager
def _nothing_left(folder: Path) -> Iterator[None]:
    """The folder's files are the same afterward: no artifact, no draft, no work folder."""
    before = sorted(folder.rglob("*"))
    yield
    assert sorted(folder.rglob("*")) == before


def _refused(found: Result, *words: str) -> None:
    said = " ".join(found.stderr.split())
    assert found.exit_code == 2, found.output
    assert "Traceback" not in found.output
    for word in words:
        assert word in said, said


@pytest.mark.parametrize(
    ("budget", "word"),
    [
        ("half", "limits separated by commas"),
        ("macs=fifty%", "must be a number"),
        ("macs=0%", "above 0%"),
        ("macs=150%", "at most 100%"),
        ("flops=50%", "unknown field 'flops'"),
        ("latency=4parsecs", "must have the unit %, s, ms or us"),
        ("macs=50%,macs=40%", "once"),
        ("", "limits separated by commas"),
    ],
)
def test_budget_that_cannot_be_read(run: Run, digits_weights: Path, tmp_path: Path, budget: str, word: str):
    with _nothing_left(tmp_path):
        _refused(run(*compress_words(digits_weights, tmp_path / "out", budget)), "`", word)


def test_budget_out_of_reach_says_the_range(run: Run, digits_weights: Path, tmp_path: Path):
    with _nothing_left(tmp_path):
        found = run(*compress_words(digits_weights, tmp_path / "out", "macs=1%"), "--min-width", 8)
    _refused(found, "Reachable: macs", "Raise the budget or lower --min-width (now 8)")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("cifar_resnet21", ("must be a known name", "Did you mean")),
        ("timm:no_such_model", ("timm", "no_such_model")),
        ("torchvision:resnet19", ("torchvision", "Did you mean")),
        ("python:json:loads", ("--trust-source",)),
        ("no/such/folder", ("secateur.json", "no such file")),
    ],
)
def test_unknown_model(run: Run, tmp_path: Path, model: str, words: tuple[str, ...]):
    with _nothing_left(tmp_path):
        found = run(
            *("compress", "--model", model, "--data", "digits", "--budget", "macs=50%", "--out", tmp_path / "out")
        )
    _refused(found, *words)


def test_model_whose_input_has_other_channels(run: Run, tmp_path: Path):
    # torchvision's models take three channels, the digits have one.
    with _nothing_left(tmp_path):
        found = run(
            *("compress", "--model", "torchvision:resnet18", "--data", "digits"),
            *("--budget", "macs=50%", "--out", tmp_path / "out"),
        )
    _refused(found, "`in_channels` must be 3")


def test_images_too_small_for_the_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "large_only.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 11, stride=4), nn.Flatten(), nn.Linear(8, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    words = ("--model", "python:large_only:make", "--data", "digits", "--trust-source")
    with _nothing_left(tmp_path):
        _refused(
            run("compress", *words, "--budget", "macs=50%", "--out", tmp_path / "out"), "digits (1x8x8)", "--image-size"
        )
    _refused(run("evaluate", *words), "digits (1x8x8)")
    _refused(run("inspect", *words), "cannot run the example")


def test_model_with_other_classes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "seven.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 7))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    with _nothing_left(tmp_path):
        found = run(
            *("compress", "--model", "python:seven:make", "--trust-source", "--data", "digits"),
            *("--budget", "macs=50%", "--out", tmp_path / "out"),
        )
    _refused(found, "one logit for each of the 10 classes", "(2, 7)")


def test_weights_with_nan(run: Run, digits_weights: Path, tmp_path: Path):
    tensors = load_file(digits_weights)
    tensors["layer1.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    with _nothing_left(tmp_path):
        _refused(run(*compress_words(tmp_path / "nan.safetensors", tmp_path / "out")), "layer1.0.conv1.weight", "NaN")


def test_weights_of_another_model(run: Run, digits_weights: Path, tmp_path: Path):
    tensors = load_file(digits_weights)
    del tensors["linear.weight"]
    save_file(tensors, tmp_path / "part.safetensors")
    with _nothing_left(tmp_path):
        _refused(run(*compress_words(tmp_path / "part.safetensors", tmp_path / "out")), "linear.weight")
        _refused(run(*compress_words(tmp_path / "absent.safetensors", tmp_path / "out")), "absent.safetensors")


@pytest.mark.parametrize("data", ["no-such-folder", "torchvision:mnist", "torchvision:cifar10:nowhere"])
def test_unknown_data(run: Run, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with _nothing_left(tmp_path):
        found = run("compress", "--model", "digits_resnet", "--data", data, "--budget", "macs=50%", "--out", "out")
    _refused(found, "`--data`" if data == "no-such-folder" else "torchvision")


def test_empty_class_folder(run: Run, tmp_path: Path):
    from PIL import Image

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(tmp_path / "images" / split / "cat" / f"{number}.png")
    with _nothing_left(tmp_path):
        found = run(
            *("compress", "--model", "cifar_resnet20", "--data", tmp_path / "images"),
            *("--budget", "macs=50%", "--out", tmp_path / "out"),
        )
    _refused(found, "dog")


def test_parquet_without_the_columns(run: Run, tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "set").mkdir()
    for split in ("train", "test"):
        parquet.write_table(pyarrow.table({"text": ["a"], "stars": [5]}), tmp_path / "set" / f"{split}-0.parquet")
    with _nothing_left(tmp_path):
        found = run(
            *("compress", "--model", "cifar_resnet20", "--data", tmp_path / "set"),
            *("--budget", "macs=50%", "--out", tmp_path / "out"),
        )
    _refused(found, "must have a column 'img' or 'image'", "text")


@pytest.mark.parametrize("flag", [("--limit", 3), ("--validation-fraction", 0), ("--lr", -1), ("--mean", "gray")])
def test_flags_out_of_range(run: Run, digits_weights: Path, tmp_path: Path, flag: tuple[object, ...]):
    with _nothing_left(tmp_path):
        _refused(run(*compress_words(digits_weights, tmp_path / "out"), *flag), "must")


def test_unknown_names(run: Run, digits_weights: Path, tmp_path: Path):
    words = compress_words(digits_weights, tmp_path / "out")
    with _nothing_left(tmp_path):
        _refused(run(*words, "--export", "tflite"), "onnx or pt2", "'tflite'")
        _refused(run(*words, "--device", "abacus"), "abacus", "Say auto or cpu")
        _refused(run(*words, "--strategy", "magic"), "magic")
        _refused(run(*words, "--resume", "--restart"), "give one of them")
        _refused(run("compress", "--model", "digits_resnet"), "--data")


def test_out_that_is_not_ours_is_refused_before_any_work(run: Run, digits_weights: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    with _nothing_left(tmp_path):
        _refused(run(*compress_words(digits_weights, tmp_path / "mine")), "thesis.tex", "Choose another folder")
        _refused(run(*compress_words(digits_weights, tmp_path / "file")), "a file or link")
        _refused(run(*compress_words(digits_weights, tmp_path / "file" / "deep")), "file")
        _refused(run("demo", "--out", tmp_path / "mine"), "thesis.tex")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_work_folder_that_is_not_ours(run: Run, digits_weights: Path, tmp_path: Path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "notes.txt").write_text("mine")
    with _nothing_left(tmp_path):
        _refused(
            run(*compress_words(digits_weights, tmp_path / "out"), "--restart"), "must be the work of an interrupted"
        )


def test_damaged_work_folder(run: Run, digits_weights: Path, tmp_path: Path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "settings.json").write_text("{")
    with _nothing_left(tmp_path):
        _refused(run(*compress_words(digits_weights, tmp_path / "out"), "--resume"), "is damaged", "--restart")


def test_flags_that_contradict_each_other(run: Run, digits_weights: Path, tmp_path: Path):
    words = compress_words(digits_weights, tmp_path / "out")
    (tmp_path / "file").touch()
    with _nothing_left(tmp_path):
        _refused(run(*words, "--search-epochs", 3), "must go with --strategy swp or tas")
        _refused(run(*words, "--strategy", "tas", "--ray", "local"), "must go with --strategy swp")
        _refused(run(*words, "--strategy", "tas", "--remove-blocks", 0.5), "--search-over depths")
        _refused(run(*words, "--from-scratch", "--epochs", 0), "must have epochs for a student from scratch")
        _refused(run(*words, "--tensorboard", tmp_path / "file"), "must be a folder for event files")


def _tamper_weights(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def _truncate_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _truncate_manifest(folder: Path) -> None:
    text = (folder / "secateur.json").read_text()
    (folder / "secateur.json").write_text(text[: len(text) // 2])


def _edit_manifest(folder: Path) -> None:
    text = (folder / "secateur.json").read_text()
    (folder / "secateur.json").write_text(text.replace('"seed": 0', '"seed": 1', 1))


def _from_the_future(folder: Path) -> None:
    manifest = json.loads((folder / "secateur.json").read_text())
    (folder / "secateur.json").write_text(json.dumps({**manifest, "schema": 99}))


@pytest.mark.long
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_tamper_weights, "SHA-256"),
        (_truncate_weights, "SHA-256"),
        (_lose_weights, "model.safetensors"),
        (_truncate_manifest, "JSON"),
        (_edit_manifest, "SHA-256"),
        (_from_the_future, "newer Secateur"),
    ],
)
def test_damaged_artifact(run: Run, small: Small, tmp_path: Path, damage: object, word: str):
    folder = tmp_path / "artifact"
    shutil.copytree(small.folder, folder)
    damage(folder)
    with _nothing_left(tmp_path):
        _refused(run("verify", folder), word)
        _refused(run("evaluate", "--model", folder, "--data", "digits"), word)
        _refused(run("export", "--model", folder, "--out", tmp_path / "files"), word)


def test_folder_that_is_no_artifact(run: Run, tmp_path: Path):
    _refused(run("verify", tmp_path), "secateur.json")
    _refused(run("verify", tmp_path / "absent"), "secateur.json")
    _refused(run("verify"), "one artifact folder")


@pytest.mark.long
def test_full_disk_leaves_nothing(run: Run, digits_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    words = (*compress_words(digits_weights, tmp_path / "out", quick=True), "--epochs", 1, "--export", "")
    with monkeypatch.context() as patch, _nothing_left(tmp_path):
        patch.setattr(import_module("secateur._files"), "_flush", full)
        _refused(run(*words), "No space left on device", "Free some space")
    with monkeypatch.context() as patch:
        patch.setattr(import_module("secateur.pipeline.finalize"), "write_report", full)
        _refused(run(*words), "No space left on device", "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    # With room again, the work is not lost.
    assert run(*words, "--resume").exit_code == 0


def test_failed_export_keeps_the_artifact_and_says_so(
    run: Run, digits_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from secateur.errors import ExportError

    def fails(*_: object) -> None:
        raise ExportError("this operation is not in ONNX.")

    monkeypatch.setattr(import_module("secateur.pipeline.exports"), "export_file", fails)
    found = run(*compress_words(digits_weights, tmp_path / "out", quick=True), "--epochs", 1, "--quiet")
    _refused(found, "model.onnx", "this operation is not in ONNX")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "history.csv",
        "model.safetensors",
        "report.html",
        "secateur.json",
    ]


def test_debug_shows_the_traceback(digits_weights: Path, tmp_path: Path):
    from secateur.cli import main
    from secateur.errors import BudgetError

    words = [str(word) for word in (*compress_words(digits_weights, tmp_path / "out", "half"), "--debug")]
    assert isinstance(outcome(main, *words).exception, BudgetError)
