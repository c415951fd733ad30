"""Widths of streams and of their branches in untied graphs."""

import numpy as np
import pytest
from cuts import zoo_net
from hand_graphs import plain

from secateur.architecture import Architecture
from secateur.cost import Budget, CostModel
from secateur.graph import ChannelGraph, untie
from secateur.nas import TAS, Widths
from secateur.prune import cut
from secateur.search import (
    L2,
    AxisRule,
    ScoringInputs,
    SearchContext,
    SearchSpace,
    Uniform,
    keep_best,
    search_architecture,
)
from secateur.search.space import Streams


def residual() -> ChannelGraph:
    """Stream 0.0 begins with a convolution; stream 2.conv2 is the sum of three branches."""
    model, _, graph = zoo_net("residual")
    return untie(model, graph)


def named(graph: ChannelGraph, **widths: int) -> np.ndarray:
    full = dict(graph.sizes) | {name.replace("__", "/").replace("_", "."): width for name, width in widths.items()}
    return np.array([list(full.values())])


def problem(graph: ChannelGraph, space: SearchSpace = SearchSpace()) -> SearchContext:  # noqa: B008 -- frozen
    inputs = ScoringInputs(zoo_net("residual")[0], graph)
    return SearchContext(inputs, CostModel(graph), Budget.parse("macs=50%"), space, lambda _done, _what: None)


def of(graph: ChannelGraph, fitted: np.ndarray) -> dict[str, int]:
    return dict(zip(graph.sizes, fitted[0].tolist(), strict=True))


def branches(graph: ChannelGraph, stream: str) -> list[str]:
    return [axis.name for axis in graph.prunable if axis.residual_axis == stream]


def test_a_tied_graph_has_no_streams():
    graph = plain()[1]
    widths = np.array([[3, 12]])
    assert Streams.of(graph).fitted(widths) is widths
    assert Streams.of(graph).sums == ()


def test_branches_are_no_wider_than_their_stream():
    graph = residual()
    widths = named(graph)
    place = list(graph.sizes).index("0.0")
    widths[0, place] = 5
    fitted = of(graph, Streams.of(graph).fitted(widths))
    assert branches(graph, "0.0")
    assert all(fitted[name] == 5 for name in branches(graph, "0.0"))
    assert fitted["0.0"] == 5
    assert widths[0, list(graph.sizes).index(branches(graph, "0.0")[0])] == 8  # what was given is not changed


def test_a_sum_is_as_wide_as_its_widest_branch():
    graph = residual()
    parts = branches(graph, "2.conv2")
    assert len(parts) == 3
    widths = named(graph)
    for name, width in zip(parts, (4, 9, 6), strict=True):
        widths[0, list(graph.sizes).index(name)] = width
    assert of(graph, Streams.of(graph).fitted(widths))["2.conv2"] == 9


def test_fitting_twice_changes_nothing_more_and_rows_are_fitted_by_themselves():
    graph = residual()
    draw = np.random.default_rng(0)
    widths = draw.integers(1, list(graph.sizes.values()), (50, len(graph.sizes)), endpoint=True)
    streams = Streams.of(graph)
    fitted = streams.fitted(widths)
    assert np.array_equal(streams.fitted(fitted), fitted)
    assert all(np.array_equal(streams.fitted(row[None])[0], want) for row, want in zip(widths, fitted, strict=True))
    assert (fitted <= widths).all()


@pytest.mark.parametrize(
    "strategy", [Uniform(L2()), TAS(widths=Widths((0.5,)), importance=L2())], ids=["uniform", "tas"]
)
def test_the_least_cost_is_that_of_fitted_widths(strategy):
    """A stream that may become narrow and branches that may not: its sum is as wide as they are, and they as it is."""
    graph = residual()
    for pattern, least in ((branches(graph, "2.conv2"), 12), (["0.0"], 2)):
        rules = tuple(AxisRule(name, min_width=least) for name in pattern)
        asked = problem(graph, SearchSpace(min_width=4, rules=rules))
        found = strategy.least(asked)
        widths = np.array([[levels[0] for levels in asked.levels]])
        if isinstance(strategy, TAS):
            widths = np.array([[Widths((0.5,)).of(levels)[0] for levels in asked.levels]])
        fitted = of(graph, Streams.of(graph).fitted(widths))
        assert found == CostModel(graph).cost(Architecture.of({name: range(width) for name, width in fitted.items()}))


def test_branches_keep_channels_of_their_stream():
    graph = residual()
    draw = np.random.default_rng(1)
    asked = problem(graph)
    scores = {axis.name: draw.random(axis.size) for axis in graph.prunable}
    for _ in range(20):
        widths = draw.integers(1, list(graph.sizes.values()), len(graph.sizes), endpoint=True)
        found = keep_best(asked, widths, scores).by_name
        for axis in graph.prunable:
            if axis.residual_axis:
                assert set(found[axis.name]) <= set(found[axis.residual_axis])
        assert {name: len(kept) for name, kept in found.items()} == of(graph, Streams.of(graph).fitted(widths[None]))


def test_an_untied_net_is_slimmed_within_its_budget():
    model, _, _ = zoo_net("residual")
    graph = residual()
    found = search_architecture(model, graph, Uniform(L2()), budget="macs=50%")
    assert found.cost.macs <= 0.5 * found.original.macs
    assert cut(model, graph, found.architecture).architecture == found.architecture
