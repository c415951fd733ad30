"""The command line with spoiled files and absurd words: exit code 2, one clear message, nothing written."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import secateur
from guarded import LONGEST_MESSAGE, everything_in, watched
from hostile_artifacts import Good, deep, good_artifact, replaced, with_tensors

from secateur.export import MANIFEST_NAME, WEIGHTS_NAME

with contextlib.suppress(ImportError):
    import torchmetrics  # noqa: F401 -- it imports matplotlib, which makes folders in the home once


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    folder = tmp_path_factory.mktemp("good") / "small"
    found = good_artifact(folder)
    for words in (
        ("verify", folder),
        ("inspect", "--model", folder),
        ("evaluate", "--model", folder, "--data", "digits"),
    ):
        assert secateur(*words).exit_code == 0  # every module is there before any is watched
    secateur("inspect", "--model", "timm:nothing")
    secateur("inspect", "--model", "torchvision:nothing")
    secateur("nothing")
    return found


def refused(folder: Path, *words: object) -> str:
    """What is said, on one line."""
    before = everything_in(folder)
    with watched():
        found = secateur(*words)
    said = " ".join(found.stderr.split())
    assert found.exit_code == 2, found.output
    assert said
    assert len(said) < LONGEST_MESSAGE
    assert "Traceback" not in found.output
    assert all(c.isprintable() or c == "\n" for c in found.output)
    assert everything_in(folder) == before
    return said


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def edited(*path: Any, new: Any) -> Callable[[Good, Path], object]:
    return lambda good, folder: good.write(folder, manifest=replaced(good.manifest, path, new))


def widened(good: Good, folder: Path) -> None:
    """The classifier reads twice the channels that the layer before it makes: it loads only if nobody looks."""
    good.write(folder, weights=with_tensors(good.weights, lambda t: t.update(linear=torch.zeros(10, 64))))


ARTIFACTS: dict[str, Callable[[Good, Path], object]] = {
    "escape sequences": edited("source", "name", new="\x1b]0;pwned\x07\x1b[2J\u202e"),
    "escape sequences in a kind": edited("source", "kind", new="\x1b[31mpython\r"),
    "half of a character": edited("weights", "tensors", 0, "name", new="\udcff\ud800"),
    "another shape of input": edited("input", "shape", new=[3, 8, 8]),
    "no image": edited("input", "shape", new=[8]),
    "a vast image": edited("input", "shape", new=[1, 2**13, 2**14]),
    "code": edited("source", new={"kind": "python", "name": "os:system", "arguments": {}}),
    "a hub": edited("source", new={"kind": "timm", "name": "hf-hub:a/b", "arguments": {}}),
    "the future": edited("schema", new=5_000),
    "deep": edited("metrics", new=deep(60)),
    "wrong costs": edited("cost", "after", new={"macs": 1, "params": "x"}),
    "a wrong probe": edited("verification", new={"probe": {"logits": [["a"]]}}),
    "a wrong drawn probe": edited("verification", new={"probe": {"values": [["a"]], "shape": [2, 10]}}),
    "an endless probe": edited("verification", new={"probe": {"logits": [1.7e308] * 9}}),
    "a mean for three channels": edited("input", "mean", new=[0.5, 0.5, 0.5]),
    "a spread of zero": edited("input", "std", new=[0]),
    "an unknown tensor": widened,
    "no manifest": lambda good, folder: (good.write(folder) / MANIFEST_NAME).unlink(),
    "a pipe": lambda good, folder: [(good.write(folder) / WEIGHTS_NAME).unlink(), os.mkfifo(folder / WEIGHTS_NAME)],
    "a link": lambda good, folder: [
        (good.write(folder) / WEIGHTS_NAME).unlink(),
        (folder / WEIGHTS_NAME).symlink_to("/etc/passwd"),
    ],
    "another format": edited("format", new="\x1b[5m"),
}


@pytest.mark.parametrize("name", ARTIFACTS)
def test_spoiled_artifacts(good: Good, tmp_path: Path, name: str):
    folder = tmp_path / "a"
    ARTIFACTS[name](good, folder)
    only_data = name in ("a mean for three channels", "a spread of zero")
    if not only_data:
        refused(tmp_path, "verify", folder)
    if name not in ("wrong costs", "a wrong probe", "a wrong drawn probe", "an endless probe"):
        refused(tmp_path, "evaluate", "--model", folder, "--data", "digits")


EXPORTS: dict[str, Callable[[Path], object]] = {
    "no model": lambda path: write(path, b"not a model"),
    "nothing": lambda path: write(path, b""),
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_spoiled_exports_fail_the_check(good: Good, tmp_path: Path, name: str):
    EXPORTS[name](good.write(tmp_path / "a") / "model.onnx")
    found = secateur("verify", tmp_path / "a")
    assert found.exit_code == 2
    assert "FAILED" in found.output
    assert "Traceback" not in found.output


def test_a_program_of_a_stranger_is_not_opened_without_trust(
    good: Good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = good.write(tmp_path / "a")
    (folder / "model.pt2").write_bytes(b"PK\x03\x04")

    def opened(*_: object) -> None:
        raise AssertionError("was opened")

    monkeypatch.setattr(torch.export, "load", opened)
    assert secateur("verify", folder).exit_code == 0


VAST = 10**30
WORDS: list[tuple[object, ...]] = [
    ("inspect", "--model", "digits_resnet", "--seed", VAST),
    ("inspect", "--model", "digits_resnet", "--image-size", VAST),
    ("inspect", "--model", "digits_resnet", "--image-size", 10**6),
    ("inspect", "--model", "digits_resnet", "--min-width", VAST),
    ("inspect", "--model", "digits_resnet", "--divisor", VAST),
    ("inspect", "--model", "digits_resnet", "--min-kept", "nan"),
    ("inspect", "--model", "digits_resnet", "--axis-divisor", f"*={VAST}"),
    ("inspect", "--model", "digits_resnet", "--axis-min-width", f"*={VAST}"),
    ("inspect", "--model", "digits_resnet", "--axis-min-kept", "*=nan"),
    ("inspect", "--model", "digits_resnet", "--axis-min-kept", "*=1e999"),
    ("inspect", "--model", "digits_resnet", "--include", "[" * 500),
    ("inspect", "--model", "digits_resnet", "--weights", "/dev/zero"),
    ("inspect", "--model", "digits_resnet", "--weights", "/dev/null"),
    ("inspect", "--model", "digits_resnet", "--weights", "a" * 300),
    ("inspect", "--model", "\udcff"),
    ("inspect", "--model", "\x1b[31mred"),
    ("inspect", "--model", "python:os:system"),
    ("inspect", "--model", "/proc/self/mem/x"),
    ("inspect", "--model", "digits_resnet", "--draw", "a" * 300 + ".svg"),
    ("evaluate", "--model", "digits_resnet", "--data", "digits", "--mean", "nan"),
    ("evaluate", "--model", "digits_resnet", "--data", "digits", "--std", "0"),
    ("evaluate", "--model", "digits_resnet", "--data", "digits", "--std", "1e-400"),
    ("evaluate", "--model", "digits_resnet", "--data", "digits", "--batch-size", VAST),
    ("evaluate", "--model", "digits_resnet", "--data", "digits", "--image-size", VAST),
    ("evaluate", "--model", "digits_resnet", "--data", "digits", "--threads", VAST),
    ("evaluate", "--model", "digits_resnet", "--data", "digits", "--device", f"cuda:{VAST}"),
    ("evaluate", "--model", "digits_resnet", "--data", "digits", "--device", "\x1b[2J"),
    ("evaluate", "--model", "digits_resnet", "--data", "\udcff"),
    ("evaluate", "--model", "digits_resnet", "--data", "/dev/zero"),
    ("export", "--model", "digits_resnet", "--out", "/dev/null"),
    ("export", "--model", "digits_resnet", "--out", "x", "--export", "exe"),
    ("bench", "digits_resnet", "--batch", VAST),
    ("bench", "digits_resnet", "--threads", VAST),
    ("bench", "digits_resnet", "--rounds", 0),
    ("verify", "/dev/zero"),
    ("verify", "a" * 300),
    ("verify", "\udcff"),
]
SMALL = ("compress", "--model", "digits_resnet", "--data", "digits", "--out", "out", "--budget", "macs=50%")
COMPRESS: list[tuple[object, ...]] = [
    ("--limit", VAST),
    ("--seed", VAST),
    ("--seed", -1),
    ("--calibration", VAST),
    ("--validation-fraction", "nan"),
    ("--lr", "nan"),
    ("--lr", "inf"),
    ("--lr", "1e999"),
    ("--temperature", "nan"),
    ("--temperature", 0),
    ("--kd-weight", "nan"),
    ("--kd-weight", "inf"),
    ("--label-smoothing", "nan"),
    ("--ema", "nan"),
    ("--ema", 2),
    ("--warmup", "nan"),
    ("--weight-decay", "nan"),
    ("--remove-blocks", "nan"),
    ("--divisor", VAST),
    ("--min-width", VAST),
    ("--target-batch", VAST),
    ("--target-threads", VAST),
    ("--target-device", "\x1b[2J"),
    ("--batch-size", VAST),
    ("--threads", VAST),
    ("--strategy", "tas", "--search-learning-rate", "nan"),
    ("--strategy", "swp", "--search-candidates", VAST),
    ("--strategy", "swp", "--search-candidates", -1),
    ("--budget", "macs=1_"),
    ("--out", "/dev/null/out"),
    ("--out", ""),
    ("--out", "."),
    ("--out", ".."),
    ("--out", "/"),
    ("--out", "a" * 300),
]


@pytest.mark.parametrize("words", WORDS, ids=lambda words: " ".join(ascii(w)[1:30] for w in words))
def test_absurd_words(good: Good, tmp_path: Path, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, *words)


@pytest.mark.parametrize("words", COMPRESS, ids=lambda words: " ".join(ascii(w)[1:30] for w in words))
def test_absurd_settings_of_a_run(
    good: Good, tmp_path: Path, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, *SMALL, *words)
