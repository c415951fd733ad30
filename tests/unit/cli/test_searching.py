"""From flags to the strategy that finds an architecture."""

from dataclasses import replace

import pytest

from secateur.cli._words import importance_of
from secateur.cli.options import CombinationName, ImportanceName, SearchedName, StrategyName
from secateur.cli.shared import Searching, strategy_of
from secateur.errors import ChoiceError
from secateur.nas import SWP, TAS, Depths, Evolution, Widths
from secateur.search import (
    L1,
    Activations,
    Importance,
    Knapsack,
    PCASlimming,
    Reconstruction,
    RemoveBlocks,
    Strategy,
    Uniform,
    describe,
)
from secateur.workers import OnRay


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
    assert strategy_of(StrategyName.UNIFORM, ImportanceName.L1, 0.25) == RemoveBlocks(Uniform(L1()), most=0.25)
    assert strategy_of(StrategyName.KNAPSACK, None, 0.0) == Knapsack()
    assert strategy_of(StrategyName.KNAPSACK, None) == Knapsack()


def test_the_usual_part_of_the_blocks_is_for_who_says_nothing():
    assert strategy_of(StrategyName.UNIFORM, ImportanceName.L1, usual_blocks=0.5) == RemoveBlocks(
        Uniform(L1()), most=0.5
    )
    assert strategy_of(StrategyName.UNIFORM, ImportanceName.L1, 0.0, usual_blocks=0.5) == Uniform(L1())
    assert strategy_of(StrategyName.UNIFORM, ImportanceName.L1, 0.2, usual_blocks=0.5) == RemoveBlocks(
        Uniform(L1()), most=0.2
    )
    assert describe(strategy_of(StrategyName.TAS, None, usual_blocks=0.5)) == describe(TAS())


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
    with pytest.raises(ChoiceError, match=r"must go with --strategy swp or tas; got knapsack\. Leave it out"):
        strategy_of(StrategyName.KNAPSACK, None, searching=searching)


def test_removed_blocks_are_refused_where_depths_are_searched():
    with pytest.raises(ChoiceError, match=r"`--remove-blocks` must be left out with --strategy tas.*got 0\.5\. Say"):
        strategy_of(StrategyName.TAS, None, 0.5)


def test_removed_blocks_are_refused_with_swp_too():
    with pytest.raises(ChoiceError, match=r"--strategy swp.*Say --search-over depths, or both"):
        strategy_of(StrategyName.SWP, None, 0.5)


def test_stage_wise_search_has_further_flags():
    usual = SWP()
    assert describe(strategy_of(StrategyName.SWP, None)) == describe(usual)
    searching = Searching(
        epochs=3,
        over=SearchedName.BOTH,
        candidates=16,
        combination=CombinationName.EVOLUTION,
        cuts=("a", "b"),
        ray="auto",
    )
    found = strategy_of(StrategyName.SWP, ImportanceName.L1, searching=searching)
    assert isinstance(found, SWP)
    assert (found.widths, found.depths, found.importance) == (Widths(), Depths(), L1())
    assert (found.candidates, found.combination, found.cuts) == (16, Evolution(), ("a", "b"))
    assert (found.workers, found.schedule.epochs) == (OnRay("auto"), 3)


@pytest.mark.parametrize(
    ("searching", "flag"),
    [
        (Searching(candidates=8), "--search-candidates"),
        (Searching(combination=CombinationName.EXACT), "--combine"),
        (Searching(cuts=("layer1",)), "--stage-end"),
        (Searching(ray="local"), "--ray"),
    ],
)
def test_flags_of_the_stage_wise_search_are_refused_elsewhere(searching: Searching, flag: str):
    with pytest.raises(ChoiceError, match=f"`{flag}` must go with --strategy swp; got tas"):
        strategy_of(StrategyName.TAS, None, searching=searching)
