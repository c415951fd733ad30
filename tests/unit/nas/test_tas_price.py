"""The expected cost and its loss against enumeration of whole spaces."""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from cuts import zoo_net
from hand_graphs import concat, flat, plain
from torch import Tensor

from secateur.architecture import Architecture
from secateur.cost import Budget, CostModel
from secateur.graph import ChannelGraph, untie
from secateur.nas import Depths, Widths
from secateur.nas.tas_cost import ExpectedCost
from secateur.nas.tas_sampler import WidthCandidates, WidthDistribution
from secateur.prune import restrict_branches
from secateur.search import ScoringInputs, SearchContext, SearchSpace

FEW = Widths((0.3, 0.6))


def problem(graph: ChannelGraph, budget: str = "macs=50%, params=50%") -> SearchContext:
    inputs = ScoringInputs(None, graph)
    return SearchContext(inputs, CostModel(graph), Budget.parse(budget), SearchSpace(), lambda _done, _what: None)


def producing(graph: ChannelGraph) -> frozenset[str]:
    """All axes but streams that are nothing but the sum of their branches."""
    asked = problem(graph)
    sums = {asked.costs.axes[stream] for stream, _ in asked.streams.sums}
    return frozenset(graph.sizes) - sums


@dataclass(frozen=True, eq=False)
class Asked:
    """A price and a choice with random logits."""

    graph: ChannelGraph
    price: ExpectedCost
    choice: WidthDistribution


def asked(
    graph: ChannelGraph,
    budget: str = "macs=50%, params=50%",
    *,
    widths: Widths | None = FEW,
    depths: Depths | None = None,
    tolerance: float = 0.05,
    axes: frozenset[str] | None = None,
) -> Asked:
    given = problem(graph, budget)
    candidates = WidthCandidates.of(given, widths, depths, producing(graph) if axes is None else axes)
    choice = WidthDistribution(candidates).double()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for logits in choice.parameters():
            logits.copy_(torch.randn(logits.shape, generator=draw, dtype=torch.float64))
    return Asked(graph, ExpectedCost(given, candidates, tolerance), choice)


def enumerated(given: Asked) -> dict[str, float]:
    """Mean cost of every architecture of the space, by the cost of the `Architecture` itself."""
    graph, candidates = given.graph, given.price.candidates
    names, costs = list(graph.sizes), CostModel(graph)
    p, q = (log_p.detach().exp().numpy() for log_p in (given.choice.log_widths, given.choice.log_depths))
    sums = {names[stream]: [names[b] for b in branches] for stream, branches in given.price.context.streams.sums}
    found = {"macs": 0.0, "params": 0.0}
    rows = [range(int(row.sum())) for row in (*candidates.open_widths, *candidates.open_depths)]
    for picks in itertools.product(*rows):
        wide, deep = picks[: len(candidates.axes)], picks[len(candidates.axes) :]
        widths = dict(graph.sizes)
        chance = 1.0
        for row, pick in enumerate(wide):
            widths[names[candidates.axes[row]]] = int(candidates.widths[row, pick])
            chance *= p[row, pick]
        removed: list[str] = []
        for row, pick in enumerate(deep):
            removed += [b.name for b in graph.chains[candidates.chains[row]][candidates.depths[row, pick] :]]
            chance *= q[row, pick]
        for stream, branches in sums.items():
            widths[stream] = max(widths[branch] for branch in branches)
        architecture = Architecture.of({name: range(width) for name, width in widths.items()}, removed)
        cost = costs.cost(restrict_branches(graph, architecture))
        found["macs"] += chance * cost.macs
        found["params"] += chance * cost.params
    return found


TIED = {
    "plain": lambda: plain()[1],
    "concat": lambda: concat()[1],
    "flat": lambda: flat()[1],
    "dense": lambda: zoo_net("dense")[2],
    "residual": lambda: zoo_net("residual")[2],
}


