"""The cost that TAS expects of its distribution, the loss that pulls it to the budget, and the derived architecture."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from secateur._arrays import FloatArray, IntArray
from secateur.cost.budget import Cost
from secateur.errors import BudgetError
from secateur.nas.tas_sampler import WidthCandidates, WidthDistribution
from secateur.search.base import SearchContext
from secateur.search.ranking import PROMISED, widen_to_budget


@dataclass(frozen=True, eq=False)
class ExpectedCost:
    """The cost of a distribution of widths and depths.

    Attributes:
        context: Costs and limits.
        candidates: The candidates of the distribution.
        tolerance: Distance below the budget that is near enough, as a fraction of the whole model's cost.
    """

    context: SearchContext
    candidates: WidthCandidates
    tolerance: float

    def expected(self, choice: WidthDistribution) -> dict[str, Tensor]:
        """Return E[cost] by limited field, in its own unit, float64, differentiable.

        Widths are replaced by their expectations under p and every block by the probability that it is kept. For
        operations whose factors are different axes (all but those that have one axis, or a stream and its branch, at
        both ends) and blocks that do not lie in each other this is the expectation itself, since costs are multilinear
        and choices independent. In an untied graph a branch counts with E[min] of its own width and the stream's, and
        a stream that is nothing but the sum of its branches with E[max] of theirs. A latency between well aligned
        widths is interpolated, so its steps do not show here; `most_likely` has them.
        """
        costs, device = self.context.costs, choice.widths.device
        widths = torch.as_tensor(costs.sizes, dtype=torch.float64, device=device)
        if len(self.candidates.axes):
            table = torch.as_tensor(self.candidates.widths, dtype=torch.float64, device=device)
            # In float64, because the MACs of a large network have more digits than float32.
            means = (choice.log_widths.double().exp() * table).sum(1)
            widths = widths.index_copy(0, torch.as_tensor(self.candidates.axes, device=device), means)
        streams = self.context.streams
        # A branch is never wider than its stream, which matters only where the stream may become narrower.
        for branch, stream in streams.branches.tolist():
            if stream not in self.candidates.axes:
                continue
            # E[min(a, b)] = -E[max(-a, -b)].
            narrower = -_expected_maximum([(-w, p) for w, p in self._drawn(choice, (branch, stream))])
            widths = widths.index_put((torch.tensor([branch], device=device),), narrower)
        for stream, branches in streams.sums:
            widest = _expected_maximum(self._drawn(choice, branches.tolist()))
            widths = widths.index_put((torch.tensor([stream], device=device),), widest)
        return costs.expected(self.context.limits, widths, self.presence(choice))

    def _drawn(self, choice: WidthDistribution, axes: Iterable[int]) -> list[tuple[Tensor, Tensor]]:
        """Return the widths of each axis and their probabilities; axes with one candidate are whole."""
        row = {axis: number for number, axis in enumerate(self.candidates.axes.tolist())}
        p = choice.log_widths.double().exp()
        table = torch.as_tensor(self.candidates.widths, dtype=torch.float64, device=p.device)
        whole = torch.as_tensor(self.context.costs.sizes, dtype=torch.float64, device=p.device)
        one = p.new_ones(1)
        return [(table[row[axis]], p[row[axis]]) if axis in row else (whole[axis].view(1), one) for axis in axes]

    def presence(self, choice: WidthDistribution) -> Tensor:
        """Return the probability that each removable block is kept, (blocks,)."""
        costs = self.context.costs
        present = torch.as_tensor(costs.present, dtype=torch.float64, device=choice.depths.device)
        column = {name: index for index, name in enumerate(costs.blocks)}
        p = choice.log_depths.double().exp()
        for row, number in enumerate(self.candidates.chains.tolist()):
            depths = torch.as_tensor(self.candidates.depths[row], device=p.device)
            for place, block in enumerate(self.context.inputs.graph.chains[number], 1):
                # A chain keeps its first blocks, so block number `place` is kept at every depth from `place` on.
                kept = (p[row] * (depths >= place)).sum()
                present = present.index_put((torch.tensor([column[block.name]], device=p.device),), kept)
        return present

    def most_likely(self, choice: WidthDistribution) -> Cost:
        """Return the cost of the architecture of the most likely candidates."""
        widths, blocks = self.widths_at(self.top(choice.log_widths)), self.blocks_at(self.top(choice.log_depths))
        return self.context.costs.cost_of(self.context.streams.fitted(widths[None])[0], blocks)

    @staticmethod
    def top(log_p: Tensor) -> IntArray:
        """Return the number of the most likely candidate of every row."""
        return log_p.detach().cpu().argmax(1).numpy().astype(np.int64)

    def widths_at(self, picked: IntArray) -> IntArray:
        """Return the widths of all prunable axes, (axes,), for the numbers of the picked candidates."""
        widths = self.context.costs.sizes.copy()
        widths[self.candidates.axes] = self.candidates.widths[np.arange(len(picked)), picked]
        return widths

    def blocks_at(self, picked: IntArray) -> IntArray:
        """Return 1 for every removable block that is kept, (blocks,), for the numbers of the picked candidates."""
        costs = self.context.costs
        column = {name: index for index, name in enumerate(costs.blocks)}
        present = costs.present.copy()
        for row, number in enumerate(self.candidates.chains.tolist()):
            for block in self.context.inputs.graph.chains[number][self.candidates.depths[row, picked[row]] :]:
                present[column[block.name]] = 0
        return present

    def loss(self, choice: WidthDistribution) -> Tensor:
        """Return +log E if the most likely architecture is over the budget, -log E if it is too far under it, else 0.

        E is the expected cost relative to the whole model's, which changes no gradient. Too far is more than the
        tolerance. With several limits the one counts that the most likely architecture uses most.

        References:
            Dong & Yang (TAS), arXiv:1905.09717, Eq. (8), with the lower bound R - t * F_full of the reference code
            (the paper writes (1 - t) R).
        """
        # A limit may be zero: the smallest positive number avoids a division by zero without a special case.
        original, limits = self.context.costs.original, self.context.limits
        now = self.most_likely(choice)
        # The most likely architecture says whether and in which direction to push; it has no gradient, so E is pushed.
        field = max(limits, key=lambda name: getattr(now, name) / max(limits[name], 1e-300))
        expected = torch.log(self.expected(choice)[field] / (getattr(original, field) or 1))
        cost, limit = getattr(now, field), limits[field]
        if cost > limit:
            return expected
        if cost < limit - self.tolerance * getattr(original, field):
            return -expected
        return 0 * expected  # Differentiable, like the other two.

    def fractions(self, cost: Mapping[str, float] | Cost) -> dict[str, float]:
        """Return limited fields as fractions of the whole model's."""
        original = self.context.costs.original
        values = cost if isinstance(cost, Mapping) else {name: getattr(cost, name) for name in self.context.limits}
        return {name: value / (getattr(original, name) or 1) for name, value in values.items()}


