"""From flags to the strategy that finds an architecture."""

from dataclasses import replace
from typing import get_args

import pytest

from secateur.cli.options import AblationName, SearchFlags, SpaceFlags
from secateur.cli.parsing import check_published, importance, strategy
from secateur.errors import SelectionError
from secateur.nas import SWP, TAS, Depths, Evolution, Labels, RandomSampler, SoftLabels, Widths
from secateur.search import (
    L1,
    Activations,
    Correlation,
    Fastest,
    FilterWeights,
    GeometricMedian,
    Importance,
    Knapsack,
    PCASlimming,
    RawWeights,
    Reconstruction,
    RemoveBlocks,
    Strategy,
    Uniform,
    stable_repr,
)
from secateur.workers import OnRay

STRATEGIES = ("knapsack", "pca", "pca-activations", "global", "uniform", "tas", "swp")
IMPORTANCES = ("reconstruction", "l1", "l2", "fpgm", "bn-scale", "taylor", "lamp", "random")


def test_every_name_is_a_method_of_its_own():
    strategies = [strategy(SearchFlags(strategy=name)) for name in STRATEGIES]
    assert all(isinstance(found, Strategy) for found in strategies)
    assert len(set(map(repr, strategies))) == len(STRATEGIES)
    importances = [importance(SearchFlags(importance=name)) for name in IMPORTANCES]
    assert all(isinstance(found, Importance) for found in importances)
    assert len(set(map(repr, importances))) == len(IMPORTANCES)


def test_the_messages_and_the_help_name_every_name():
    with pytest.raises(SelectionError, match="`--strategy` must be one of") as refused:
        strategy(SearchFlags(strategy="magic"))
    assert all(f"{name}, " in str(refused.value) or f"{name} or" in str(refused.value) for name in STRATEGIES)
    with pytest.raises(SelectionError, match="`--importance` must be one of") as refused:
        importance(SearchFlags(importance="magic"))
    assert all(f"{name}, " in str(refused.value) or f"{name} or" in str(refused.value) for name in IMPORTANCES)


def test_importance_replaces_the_default_one():
    assert strategy(SearchFlags(strategy="knapsack")) == Knapsack(Reconstruction())
    found = strategy(SearchFlags(strategy="pca-activations", importance="l1"))
    assert found == PCASlimming(Activations(), L1())


def test_blocks_are_removed_only_if_they_are_asked_for():
    flags = SearchFlags(strategy="uniform", importance="l1", remove_blocks=0.25)
    assert strategy(flags) == RemoveBlocks(Uniform(L1()), 0.25)
    assert strategy(SearchFlags(strategy="knapsack", remove_blocks=0.0)) == Knapsack()
    assert strategy(SearchFlags(strategy="knapsack")) == Knapsack()


def test_without_a_strategy_several_are_compared():
    assert strategy(SearchFlags()) is None
    assert strategy(SearchFlags(), default_blocks=1.0) is None
    assert strategy(SearchFlags(importance="l1")) == Knapsack(L1())
    assert strategy(SearchFlags(remove_blocks=0.0)) == Fastest(fewer_blocks=())
    assert strategy(SearchFlags(remove_blocks=0.25)) == RemoveBlocks(Knapsack(), 0.25)
    assert strategy(SearchFlags(remove_blocks=1.0)) == RemoveBlocks(Knapsack(), 1.0)
    assert strategy(SearchFlags(remove_blocks=0.25), default_blocks=1.0) == RemoveBlocks(Knapsack(), 0.25)
    assert strategy(SearchFlags(remove_blocks=0.0), default_blocks=1.0) == Knapsack()


def test_the_default_fraction_of_blocks_holds_if_no_flag_says_it():
    flags = SearchFlags(strategy="uniform", importance="l1")
    assert strategy(flags, default_blocks=0.5) == RemoveBlocks(Uniform(L1()), 0.5)
    assert strategy(replace(flags, remove_blocks=0.0), default_blocks=0.5) == Uniform(L1())
    assert strategy(replace(flags, remove_blocks=0.2), default_blocks=0.5) == RemoveBlocks(Uniform(L1()), 0.2)
    assert stable_repr(strategy(SearchFlags(strategy="tas"), default_blocks=0.5)) == stable_repr(TAS())


def test_a_search_that_learns_has_flags_of_its_own():
    default = TAS()
    assert stable_repr(strategy(SearchFlags(strategy="tas"))) == stable_repr(default)
    flags = SearchFlags(strategy="tas", importance="l1", search_epochs=7, search_over="both", search_learning_rate=0.3)
    found = strategy(flags)
    assert isinstance(found, TAS)
    assert (found.widths, found.depths, found.importance) == (Widths(), Depths(), L1())
    assert found.train == replace(default.train, epochs=7, learning_rate=0.3)
    depths = strategy(SearchFlags(strategy="tas", search_over="depths"))
    assert isinstance(depths, TAS)
    assert (depths.widths, depths.depths, depths.train) == (None, Depths(), default.train)
    widths = strategy(SearchFlags(strategy="tas", search_over="widths"))
    assert stable_repr(widths) == stable_repr(default)


