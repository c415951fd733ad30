"""What every strategy promises, whichever it is: one interface, several nets, several budgets."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from hand_graphs import HAND_GRAPHS, residual
from torch import nn
from zoo import ZOO

from secateur.cost import Budget, CostModel, count_macs, count_params
from secateur.errors import BudgetError, ModelError
from secateur.graph import ChannelGraph, trace
from secateur.prune import apply_architecture
from secateur.search import (
    L1,
    LAMP,
    Activations,
    BatchNormScale,
    Correlation,
    FilterWeights,
    GeometricMedian,
    GlobalImportance,
    Knapsack,
    PCASlimming,
    RandomImportance,
    RawWeights,
    RemoveBlocks,
    SearchSpace,
    Strategy,
    Taylor,
    Uniform,
    as_scored,
    by_axis_rank,
    search_architecture,
    stable_repr,
)

STRATEGIES: list[Strategy] = [
    Uniform(),
    Uniform(GeometricMedian()),
    Uniform(RandomImportance()),
    GlobalImportance(),
    GlobalImportance(L1(), by_axis_rank),
    GlobalImportance(LAMP(), as_scored),
    GlobalImportance(BatchNormScale(), as_scored),
    GlobalImportance(Taylor(), as_scored),
    Knapsack(),
    Knapsack(Taylor()),
    PCASlimming(),
    PCASlimming(RawWeights(Correlation()), GeometricMedian()),
    PCASlimming(Activations()),
    PCASlimming(FilterWeights(Correlation()), Taylor()),
    RemoveBlocks(),
    RemoveBlocks(Uniform(), max_fraction=1.0, images=3),
]
NETS = [
    "plain",
    "residual",
    "concat",
    "embedding",
    "zoo:dense",
    "zoo:few_groups",
    "zoo:inverted_residual_se",
    "zoo:attention",
]
BUDGETS = ["macs=75%", "macs=40%", "params=55%", "macs=60%, params=60%"]


@dataclass(frozen=True, eq=False)
class Net:
    model: nn.Module
    graph: ChannelGraph
    example: torch.Tensor
    batches: tuple[tuple[torch.Tensor, torch.Tensor], ...]


@cache
def net(name: str) -> Net:
    if name.startswith("zoo:"):
        model, example = ZOO[name.removeprefix("zoo:")]()
        graph = trace(model, example)
    else:
        model, graph = HAND_GRAPHS[name]()
        example = graph.example[0]
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, *example.shape[1:], generator=generator)
    return Net(model, graph, example[:1], ((images, torch.tensor([0, 1, 2, 1])),))


each_strategy = pytest.mark.parametrize("strategy", STRATEGIES, ids=stable_repr)


@each_strategy
@pytest.mark.parametrize("name", NETS)
def test_result_is_valid_within_the_budget_and_the_same_every_time(strategy, name):
    it = net(name)
    before = {key: tensor.clone() for key, tensor in it.model.state_dict().items()}
    state = torch.get_rng_state()
    costs, levels = CostModel(it.graph), SearchSpace().levels(it.graph)
    for text in BUDGETS:
        if not reachable(it.graph, text):
            continue
        found = search_architecture(it.model, it.graph, strategy, budget=text, batches=it.batches, seed=5)
        again = search_architecture(it.model, it.graph, strategy, budget=text, batches=it.batches, seed=5)
        assert found == again
        assert Budget.parse(text).allows(found.cost, found.original)
        assert found.cost == costs.cost(found.architecture)
        assert tuple(sorted(found.architecture.by_name)) == tuple(sorted(costs.axes))
        assert all(len(found.architecture.by_name[a]) in widths for a, widths in zip(costs.axes, levels, strict=True))
        assert max(found.notes["utilization"].values()) <= 1
    assert all(torch.equal(before[key], tensor) for key, tensor in it.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


@each_strategy
def test_budget_is_filled_where_widths_are_fine(strategy):
    model, graph = residual(150, 140)
    generator = torch.Generator().manual_seed(1)
    batches = ((torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 1])),)
    for text in ("macs=83%", "macs=31%", "params=57%", "macs=50%, params=90%"):
        found = search_architecture(model, graph, strategy, budget=text, batches=batches)
        assert 0.99 <= max(found.notes["utilization"].values()) <= 1


@each_strategy
def test_divisor_and_minimum_are_honored(strategy):
    model, graph = residual(40, 36)
    batches = ((torch.ones(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])),)
    space = SearchSpace(divisor=8, min_width=16)
    found = search_architecture(model, graph, strategy, budget="macs=50%", batches=batches, space=space)
    assert found.architecture.widths["stem"] in (16, 24, 32, 40)
    assert found.architecture.widths["conv1"] in (16, 24, 32, 36)


@each_strategy
def test_the_whole_is_returned_when_it_is_within_the_budget(strategy):
    it = net("residual")
    found = search_architecture(it.model, it.graph, strategy, budget="macs=100%")
    assert found.architecture.widths == it.graph.sizes


@each_strategy
def test_an_unreachable_budget_is_refused_at_once(strategy):
    it = net("residual")
    with pytest.raises(BudgetError, match="must be within reach; got params<=1"):
        search_architecture(it.model, it.graph, strategy, budget="params=1")


@each_strategy
def test_weights_that_are_not_finite_are_refused(strategy):
    model, graph = residual()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[0] = float("nan")
    batches = ((torch.ones(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])),)
    if strategy == Uniform(RandomImportance()):
        return  # it does not look at weights
    with pytest.raises(ModelError, match="finite"):
        search_architecture(model, graph, strategy, budget="macs=50%", batches=batches)


@each_strategy
def test_the_found_architecture_can_be_cut_and_costs_what_was_said(strategy):
    it = net("zoo:dense")
    found = search_architecture(it.model, it.graph, strategy, budget="macs=60%", batches=it.batches)
    cut = apply_architecture(it.model, it.graph, found.architecture)
    assert count_macs(cut, it.example) == found.cost.macs
    assert count_params(cut) == found.cost.params
    assert torch.isfinite(cut(it.example)).all()


def reachable(graph: ChannelGraph, text: str) -> bool:
    costs = CostModel(graph)
    least = np.array([[levels[0] for levels in SearchSpace().levels(graph)]])
    by_field = dict(zip(("macs", "params"), costs.of_widths(least), strict=True))
    return all(by_field[name][0] <= limit for name, limit in Budget.parse(text).limits(costs.original).items())