def _expected_maximum(drawn: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return E[max] of independent draws = sum_v v * (F(v) - F(v-)), F(v) the product of their P(value <= v).

    Args:
        drawn: Values and probabilities of each draw.
    """
    values = torch.cat([each for each, _ in drawn]).unique()
    below = torch.stack([(p[:, None] * (each[:, None] <= values)).sum(0) for each, p in drawn]).prod(0)
    return (values * torch.diff(below, prepend=below.new_zeros(1))).sum()


@dataclass(frozen=True, eq=False)
class Derived:
    """An architecture within the budget.

    Attributes:
        widths: (axes,) widths of every prunable axis.
        removed_blocks: Names of the removed blocks.
    """

    widths: IntArray
    removed_blocks: tuple[str, ...]


def derive(context: SearchContext, candidates: WidthCandidates, widths: FloatArray, depths: FloatArray) -> Derived:
    """Return the most likely architecture, changed as little as it takes to fill the budget.

    Depths come first, from the most likely ones. While not even the smallest widths fit the budget, one chain becomes
    shallower: the one whose step loses the least likelihood per unit of cost that it saves. While even whole widths
    would not fill the budget, one chain becomes deeper in the same way, if one fits. Then `widen_to_budget` takes as
    many steps of the widths as fit, those up to the most likely widths first, in the order of P(width <= w), w the
    width before the step; steps beyond them follow in the same order. Axes with one candidate stay whole.

    Args:
        context: Costs, limits and allowed widths.
        candidates: The candidates that the probabilities are of.
        widths: (axes with a choice, candidates) probabilities.
        depths: (chains with a choice, candidates) probabilities.

    Raises:
        BudgetError: If nothing fits the budget.
    """
    smallest = context.costs.sizes.copy()
    smallest[candidates.axes] = candidates.widths[:, 0]
    blocks = _Blocks(context, candidates, depths, smallest)
    # Depths first: how many blocks there are decides what a channel costs.
    removed = blocks.removed()
    if not len(candidates.axes):
        return Derived(context.costs.sizes.copy(), removed)
    inner = replace(context, costs=context.costs.without(removed))
    searched = set(candidates.axes.tolist())
    levels = [each if axis in searched else each[-1:] for axis, each in enumerate(context.levels)]
    found = widen_to_budget(inner, _keys(levels, candidates, widths), levels).widths
    return Derived(context.streams.fitted(found[None])[0], removed)


def _keys(all_levels: Sequence[IntArray], candidates: WidthCandidates, p: FloatArray) -> list[FloatArray]:
    """Return when to take each step of each axis, see `derive`. Steps up to the smallest candidate come first."""
    row = {axis: number for number, axis in enumerate(candidates.axes.tolist())}
    keys: list[FloatArray] = []
    for axis, levels in enumerate(all_levels):
        if axis not in row:
            keys.append(np.zeros(0))
            continue
        mine, likely = candidates.widths[row[axis]], p[row[axis]]
        # P(width <= w) is small where a wider width is likely: such a step is taken early. It lies in [0, 1], so that
        # -1 comes before all of these steps, and 1 more comes after them.
        at_most = (likely[None, :] * (mine[None, :] <= levels[:-1, None])).sum(axis=1)
        beyond = levels[1:] > mine[likely.argmax()]
        keys.append(np.where(levels[1:] <= mine[0], -1.0, at_most + beyond))
    return keys


class _Blocks:
    """The choice of depths in `derive`, as candidate numbers, with every axis at its smallest width or whole."""

    def __init__(self, context: SearchContext, candidates: WidthCandidates, p: FloatArray, widths: IntArray):
        self._problem, self._candidates, self._p, self._widths = context, candidates, p, widths
        self._last = [int(row.sum()) - 1 for row in candidates.open_depths]

    def removed(self) -> tuple[str, ...]:
        """Return the names of the blocks to remove."""
        # The argmax alone may exceed the budget or leave half of it unused, so it is only where the choice begins.
        now = [int(row.argmax()) for row in self._p]
        while self._cost(now) > 1:
            options = [self._moved(now, chain, -1) for chain, number in enumerate(now) if number > 0]
            if not options:
                raise BudgetError(
                    f"`budget` must be within reach; got {self._problem.budget}. Raise it, or allow smaller widths."
                )
            now = min(options, key=lambda option: self._regret(now, option))
        while self._cost(now, whole=True) < PROMISED:
            options = [self._moved(now, chain, 1) for chain, number in enumerate(now) if number < self._last[chain]]
            options = [option for option in options if self._cost(option) <= 1]
            if not options:
                break
            now = min(options, key=lambda option: self._regret(now, option))
        return self._names(now)

    def _moved(self, now: Sequence[int], chain: int, step: int) -> list[int]:
        return [number + step * (place == chain) for place, number in enumerate(now)]

    def _regret(self, now: Sequence[int], then: Sequence[int]) -> float:
        """Return the loss of log likelihood per unit of utilization."""
        change = abs(self._cost(now) - self._cost(then))
        return (self._likelihood(now) - self._likelihood(then)) / max(change, 1e-12)

    def _likelihood(self, now: Sequence[int]) -> float:
        return float(sum(np.log(max(self._p[chain, number], 1e-300)) for chain, number in enumerate(now)))

    def _cost(self, now: Sequence[int], *, whole: bool = False) -> float:
        """Return the utilization of the budget."""
        costs = self._problem.costs.without(self._names(now))
        widths = costs.sizes if whole else self._widths
        return float(replace(self._problem, costs=costs).utilization(widths[None])[0])

    def _names(self, now: Sequence[int]) -> tuple[str, ...]:
        chains = self._problem.inputs.graph.chains
        picked = zip(self._candidates.chains.tolist(), now, strict=True)
        kept = ((chains[chain], int(self._candidates.depths[row, n])) for row, (chain, n) in enumerate(picked))
        return tuple(sorted(block.name for chain, depth in kept for block in chain[depth:]))
