"""From any probabilities to an architecture that fills the budget."""

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuts import zoo_net
from hand_graphs import plain
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secateur.cost import Budget, CostModel
from secateur.errors import BudgetError
from secateur.graph import ChannelGraph, trace, untie
from secateur.nas import Depths, Widths
from secateur.nas.tas_cost import Derived, derive
from secateur.nas.tas_sampler import WidthCandidates
from secateur.search import ScoringInputs, SearchContext, SearchSpace


class Block(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.first, self.second = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class Deep(nn.Module):
    """Two stages of residual blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.one = nn.Sequential(*[Block(24, 24) for _ in range(4)])
        self.down = nn.Conv2d(24, 32, 3, 2, 1)
        self.two = nn.Sequential(*[Block(32, 32) for _ in range(6)])
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.down(self.one(self.stem(x)))).mean((2, 3)))


@cache
def graph_of(name: str) -> ChannelGraph:
    if name == "plain":
        return plain(64, 64)[1]
    if name.startswith("deep"):
        with torch.random.fork_rng(devices=[]):
            model, x = Deep().eval(), torch.zeros(1, 3, 8, 8)
        graph = trace(model, x)
        assert [len(chain) for chain in graph.chains] == [4, 6]
    else:
        model, _, graph = zoo_net(name.removesuffix("-untied"))
    return untie(model, graph) if name.endswith("untied") else graph


@dataclass(frozen=True, eq=False)
class Case:
    problem: SearchContext
    candidates: WidthCandidates
    p: np.ndarray
    q: np.ndarray

    def derived(self) -> Derived:
        return derive(self.problem, self.candidates, self.p, self.q)

    def full(self, widths: np.ndarray, removed: tuple[str, ...]) -> float:
        """Cost / limit, the larger of them."""
        macs, params = self.problem.costs.without(removed).of_widths(self.problem.streams.fitted(widths[None]))
        by_field = {"macs": macs, "params": params}
        return max(float(by_field[name][0]) / limit for name, limit in self.problem.limits.items())

    @property
    def smallest(self) -> np.ndarray:
        widths = self.problem.costs.sizes.copy()
        widths[self.candidates.axes] = self.candidates.widths[:, 0]
        return widths

    def depths(self, removed: tuple[str, ...]) -> list[int]:
        """Blocks kept of each chain with a choice; the first ones."""
        found = []
        for chain in (self.problem.inputs.graph.chains[number] for number in self.candidates.chains):
            kept = [block.name not in removed for block in chain]
            assert kept == sorted(kept, reverse=True)
            found.append(sum(kept))
        return found

    def removed(self, depths: list[int]) -> tuple[str, ...]:
        chains = [self.problem.inputs.graph.chains[number] for number in self.candidates.chains]
        return tuple(sorted(b.name for chain, n in zip(chains, depths, strict=True) for b in chain[n:]))


def case(
    graph: ChannelGraph,
    budget: str,
    *,
    widths: Widths | None = Widths(),  # noqa: B008 -- frozen
    depths: Depths | None = None,
    seed: int = 0,
    sharpness: float = 1.0,
    axes: frozenset[str] | None = None,
    space: SearchSpace = SearchSpace(),  # noqa: B008 -- frozen
) -> Case:
    """Random probabilities, of a large sharpness almost decided."""
    problem = SearchContext(
        ScoringInputs(None, graph), CostModel(graph), Budget.parse(budget), space, lambda _done, _what: None
    )
    sums = {problem.costs.axes[stream] for stream, _ in problem.streams.sums}
    seen = frozenset(graph.sizes) - sums if axes is None else axes
    candidates = WidthCandidates.of(problem, widths, depths, seen)
    draw = np.random.default_rng(seed)

    def probabilities(valid: np.ndarray) -> np.ndarray:
        logits = np.where(valid, draw.normal(size=valid.shape) * sharpness, -np.inf)
        chances = np.exp(logits - logits.max(axis=1, keepdims=True)) if len(valid) else np.zeros(valid.shape)
        return chances / chances.sum(axis=1, keepdims=True)

    return Case(problem, candidates, probabilities(candidates.open_widths), probabilities(candidates.open_depths))


NETS = ["deep", "deep-untied", "residual", "residual-untied", "option_a_residual"]


@pytest.mark.parametrize(
    ("name", "search"), [("plain", "widths"), *itertools.product(NETS, ["widths", "depths", "both"])]
)
@settings(max_examples=20)
@given(
    percent=st.integers(45, 95),
    seed=st.integers(0, 10**6),
    sharpness=st.sampled_from([0.1, 1.0, 10.0, 100.0]),
    field=st.sampled_from(["macs", "params"]),
)
def test_whatever_the_probabilities_the_budget_is_kept_and_filled(name, search, percent, seed, sharpness, field):
    graph = graph_of(name)
    widths, depths = Widths() if search != "depths" else None, Depths() if search != "widths" else None
    found = case(graph, f"{field}={percent}%", widths=widths, depths=depths, seed=seed, sharpness=sharpness)
    try:
        derived = found.derived()
    except BudgetError:
        least = found.removed([int(row[0]) for row in found.candidates.depths])
        assert found.full(found.smallest, least) > 1
        return
    full = found.full(derived.widths, derived.removed_blocks)
    kept = found.depths(derived.removed_blocks)
    assert full <= 1
    assert np.array_equal(found.problem.streams.fitted(derived.widths[None])[0], derived.widths)
    assert set(derived.removed_blocks) == set(found.removed(kept))
    for row, depth in enumerate(kept):
        assert depth in found.candidates.depths[row]
    for width, levels in zip(derived.widths, found.problem.levels, strict=True):
        assert width in levels
    if full < 0.97:
        assert_nothing_more_fits(found, derived, kept)
    again = found.derived()
    assert np.array_equal(again.widths, derived.widths)
    assert again.removed_blocks == derived.removed_blocks


def assert_nothing_more_fits(found: Case, derived: Derived, kept: list[int]) -> None:
    """No searched axis can be one step wider; if all are whole, or none is searched, no chain can be deeper."""
    whole = True
    for axis in found.candidates.axes:
        levels = found.problem.levels[axis]
        more = levels[levels > derived.widths[axis]]
        if not len(more):
            continue
        wider = derived.widths.copy()
        wider[axis] = more[0]
        streams = dict(found.problem.streams.branches.tolist())
        if axis in streams and more[0] > derived.widths[streams[axis]]:
            continue  # a branch in a narrower stream gains nothing
        whole = False
        assert found.full(wider, derived.removed_blocks) > 1
    if whole:
        for row, depth in enumerate(kept):
            for deeper in found.candidates.depths[row][found.candidates.depths[row] > depth][:1]:
                changed = found.removed([int(deeper) if n == row else d for n, d in enumerate(kept)])
                assert found.full(found.smallest, changed) > 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("depths", [None, Depths()], ids=["widths", "both"])
@pytest.mark.parametrize("name", ["deep", "deep-untied"])
def test_with_fine_levels_it_is_at_most_three_percent_under(name, depths, seed):
    found = case(graph_of(name), "macs=52.5%", depths=depths, seed=seed, sharpness=5.0)
    derived = found.derived()
    assert 0.97 <= found.full(derived.widths, derived.removed_blocks) <= 1


def one_hot(rows: np.ndarray, picks: list[int]) -> np.ndarray:
    p = np.full(rows.shape, 1e-6) * rows
    p[np.arange(len(picks)), picks] = 1
    return p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_the_most_likely_architecture_is_taken_if_it_fills_the_budget(seed):
    """Exactly: the limit is its own cost."""
    graph = graph_of("deep")
    draw = np.random.default_rng(seed)
    first = case(graph, "macs=50%", depths=Depths())
    candidates = first.candidates
    wide = [int(draw.integers(2, row.sum())) for row in candidates.open_widths]
    deep = [int(draw.integers(1, row.sum())) for row in candidates.open_depths]
    widths = first.problem.costs.sizes.copy()
    widths[candidates.axes] = [int(row[pick]) for row, pick in zip(candidates.widths, wide, strict=True)]
    removed = first.removed([int(row[pick]) for row, pick in zip(candidates.depths, deep, strict=True)])
    macs = int(first.problem.costs.without(removed).of_widths(widths[None])[0][0])
    exact = case(graph, f"macs={macs}", depths=Depths())
    p, q = one_hot(candidates.open_widths, wide), one_hot(candidates.open_depths, deep)
    derived = derive(exact.problem, exact.candidates, p, q)
    assert derived.removed_blocks == removed
    for name, got, want in zip(graph.sizes, derived.widths, widths, strict=True):
        assert got == want or name.rpartition(".")[0] in removed  # widths of what is gone cost nothing


def test_too_large_a_favorite_loses_its_most_doubtful_steps():
    """Two axes want to be whole, one of them is sure of it."""
    graph = graph_of("plain")
    found = case(graph, "macs=50%", widths=Widths((0.25, 0.5)))
    rows = found.candidates.open_widths
    sure, doubtful = np.array([0.001, 0.001, 0.998]), np.array([0.3, 0.3, 0.4])
    for order, wider in (((sure, doubtful), 0), ((doubtful, sure), 1)):
        derived = derive(found.problem, found.candidates, np.array(order), np.zeros((0, 1)))
        assert derived.widths.argmax() == wider
        assert 0.97 <= found.full(derived.widths, ()) <= 1
    assert rows.all()


def test_axes_without_a_choice_stay_whole():
    """Also where the budget could be filled better with a step of theirs, and where the space allows it."""
    graph = graph_of("deep")
    chosen = frozenset(["stem", "one.0.first", "two.0.first", "down"])
    for seed, percent in itertools.product(range(4), (60, 71, 80)):
        found = case(
            graph, f"macs={percent}%", axes=chosen, seed=seed, space=SearchSpace(divisor=8), widths=Widths((0.4, 0.7))
        )
        derived = found.derived()
        for name, size, width in zip(graph.sizes, found.problem.costs.sizes, derived.widths, strict=True):
            assert name in chosen or width == size
        assert found.full(derived.widths, ()) <= 1


def test_a_single_candidate_is_no_choice_either():
    """Fractions that round to the whole width: the axis stays whole though narrower widths are allowed."""
    graph = graph_of("deep")
    found = case(graph, "macs=90%", widths=Widths((0.8,)), space=SearchSpace(divisor=8))
    named = dict(zip(graph.sizes, range(len(graph.sizes)), strict=True))
    assert named["stem"] not in found.candidates.axes.tolist() or found.candidates.open_widths.all()
    derived = found.derived()
    for axis, size in enumerate(found.problem.costs.sizes):
        assert axis in found.candidates.axes or derived.widths[axis] == size


def test_blocks_come_back_where_widths_alone_cannot_fill_the_budget():
    """The likeliest depths are the least ones; with every axis whole that is far under the budget."""
    graph = graph_of("deep")
    found = case(graph, "macs=80%", depths=Depths())
    least = one_hot(found.candidates.open_depths, [0] * len(found.candidates.depths))
    shallow = found.removed([int(row[0]) for row in found.candidates.depths])
    assert found.full(found.problem.costs.sizes, shallow) < 0.5
    derived = derive(found.problem, found.candidates, found.p, least)
    assert 0.97 <= found.full(derived.widths, derived.removed_blocks) <= 1


def test_blocks_go_where_the_smallest_widths_are_too_many():
    graph = graph_of("deep")
    found = case(graph, "macs=30%", depths=Depths(), widths=Widths((0.8,)))
    deep = one_hot(found.candidates.open_depths, [int(row.sum()) - 1 for row in found.candidates.open_depths])
    assert found.full(found.smallest, ()) > 1
    derived = derive(found.problem, found.candidates, found.p, deep)
    assert derived.removed_blocks
    assert 0.97 <= found.full(derived.widths, derived.removed_blocks) <= 1


def test_of_two_chains_the_one_less_sure_of_its_depth_gives_way():
    graph = graph_of("deep")
    found = case(graph, "macs=75%", depths=Depths(), widths=None)
    rows = found.candidates.open_depths
    tops = [int(row.sum()) - 1 for row in rows]
    for sure, other in ((0, 1), (1, 0)):
        q = one_hot(rows, tops)
        q[other, rows[other]] = 1 / rows[other].sum()
        kept = found.depths(derive(found.problem, found.candidates, found.p, q).removed_blocks)
        assert kept[sure] == len(graph.chains[sure])
        assert kept[other] < len(graph.chains[other])


@pytest.mark.parametrize(("widths", "depths"), [(None, Depths()), (Widths((0.9,)), None), (Widths((0.9,)), Depths())])
def test_what_is_out_of_reach_is_refused(widths, depths):
    found = case(graph_of("deep"), "macs=1%", widths=widths, depths=depths)
    with pytest.raises(BudgetError, match=r"`budget` must be within reach; got macs<=1%\. Raise it, or allow smaller"):
        found.derived()
