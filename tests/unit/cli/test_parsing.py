"""From the words of the command line to objects."""

from pathlib import Path
from typing import get_args

import pytest
import torch

from secateur.cli.options import Attention, CutFlags, SpaceFlags, TrainFlags
from secateur.cli.parsing import axis_rules, callbacks, device, formats, numbers, optimizer, precision, selection
from secateur.data import Augment, load_data
from secateur.errors import DataError, ExportError, SelectionError, TrainingError
from secateur.export import Format
from secateur.graph import HeadUnit, Selection
from secateur.pipeline import Branches, KeepWeights, Reinitialize
from secateur.search import AxisRule
from secateur.train import SGD, AdamW, Precision, Silent, TensorBoard, TerminalProgress


def test_initial_weights_branches_and_progress(tmp_path: Path):
    assert CutFlags(from_scratch=True).to_config().init == Reinitialize()
    assert CutFlags().to_config().init == KeepWeights()
    assert SpaceFlags(untied=True).to_config().branches is Branches.UNTIED
    assert SpaceFlags().to_config().branches is Branches.TIED
    assert callbacks(quiet=True, tensorboard=None) == Silent()
    assert callbacks(quiet=False, tensorboard=None) == TerminalProgress()
    assert callbacks(quiet=True, tensorboard=tmp_path) == TensorBoard(tmp_path, Silent())
    assert list(tmp_path.iterdir()) == []


def test_optimizers_and_precisions():
    assert optimizer("sgd", None) == SGD()
    assert optimizer("adamw", 0.1) == AdamW(weight_decay=0.1)
    assert precision("auto") is None
    assert precision("32") is Precision.FLOAT32
    assert precision("bf16") is Precision.BF16_MIXED


def test_augmentations_are_added_to_the_default_of_the_images():
    usual = load_data("digits", limit=100)
    varied = TrainFlags(auto_augment="rand-m5", erase=0.25, mixup=0.2, cutmix=1.0).augment(usual)
    assert varied.augment == Augment(1, flip=False, auto_augment="rand-m5", erase=0.25, mixup=0.2, cutmix=1.0)
    assert varied.train is usual.train
    assert TrainFlags().augment(usual).augment == usual.augment
    with pytest.raises(DataError, match="`auto_augment` must be a policy of timm"):
        TrainFlags(auto_augment="rad-m5").check_augment()


def test_selections_and_rules():
    assert selection((), (), ()) == Selection()
    assert selection(["a", "b"], ["c"], ["d"]) == Selection(("a", "b"), ("c",), ("d",))
    assert axis_rules(["a=b.*=8"], ["c=2"], ["d=.5"]) == (
        AxisRule("a=b.*", divisor=8), AxisRule("c", min_width=2), AxisRule("d", min_kept_fraction=0.5),
    )  # fmt: skip
    with pytest.raises(SelectionError, match=r"`--keep-whole` must be a name pattern, such as 'layer1\.\*'; got ''"):
        selection((), (), [""])
    with pytest.raises(SelectionError, match=r"`--axis-min-kept` must be a name pattern, = and a number.*got 'd'"):
        axis_rules((), (), ["d"])


def test_heads():
    found = {name: SpaceFlags(attention=name).to_config().heads for name in get_args(Attention)}
    assert set(found.values()) == set(HeadUnit)
    assert found["heads"] is HeadUnit.HEAD


def test_formats():
    assert formats("pt2, onnx,pt2") == (Format.PT2, Format.ONNX)
    assert formats("") == ()
    with pytest.raises(ExportError, match=r"must name onnx or pt2.*'tflite'"):
        formats("onnx,tflite")


def test_numbers():
    assert numbers("0.5, 1", "--mean") == (0.5, 1.0)
    assert numbers(None, "--mean") is None
    with pytest.raises(DataError, match=r"`--std` must be numbers.*'gray'"):
        numbers("gray", "--std")


def test_devices():
    assert device("auto") is None
    assert device("cpu") == torch.device("cpu")
    for name in ("abacus", "cuda:99", "meta"):
        with pytest.raises(TrainingError, match=f"`--device`.*{name}"):
            device(name)


def test_parts_that_are_not_run_may_be_ignored():
    assert not SpaceFlags().to_config().allow_not_run
    assert SpaceFlags(allow_not_run=True).to_config().allow_not_run