@pytest.mark.parametrize("name", TIED)
def test_expected_widths_are_the_mean_over_the_whole_space(name):
    given = asked(TIED[name]())
    want = enumerated(given)
    got = {field: float(value.detach()) for field, value in given.price.expected(given.choice).items()}
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("widths", [None, Widths((0.5,))], ids=["depths", "both"])
@pytest.mark.parametrize("name", ["residual", "preact_residual", "nested", "inverted_residual_se", "layer_scale"])
def test_expected_depths_are_too(name, widths):
    """Every block by the probability that it is kept; for widths besides, the whole product space (few axes)."""
    graph = zoo_net(name)[2]
    given = asked(graph, widths=widths, depths=Depths(), axes=frozenset(list(graph.sizes)[:4]))
    want = enumerated(given)
    got = {field: float(value.detach()) for field, value in given.price.expected(given.choice).items()}
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    "name", ["residual", "option_a_residual", "multi_branch_add", "preact_residual", "layer_scale"]
)
def test_streams_are_as_wide_as_their_widest_branch(name):
    """Untied: branches are never wider than their stream, and a stream that only sums them is their maximum."""
    graph = untie(*zoo_net(name)[::2])
    axes = producing(graph)
    some = frozenset(sorted(axes, key=lambda axis: (graph.by_name[axis].residual_axis is None, axis))[:7])
    given = asked(graph, widths=Widths((0.4, 0.7)), axes=some)
    want = enumerated(given)
    got = {field: float(value.detach()) for field, value in given.price.expected(given.choice).items()}
    assert got == pytest.approx(want, rel=1e-12)


def test_a_branch_with_a_choice_is_clipped_by_a_stream_with_one():
    """E[min(branch, stream)], both drawn by themselves."""
    graph = untie(*zoo_net("residual")[::2])
    branch = next(axis for axis in graph.prunable if axis.residual_axis == "0.0")
    given = asked(graph, axes=frozenset({branch.name, "0.0"}))
    want = enumerated(given)
    got = {field: float(value.detach()) for field, value in given.price.expected(given.choice).items()}
    assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_its_gradient_is_right(untied):
    """gradcheck over the logits of widths and depths."""
    graph = zoo_net("residual")[2]
    given = asked(untie(zoo_net("residual")[0], graph) if untied else graph, depths=Depths())

    def cost(widths: Tensor, depths: Tensor) -> tuple[Tensor, ...]:
        choice = Stand(given.price.candidates, widths, depths)
        return tuple(value / 1e4 for value in given.price.expected(choice).values())

    logits = tuple(p.detach().clone().requires_grad_() for p in (given.choice.widths, given.choice.depths))
    assert torch.autograd.gradcheck(cost, logits)


class Stand(WidthDistribution):
    """A choice whose logits are given from outside."""

    def __init__(self, candidates: WidthCandidates, widths: Tensor, depths: Tensor):
        super().__init__(candidates)
        del self.widths, self.depths
        self.widths, self.depths = widths, depths


def test_the_most_likely_architecture_has_its_own_cost():
    graph = zoo_net("residual")[2]
    given = asked(graph, depths=Depths())
    candidates, choice = given.price.candidates, given.choice
    top = choice.widths.argmax(1).tolist()
    widths = dict(graph.sizes)
    for row, axis in enumerate(candidates.axes.tolist()):
        widths[list(graph.sizes)[axis]] = int(candidates.widths[row, top[row]])
    removed = [
        block.name
        for row, pick in enumerate(choice.depths.argmax(1).tolist())
        for block in graph.chains[candidates.chains[row]][candidates.depths[row, pick] :]
    ]
    want = CostModel(graph).cost(Architecture.of({name: range(width) for name, width in widths.items()}, removed))
    assert given.price.most_likely(choice) == want
    assert given.price.fractions(want)["macs"] == want.macs / CostModel(graph).original.macs


def decided(given: Asked, pick: int) -> WidthDistribution:
    """Every axis has all but decided for one of its candidates."""
    choice = WidthDistribution(given.price.candidates).double()
    with torch.no_grad():
        choice.widths[:, pick] = 3.0
    return choice


def fraction_at(given: Asked, pick: int) -> float:
    original = given.price.context.costs.original
    return given.price.most_likely(decided(given, pick)).macs / original.macs


