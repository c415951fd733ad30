"""From the words of the command line to objects."""

from pathlib import Path

import pytest
import torch

from secateur.cli._words import (
    branches_of,
    choices_of,
    device_of,
    formats_of,
    heads_of,
    numbers_of,
    optimizer_of,
    precision_of,
    progress_of,
    rules_of,
    start_of,
    variation_of,
)
from secateur.cli.options import AttentionName, OptimiserName, PrecisionName
from secateur.data import Augment, load_data
from secateur.errors import ChoiceError, DataError, ExportError, TrainingError
from secateur.export import Format
from secateur.graph import HeadUnit, Selection
from secateur.pipeline import Branches, KeepWeights, Reinitialize
from secateur.search import AxisRule
from secateur.train import SGD, AdamW, Precision, Silent, TensorBoard, TerminalProgress


def test_starts_branches_and_progress(tmp_path: Path):
    assert start_of(True) == Reinitialize()
    assert start_of(False) == KeepWeights()
    assert branches_of(True) is Branches.UNTIED
    assert branches_of(False) is Branches.TIED
    assert progress_of(quiet=True, tensorboard=None) == Silent()
    assert progress_of(quiet=False, tensorboard=None) == TerminalProgress()
    assert progress_of(quiet=True, tensorboard=tmp_path) == TensorBoard(tmp_path, Silent())
    assert list(tmp_path.iterdir()) == []


def test_optimizers_and_precisions():
    assert optimizer_of(OptimiserName.SGD, None) == SGD()
    assert optimizer_of(OptimiserName.ADAMW, 0.1) == AdamW(weight_decay=0.1)
    assert precision_of(PrecisionName.AUTO) is None
    assert precision_of(PrecisionName.BF16) is Precision.BF16_MIXED


def test_variations_are_added_to_what_is_usual_for_the_images():
    usual = load_data("digits", limit=100)
    varied = variation_of("rand-m5", 0.25, 0.2, 1.0)(usual)
    assert varied.augment == Augment(1, flip=False, auto_augment="rand-m5", erase=0.25, mixup=0.2, cutmix=1.0)
    assert varied.train is usual.train
    assert variation_of(None, 0.0, 0.0, 0.0)(usual).augment == usual.augment
    with pytest.raises(DataError, match="`auto_augment` must be a policy of timm"):
        variation_of("rad-m5", 0.0, 0.0, 0.0)


def test_choices_and_rules():
    assert choices_of(None, None, None) == Selection()
    assert choices_of(["a", "b"], ["c"], ["d"]) == Selection(("a", "b"), ("c",), ("d",))
    assert rules_of(["a=b.*=8"], ["c=2"], ["d=.5"]) == (
        AxisRule("a=b.*", divisor=8), AxisRule("c", min_width=2), AxisRule("d", min_kept_fraction=0.5),
    )  # fmt: skip
    with pytest.raises(ChoiceError, match=r"`--keep-whole` must be a name pattern, such as 'layer1\.\*'; got ''"):
        choices_of(None, None, [""])
    with pytest.raises(ChoiceError, match=r"`--axis-min-kept` must be a name pattern, = and a number.*got 'd'"):
        rules_of(None, None, ["d"])


def test_heads():
    assert {heads_of(name) for name in AttentionName} == set(HeadUnit)
    assert heads_of(AttentionName.HEADS) is HeadUnit.HEAD


def test_formats():
    assert formats_of("pt2, onnx,pt2") == (Format.PT2, Format.ONNX)
    assert formats_of("") == ()
    with pytest.raises(ExportError, match=r"must name onnx or pt2.*'tflite'"):
        formats_of("onnx,tflite")


def test_numbers():
    assert numbers_of("0.5, 1", "--mean") == (0.5, 1.0)
    assert numbers_of(None, "--mean") is None
    with pytest.raises(DataError, match=r"`--std` must be numbers.*'gray'"):
        numbers_of("gray", "--std")


def test_devices():
    assert device_of("auto") is None
    assert device_of("cpu") == torch.device("cpu")
    for name in ("abacus", "cuda:99", "meta"):
        with pytest.raises(TrainingError, match=f"`--device`.*{name}"):
            device_of(name)
