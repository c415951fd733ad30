"""From the words of the command line to objects."""

import pytest
import torch

from secateur.cli._choices import (
    choices_of,
    device_of,
    formats_of,
    heads_of,
    importance_of,
    numbers_of,
    optimiser_of,
    precision_of,
    rules_of,
    strategy_of,
)
from secateur.cli._options import AttentionName, ImportanceName, OptimiserName, PrecisionName, StrategyName
from secateur.errors import ChoiceError, DataError, ExportError, TrainingError
from secateur.graph import Choices, HeadUnit
from secateur.importance import L1, Importance, Reconstruction
from secateur.pipeline import Format
from secateur.search import Activations, AxisRule, Knapsack, PCASlimming, Shallower, Strategy, Uniform
from secateur.train import SGD, AdamW, Precision


def test_every_name_is_a_method_of_its_own():
    strategies = [strategy_of(name, None) for name in StrategyName]
    assert all(isinstance(strategy, Strategy) for strategy in strategies)
    assert len(set(map(repr, strategies))) == len(StrategyName)
    importances = [importance_of(name) for name in ImportanceName]
    assert all(isinstance(importance, Importance) for importance in importances)
    assert len(set(map(repr, importances))) == len(ImportanceName)


def test_importance_replaces_the_usual_one():
    assert strategy_of(StrategyName.KNAPSACK, None) == Knapsack(Reconstruction())
    assert strategy_of(StrategyName.PCA_ACTIVATIONS, ImportanceName.L1) == PCASlimming(Activations(), L1())


def test_blocks_go_only_if_they_are_asked_for():
    assert strategy_of(StrategyName.UNIFORM, ImportanceName.L1, 0.25) == Shallower(Uniform(L1()), most=0.25)
    assert strategy_of(StrategyName.KNAPSACK, None, 0.0) == Knapsack()


def test_optimisers_and_precisions():
    assert optimiser_of(OptimiserName.SGD, None) == SGD()
    assert optimiser_of(OptimiserName.ADAMW, 0.1) == AdamW(weight_decay=0.1)
    assert precision_of(PrecisionName.AUTO) is None
    assert precision_of(PrecisionName.BF16) is Precision.BF16_MIXED


def test_choices_and_rules():
    assert choices_of(None, None, None) == Choices()
    assert choices_of(["a", "b"], ["c"], ["d"]) == Choices(("a", "b"), ("c",), ("d",))
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
    with pytest.raises(DataError, match=r"`--std` must be numbers.*'grey'"):
        numbers_of("grey", "--std")


def test_devices():
    assert device_of("auto") is None
    assert device_of("cpu") == torch.device("cpu")
    for name in ("abacus", "cuda:99", "meta"):
        with pytest.raises(TrainingError, match=f"`--device`.*{name}"):
            device_of(name)
