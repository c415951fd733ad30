"""From probabilities to an architecture that fills the budget and is never over it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from secateur.errors import BudgetError
from secateur.search._fit import PROMISED, fit
from secateur.search._problem import FloatArray, Problem
from secateur.search._tas._candidates import Candidates

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Derived:
    """An architecture within the budget.

    Attributes:
        widths: (axes,) of every prunable axis.
        removed_blocks: Names.
    """

    widths: IntArray
    removed_blocks: tuple[str, ...]


def derive(problem: Problem, candidates: Candidates, widths: FloatArray, depths: FloatArray) -> Derived:
    """The most likely architecture, moved as little as it takes to fill the budget.

    Depths first: those most likely. While nothing within the budget is left of the widths, the step to a shallower
    candidate that costs least likelihood for what it spares is taken; while whole widths would not fill the budget,
    that to a deeper one, if there is one that fits. Then the widths: the steps up to the most likely ones come first,
    the least doubtful before the others; those beyond follow, the most likely first. `fit` takes as many as there is
    room for. The step beyond a width w is in doubt by P(width <= w). Axes without a choice stay whole.

    Args:
        problem: Costs, limits and allowed widths.
        candidates: What the probabilities are of.
        widths: (axes with a choice, candidates) probabilities.
        depths: (chains with a choice, candidates) probabilities.

    Raises:
        BudgetError: If nothing fits the budget.
    """
    smallest = problem.costs.sizes.copy()
    smallest[candidates.axes] = candidates.widths[:, 0]
    blocks = _Blocks(problem, candidates, depths, smallest)
    removed = blocks.removed()
    if not len(candidates.axes):
        return Derived(problem.costs.sizes.copy(), removed)
    inner = replace(problem, costs=problem.costs.without(removed))
    searched = set(candidates.axes.tolist())
    levels = [each if axis in searched else each[-1:] for axis, each in enumerate(problem.levels)]
    found = fit(inner, _keys(levels, candidates, widths), levels).widths
    return Derived(problem.streams.fitted(found[None])[0], removed)


def _keys(all_levels: Sequence[IntArray], candidates: Candidates, p: FloatArray) -> list[FloatArray]:
    """When to take each step of each axis; see `derive`. Steps up to the smallest candidate come first of all."""
    row = {axis: number for number, axis in enumerate(candidates.axes.tolist())}
    keys: list[FloatArray] = []
    for axis, levels in enumerate(all_levels):
        if axis not in row:
            keys.append(np.zeros(0))
            continue
        mine, likely = candidates.widths[row[axis]], p[row[axis]]
        at_most = (likely[None, :] * (mine[None, :] <= levels[:-1, None])).sum(axis=1)
        beyond = levels[1:] > mine[likely.argmax()]
        keys.append(np.where(levels[1:] <= mine[0], -1.0, at_most + beyond))
    return keys


class _Blocks:
    """Depths of the chains, as candidate numbers, and what they cost with every axis at its smallest width or whole."""

    def __init__(self, problem: Problem, candidates: Candidates, p: FloatArray, widths: IntArray):
        self._problem, self._candidates, self._p, self._widths = problem, candidates, p, widths
        self._last = [int(row.sum()) - 1 for row in candidates.open_depths]

    def removed(self) -> tuple[str, ...]:
        """Names of the blocks to remove."""
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
        """Loss of log likelihood for each unit of utilisation."""
        change = abs(self._cost(now) - self._cost(then))
        return (self._likelihood(now) - self._likelihood(then)) / max(change, 1e-12)

    def _likelihood(self, now: Sequence[int]) -> float:
        return float(sum(np.log(max(self._p[chain, number], 1e-300)) for chain, number in enumerate(now)))

    def _cost(self, now: Sequence[int], *, whole: bool = False) -> float:
        """Utilisation."""
        costs = self._problem.costs.without(self._names(now))
        widths = costs.sizes if whole else self._widths
        return float(replace(self._problem, costs=costs).utilisation(widths[None])[0])

    def _names(self, now: Sequence[int]) -> tuple[str, ...]:
        chains = self._problem.evidence.graph.chains
        picked = zip(self._candidates.chains.tolist(), now, strict=True)
        kept = ((chains[chain], int(self._candidates.depths[row, n])) for row, (chain, n) in enumerate(picked))
        return tuple(sorted(block.name for chain, depth in kept for block in chain[depth:]))