@pytest.mark.parametrize(
    "flags", [SearchFlags(search_epochs=1), SearchFlags(search_over="widths"), SearchFlags(search_learning_rate=0.1)]
)
def test_flags_of_a_search_that_learns_are_refused_elsewhere(flags: SearchFlags):
    with pytest.raises(SelectionError, match=r"must go with --strategy swp or tas; got no strategy\. Leave it out"):
        strategy(flags)


def test_removed_blocks_are_refused_where_depths_are_searched():
    with pytest.raises(SelectionError, match=r"`--remove-blocks` must be left out with --strategy tas.*got 0\.5\. Say"):
        strategy(SearchFlags(strategy="tas", remove_blocks=0.5))


def test_removed_blocks_are_refused_with_swp_too():
    with pytest.raises(SelectionError, match=r"--strategy swp.*Say --search-over depths, or both"):
        strategy(SearchFlags(strategy="swp", remove_blocks=0.5))


def test_stage_wise_search_has_further_flags():
    assert stable_repr(strategy(SearchFlags(strategy="swp"))) == stable_repr(SWP())
    flags = SearchFlags(
        strategy="swp",
        importance="l1",
        search_epochs=3,
        search_over="both",
        search_candidates=16,
        combine="evolution",
        stage_end=("a", "b"),
        ray="auto",
    )
    found = strategy(flags)
    assert isinstance(found, SWP)
    assert (found.widths, found.depths, found.importance) == (Widths(), Depths(), L1())
    assert (found.candidates, found.combination, found.cuts) == (16, Evolution(), ("a", "b"))
    assert (found.workers, found.train.epochs) == (OnRay("auto"), 3)


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (SearchFlags(strategy="tas", search_candidates=8), "--search-candidates"),
        (SearchFlags(strategy="tas", combine="exact"), "--combine"),
        (SearchFlags(strategy="tas", stage_end=("layer1",)), "--stage-end"),
        (SearchFlags(strategy="tas", ray="local"), "--ray"),
    ],
)
def test_flags_of_the_stage_wise_search_are_refused_elsewhere(flags: SearchFlags, name: str):
    with pytest.raises(SelectionError, match=f"`{name}` must go with --strategy swp; got tas"):
        strategy(flags)


def test_published_settings_are_reachable():
    assert strategy(SearchFlags(strategy="tas", tas_preset="paper-cifar")) == TAS.paper()
    assert strategy(SearchFlags(strategy="tas", tas_preset="paper-imagenet")) == TAS.paper(imagenet=True)
    assert strategy(SearchFlags(strategy="tas", tas_preset="short")) == strategy(SearchFlags(strategy="tas"))
    widths = strategy(SearchFlags(strategy="tas", tas_preset="paper-cifar", search_over="widths", search_epochs=2))
    assert isinstance(widths, TAS)
    assert (widths.widths, widths.depths, widths.train.epochs) == (TAS.paper().widths, None, 2)
    assert strategy(SearchFlags(strategy="pca", pca="raw", rank_cap="literal")) == PCASlimming(
        RawWeights(stretched=False)
    )
    assert strategy(SearchFlags(strategy="pca", pca="folded", rank_cap="stretched")) == PCASlimming()
    found = strategy(SearchFlags(strategy="pca", pca="correlation", importance="fpgm"))
    assert found == PCASlimming(FilterWeights(Correlation()), GeometricMedian())


def test_ablations_of_swp_are_reachable():
    made = {name: strategy(SearchFlags(strategy="swp", swp_ablation=name)) for name in get_args(AblationName)}
    assert made["no-stages"] == replace(strategy(SearchFlags(strategy="swp")), cuts=())
    assert made["no-sandwich"].sampler == RandomSampler(3)
    assert (made["no-in-place"].cuts, made["no-in-place"].supervision) == ((), Labels())
    assert made["autoslim"].supervision == SoftLabels()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (SearchFlags(strategy="swp", tas_preset="short"), "`--tas-preset` must go with --strategy tas"),
        (SearchFlags(strategy="tas", swp_ablation="autoslim"), "`--swp-ablation` must go with --strategy swp"),
        (SearchFlags(strategy="knapsack", pca="raw"), "`--pca` must go with --strategy pca"),
        (SearchFlags(rank_cap="literal"), "`--rank-cap` must go with --strategy pca; got no strategy"),
        (
            SearchFlags(strategy="swp", swp_ablation="no-stages", stage_end=("layer1",)),
            "`--stage-end` must go without --swp-ablation no-stages",
        ),
    ],
)
def test_published_settings_of_other_strategies_are_refused(flags: SearchFlags, message: str):
    with pytest.raises(SelectionError, match=message):
        strategy(flags)


def test_the_published_search_of_tas_needs_an_untied_graph():
    check_published(SearchFlags(strategy="tas", tas_preset="paper-cifar"), SpaceFlags(untied=True))
    check_published(SearchFlags(strategy="tas"), SpaceFlags())
    with pytest.raises(SelectionError, match="`--tas-preset` must go with --untied for paper-imagenet"):
        check_published(SearchFlags(strategy="tas", tas_preset="paper-imagenet"), SpaceFlags())