def test_over_the_budget_the_loss_is_plus_log_of_the_expected_cost():
    _, graph = plain()
    middle = fraction_at(asked(graph), 1)
    given = asked(graph, f"macs={100 * (middle - 0.001):.4f}%")
    choice = decided(given, 1)
    loss = given.price.loss(choice)
    original = given.price.context.costs.original.macs
    expected = given.price.expected(choice)["macs"].detach()
    assert float(loss.detach()) == pytest.approx(math.log(float(expected) / original))
    loss.backward()
    assert (choice.widths.grad[:, -1] > 0).all()  # descent makes the widest less likely
    wanted = torch.autograd.grad(given.price.expected(choice)["macs"].log(), choice.widths)[0]
    torch.testing.assert_close(choice.widths.grad, wanted)


def test_far_under_the_budget_it_is_minus_log():
    _, graph = plain()
    middle = fraction_at(asked(graph), 1)
    given = asked(graph, f"macs={100 * (middle + 0.051):.4f}%")
    choice = decided(given, 1)
    loss = given.price.loss(choice)
    original = given.price.context.costs.original.macs
    expected = given.price.expected(choice)["macs"].detach()
    assert float(loss.detach()) == pytest.approx(-math.log(float(expected) / original))
    loss.backward()
    assert (choice.widths.grad[:, -1] < 0).all()


@pytest.mark.parametrize("under", [0.0, 0.01, 0.049])
def test_within_the_tolerance_it_is_nothing(under):
    """The tolerance is a fraction of the whole model's cost, not of the budget's."""
    _, graph = plain()
    middle = CostModel(graph).original.macs * fraction_at(asked(graph), 1)
    given = asked(graph, f"macs={middle + under * CostModel(graph).original.macs:.6f}")
    choice = decided(given, 1)
    loss = given.price.loss(choice)
    loss.backward()
    assert float(loss.detach()) == 0
    assert not choice.widths.grad.any()


def test_a_tolerance_of_zero_pushes_from_both_sides():
    _, graph = plain()
    middle = round(CostModel(graph).original.macs * fraction_at(asked(graph), 1))
    signs = []
    for budget in (middle - 1, middle, middle + 1):
        given = asked(graph, f"macs={budget}", tolerance=0)
        loss = given.price.loss(decided(given, 1))
        assert loss.isfinite()
        signs.append(np.sign(float(loss.detach())))
    assert signs == [-1, 0, 1]  # the logarithm of a fraction is negative


def test_of_several_limits_the_fullest_counts():
    _, graph = plain()
    fraction = {"macs": fraction_at(asked(graph), 1)}
    choice = decided(asked(graph), 1)
    original = CostModel(graph).original
    fraction["params"] = asked(graph).price.most_likely(choice).params / original.params
    for tight in ("macs", "params"):
        parts = {name: value * (0.8 if name == tight else 0.9) for name, value in fraction.items()}
        given = asked(graph, ", ".join(f"{name}={100 * value:.3f}%" for name, value in parts.items()))
        expected = float(given.price.expected(choice)[tight].detach()) / getattr(original, tight)
        assert float(given.price.loss(choice).detach()) == pytest.approx(math.log(expected))
    # One is kept with room to spare, the other is not.
    given = asked(graph, f"macs={100 * fraction['macs'] + 20:.3f}%, params={90 * fraction['params']:.3f}%")
    expected = float(given.price.expected(choice)["params"].detach()) / original.params
    assert float(given.price.loss(choice).detach()) == pytest.approx(math.log(expected))


def test_expectations_have_the_accuracy_of_float64_for_float32_logits():
    """The cost of a large net has more digits than float32."""
    given = asked(zoo_net("dense")[2])
    single = replace(given, choice=given.choice.float())
    want = enumerated(replace(given, choice=single.choice))
    got = single.price.expected(single.choice)
    assert all(value.dtype == torch.float64 for value in got.values())
    assert {field: float(value.detach()) for field, value in got.items()} == pytest.approx(want, rel=1e-6)
