"""From the words of the command line to objects."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from secateur.cli._choices import (
    Searching,
    branches_of,
    choices_of,
    device_of,
    formats_of,
    heads_of,
    importance_of,
    numbers_of,
    optimiser_of,
    precision_of,
    progress_of,
    rules_of,
    start_of,
    strategy_of,
)
from secateur.cli._options import (
    AttentionName,
    ImportanceName,
    OptimiserName,
    PrecisionName,
    SearchedName,
    StrategyName,
)
from secateur.errors import ChoiceError, DataError, ExportError, TrainingError
from secateur.graph import Choices, HeadUnit
from secateur.importance import L1, Importance, Reconstruction
from secateur.pipeline import Branches, Format, FromScratch, Inherit
from secateur.search import (
    TAS,
    Activations,
    AxisRule,
    Depths,
    Knapsack,
    PCASlimming,
    Shallower,
    Strategy,
    Uniform,
    Widths,
    describe,
)
from secateur.train import SGD, AdamW, Precision, Silent, TensorBoard, TerminalProgress


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


def test_a_search_that_learns_has_flags_of_its_own():
    usual = TAS()
    assert describe(strategy_of(StrategyName.TAS, None)) == describe(usual)
    searching = Searching(epochs=7, over=SearchedName.BOTH, learning_rate=0.3)
    found = strategy_of(StrategyName.TAS, ImportanceName.L1, searching=searching)
    assert isinstance(found, TAS)
    assert (found.widths, found.depths, found.importance) == (Widths(), Depths(), L1())
    assert found.schedule == replace(usual.schedule, epochs=7, learning_rate=0.3)
    depths = strategy_of(StrategyName.TAS, None, searching=Searching(over=SearchedName.DEPTHS))
    assert isinstance(depths, TAS)
    assert (depths.widths, depths.depths, depths.schedule) == (None, Depths(), usual.schedule)
    widths = strategy_of(StrategyName.TAS, None, searching=Searching(over=SearchedName.WIDTHS))
    assert describe(widths) == describe(usual)


@pytest.mark.parametrize(
    "searching", [Searching(epochs=1), Searching(over=SearchedName.WIDTHS), Searching(learning_rate=0.1)]
)
def test_flags_of_a_search_that_learns_are_refused_elsewhere(searching: Searching):
    with pytest.raises(ChoiceError, match=r"must go with --strategy tas; got knapsack, which learns nothing\."):
        strategy_of(StrategyName.KNAPSACK, None, searching=searching)


def test_removed_blocks_are_refused_where_depths_are_searched():
    with pytest.raises(ChoiceError, match=r"`--remove-blocks` must be left out with --strategy tas.*got 0\.5\. Say"):
        strategy_of(StrategyName.TAS, None, 0.5)


def test_starts_branches_and_progress(tmp_path: Path):
    assert start_of(True) == FromScratch()
    assert start_of(False) == Inherit()
    assert branches_of(True) is Branches.UNTIED
    assert branches_of(False) is Branches.TIED
    assert progress_of(quiet=True, tensorboard=None) == Silent()
    assert progress_of(quiet=False, tensorboard=None) == TerminalProgress()
    assert progress_of(quiet=True, tensorboard=tmp_path) == TensorBoard(tmp_path, Silent())
    assert list(tmp_path.iterdir()) == []


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
