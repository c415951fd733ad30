"""Strategies keep to bounds on latency and size without knowing of them."""

import numpy as np
import pytest
import torch
from torch import nn

from secateur.cost import Budget, CostModel, FileSize, LatencyModel, TimeGrid, layer_extents, timeable_operations
from secateur.errors import BudgetError
from secateur.graph import trace
from secateur.models import load_model
from secateur.nas import Widths
from secateur.nas.tas_cost import ExpectedCost
from secateur.nas.tas_sampler import WidthCandidates, WidthDistribution
from secateur.search import (
    L2,
    GlobalImportance,
    Knapsack,
    PCASlimming,
    RemoveBlocks,
    ScoringInputs,
    SearchContext,
    SearchSpace,
    Uniform,
    search_architecture,
)

EXAMPLE = torch.zeros(1, 3, 8, 8)
STRATEGIES = [Uniform(), Knapsack(L2()), GlobalImportance(), PCASlimming()]
SPACE = SearchSpace(min_kept_fraction=0.25)


def made() -> tuple[nn.Module, object, LatencyModel]:
    """ResNet-20, where a layer takes a microsecond and a nanosecond for each weight of widths rounded up to fours."""
    model, _ = load_model("cifar_resnet20", seed=0)
    graph = trace(model, EXAMPLE)
    times = {}
    for name in timeable_operations(graph):
        out, read = (extent.at(graph.sizes) for extent in layer_extents(graph, name))
        outs, reads = np.arange(1, out + 1), np.arange(1, read + 1)
        times[name] = TimeGrid(outs, reads, 1e-6 + 1e-9 * 16 * -(-outs[:, None] // 4) * -(-reads[None, :] // 4))
    return model, graph, LatencyModel.of(graph, times)


MODEL, GRAPH, LATENCY = made()


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("budget", ["latency=50%", "latency<=35us", "size=300kB", "macs=60%, latency=45%, size=70%"])
def test_every_strategy_keeps_to_every_bound_and_fills_one(strategy, budget: str):
    found = search_architecture(MODEL, GRAPH, strategy, budget=budget, space=SPACE, latency=LATENCY)
    limits = Budget.parse(budget).limits(found.original)
    used = {name: getattr(found.cost, name) / limit for name, limit in limits.items()}
    assert max(used.values()) <= 1
    assert max(used.values()) >= 0.97
    assert found.notes["utilization"] == pytest.approx(used)
    costs = CostModel(GRAPH, (LATENCY, FileSize.of(MODEL, GRAPH)))
    again = costs.cost(found.architecture)
    assert found.cost.latency_s == again.latency_s == LATENCY.of_widths(costs.widths(found.architecture)[None])[0]
    assert found.cost.size_bytes in (None, again.size_bytes)


def test_blocks_go_for_latency_too():
    images = [(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))]
    strategy = RemoveBlocks(Uniform(), repairs=())
    budget = "latency=33%"
    found = search_architecture(MODEL, GRAPH, strategy, budget=budget, batches=images, space=SPACE, latency=LATENCY)
    assert found.cost.latency_s <= 0.33 * found.original.latency_s
    assert found.architecture.removed_blocks
    costs = CostModel(GRAPH, (LATENCY,))
    assert found.cost == costs.cost(found.architecture)


def test_a_budget_out_of_reach_names_milliseconds():
    with pytest.raises(BudgetError, match=r"Reachable: latency [\d.]+ us \([\d.]+ %\) to [\d.]+ us\. Raise the budget"):
        search_architecture(MODEL, GRAPH, Uniform(), budget="latency=1us", space=SPACE, latency=LATENCY)
    with pytest.raises(BudgetError, match=r"Reachable: latency [\d.]+ ms \([\d.]+ %\) to [\d.]+ ms"):
        search_architecture(MODEL, GRAPH, Uniform(), budget="latency=1us", space=SPACE, latency=LATENCY.scaled(1000))
    with pytest.raises(BudgetError, match=r"Reachable: macs [^,]*, size [\d.]+ kB \([\d.]+ %\) to [\d.]+ MB"):
        search_architecture(MODEL, GRAPH, Uniform(), budget="macs=50%, size=1kB", space=SPACE)


def test_a_bound_that_nothing_computes_is_refused():
    with pytest.raises(BudgetError, match="got a limit of latency, and a cost without latency_s"):
        search_architecture(MODEL, GRAPH, Uniform(), budget="latency=50%")


def test_the_relaxed_price_of_a_choice_is_differentiable_and_exact_when_decided():
    budget = Budget(latency="50%", size="60%", macs="70%")
    costs = CostModel(GRAPH, (LATENCY, FileSize.of(MODEL, GRAPH)))
    problem = SearchContext(ScoringInputs(MODEL, GRAPH, (), 0), costs, budget, SearchSpace(divisor=4), lambda *_: None)
    candidates = WidthCandidates.of(problem, Widths(), None, frozenset(costs.axes))
    choice, price = WidthDistribution(candidates), ExpectedCost(problem, candidates, 0.05)
    expected = price.expected(choice)
    assert set(expected) == {"macs", "size_bytes", "latency_s"}
    for value in expected.values():
        (slope,) = torch.autograd.grad(value, choice.widths, retain_graph=True)
        # A wider candidate costs more than a narrower one.
        assert (slope[:, -1] > slope[:, 0]).all()
    with torch.no_grad():
        choice.widths[:, 1:] = -1e4
        last = candidates.open_widths.sum(1) - 1
        choice.widths[range(len(last)), last.tolist()] = 1e4
    whole = price.expected(choice)
    assert whole["latency_s"].item() == pytest.approx(costs.original.latency_s, rel=1e-9)
    assert whole["macs"].item() == costs.original.macs
    assert price.most_likely(choice) == costs.original
    assert price.fractions(price.most_likely(choice)) == {"macs": 1.0, "size_bytes": 1.0, "latency_s": 1.0}
    assert price.loss(choice).item() == pytest.approx(0, abs=1e-9)  # log of the whole, which is over the budget
