"""Strategies that add channels in the order of their importance until the budget is full."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from secateur._arrays import FloatArray, IntArray
from secateur._kinds import settings
from secateur.cost.latency_model import LatencyModel
from secateur.search.base import Proposal, SearchContext, Strategy, keep_best
from secateur.search.importance import L2, Importance, checked_scores
from secateur.search.importance_data import Reconstruction

FULL_ENOUGH = 0.995
"""Filling stops here. Going on would only widen the layers whose channels cost next to nothing."""
PROMISED = 0.99
"""Below this utilization widths are exchanged between axes: a search lands at most 1 % under its budget."""
_NEARBY = 200_000
"""Most architectures that are tried around one that leaves the budget emptier than promised; a second."""


@dataclass(frozen=True, eq=False)
class Fit:
    """Widths that fill a budget.

    Attributes:
        widths: (axes,) allowed widths within the budget.
        threshold: Key of the first step the budget has no room for; infinity if it has room for all.
        utilization: Largest cost / limit, at most 1.
    """

    widths: IntArray
    threshold: float
    utilization: float


def widen_to_budget(
    context: SearchContext, keys: Sequence[FloatArray], levels: Sequence[IntArray] | None = None
) -> Fit:
    """Widen the smallest architecture in the order of the keys until the budget is full.

    A step takes one axis from one allowed width to the next. All steps of all axes are sorted by key (ties: steps
    of lower number, then axes of lower number). The result is

    1. the longest prefix of the steps within the budget. The family of prefixes is monotone, so it is bisected;
       with keys that grow with a threshold t, this is the largest t within the budget, found exactly;
    2. the steps after it, still in order, that fit the room that is left. A step that does not fit never will, since
       costs only grow, so its axis is finished;
    3. if the budget is then less than 99 % full (the steps are coarse), the nearest architecture, in steps, that fills
       it to 99 %: among all those within r steps on every axis, for the largest r with up to 200,000 of them. A space
       with that few architectures is thus searched completely;
    4. if there is none, one step down of an axis against one step up of another, as long as that fills it better,
       and then 3 again from there.

    Args:
        context: Levels, costs and limits.
        keys: For each axis: (steps,) when to take its steps, lowest first; made non-decreasing if it is not.
        levels: For each axis: (steps + 1,) the widths to choose from, ascending; None means all that the space allows.

    Returns:
        Allowed widths within the budget that fill it to at least 99 % if any within reach of 3 and 4 do; no single
        step more fits, unless they do.
    """
    ladder = _Ladder.of(context, keys, context.levels if levels is None else levels)
    counts, threshold = ladder.climb()
    counts = ladder.nearest(ladder.exchange(ladder.nearest(counts)))
    return Fit(ladder.widths(counts[None])[0], threshold, ladder.utilization(counts))


def step_values(scores: FloatArray, levels: IntArray) -> FloatArray:
    """Mean score of the channels that each step of an axis adds: the channels of a step stay or go together.

    Args:
        scores: (size,) of the channels; the best are kept first.
        levels: (steps + 1,) allowed widths, ascending, the last one the size.

    Returns:
        (steps,) non-increasing; empty for an axis with a single width.
    """
    best_first = np.sort(scores)[::-1]
    sums = np.add.reduceat(best_first, levels[:-1]) if len(levels) > 1 else np.zeros(0)
    return sums / np.diff(levels)


@dataclass(frozen=True, eq=False)
class _Ladder:
    """All single steps of all axes in the order in which they are wanted. ``counts`` are steps taken per axis.

    Attributes:
        context: What is to be fitted.
        levels: (axes, most levels) allowed widths, the last one repeated.
        tops: (axes,) number of steps of each axis.
        axes: (steps,) the axis of each step, in order.
        keys: (steps,) non-decreasing.
    """

    context: SearchContext
    levels: IntArray
    tops: IntArray
    axes: IntArray
    keys: FloatArray

    @classmethod
    def of(cls, context: SearchContext, keys: Sequence[FloatArray], rows: Sequence[IntArray]) -> "_Ladder":
        tops = np.array([len(row) - 1 for row in rows], dtype=np.int64)
        levels = np.stack([np.pad(row, (0, tops.max() + 1 - len(row)), mode="edge") for row in rows])
        axes = np.repeat(np.arange(len(tops)), tops)
        numbers = np.concatenate([np.arange(top) for top in tops])
        flat = np.concatenate([np.maximum.accumulate(row) if len(row) else row for row in keys])
        assert len(flat) == len(axes), "one key per step"
        order = np.lexsort((axes, numbers, flat))
        return cls(context, levels, tops, axes[order], flat[order])

    def widths(self, counts: IntArray) -> IntArray:
        """(n, axes) widths after (n, axes) steps."""
        return self.levels[np.arange(len(self.tops)), counts]

    def utilization(self, counts: IntArray) -> float:
        """Of one architecture, (axes,) steps."""
        return float(self.context.utilization(self.widths(counts[None]))[0])

    def climb(self) -> tuple[IntArray, float]:
        """Steps taken in order while they fit, and the key of the first that did not."""
        counts = np.zeros(len(self.tops), dtype=np.int64)
        taken = self._longest(counts, self.axes, 1.0)
        threshold = float(self.keys[taken]) if taken < len(self.keys) else np.inf
        rest = self.axes
        while True:
            counts = self._after(counts, rest, taken)
            if taken == len(rest) or self.utilization(counts) >= FULL_ENOUGH:
                return counts, threshold
            finished = rest[taken]
            rest = rest[taken + 1 :]
            rest = rest[rest != finished]
            # As far as the budget is full enough, but never over it.
            enough = self._longest(counts, rest, FULL_ENOUGH) + 1
            taken = min(enough, self._longest(counts, rest, 1.0))
            if self.utilization(self._after(counts, rest, taken)) > 1:
                taken = enough - 1  # Times go down too: between two prefixes that fit there may be one that does not.

    def _after(self, counts: IntArray, axes: IntArray, taken: int) -> IntArray:
        return counts + np.bincount(axes[:taken], minlength=len(counts))

    def _longest(self, counts: IntArray, axes: IntArray, bound: float) -> int:
        """Most of the steps ``axes`` that can follow ``counts`` with a utilization up to ``bound``, by bisection."""
        low, high = 0, len(axes)
        while low < high:
            middle = (low + high + 1) // 2
            if self.utilization(self._after(counts, axes, middle)) <= bound:
                low = middle
            else:
                high = middle - 1
        return low

    def nearest(self, counts: IntArray) -> IntArray:
        """The nearest steps that fill the budget as promised, or the same ones if these do or none nearby do."""
        if self.utilization(counts) >= PROMISED:
            return counts
        radius = 1
        while True:
            low, high = np.maximum(counts - radius, 0), np.minimum(counts + radius, self.tops)
            if np.prod((high - low + 1).astype(np.float64)) > _NEARBY:
                return counts
            ranges = [np.arange(first, last + 1) for first, last in zip(low, high, strict=True)]
            candidates = np.stack(np.meshgrid(*ranges, indexing="ij"), axis=-1).reshape(-1, len(counts))
            full = self.context.utilization(self.widths(candidates))
            good = np.flatnonzero((full >= PROMISED) & (full <= 1))
            if len(good):
                steps = np.abs(candidates[good] - counts).sum(axis=1)
                return candidates[good[np.lexsort((-full[good], steps))[0]]]
            if (low == 0).all() and (high == self.tops).all():
                return counts
            radius += 1

    def exchange(self, counts: IntArray) -> IntArray:
        """One step down against one step up while the budget is emptier than promised and that fills it better."""
        now = self.utilization(counts)
        while now < PROMISED:
            better, value = self._best_neighbor(counts)
            if value <= now:
                break
            counts, now = better, value
        return counts

    def _best_neighbor(self, counts: IntArray) -> tuple[IntArray, float]:
        """The fullest architecture within the budget that is one step up, or one down and one up, from here."""
        ups = np.eye(len(counts), dtype=np.int64)[counts < self.tops]
        downs = [np.zeros_like(counts), *np.eye(len(counts), dtype=np.int64)[counts > 0]]
        best, value = counts, 0.0
        for down in downs:
            candidates = counts + ups - down
            # An axis that goes down and up stays; it is harmless, being no better than now.
            full = self.context.utilization(self.widths(candidates)) if len(ups) else np.zeros(0)
            full = np.where(full <= 1, full, 0)
            if len(full) and full.max() > value:
                best, value = candidates[full.argmax()], float(full.max())
        return best, value


@settings
class Knapsack(Strategy):
    """Keep the channels that are worth most for the budget they use.

    Greedy knapsack: with s the importance of a channel and p the share of the budget that one channel of its axis
    costs in the full network, channels are kept in order of s / p. Sensible for importances in one unit across axes,
    such as `Reconstruction` (squared logits) or `Taylor` (nats). With divisors above 1, the channels between two
    allowed widths stay or go together.

    Attributes:
        importance: What a channel is worth.

    References:
        Dantzig, Discrete-variable extremum problems, 1957 (ratio order); for channels: Shen et al. (HALP),
        arXiv:2110.10811, Section 3.2, who solve the knapsack by dynamic programming.
    """

    importance: Importance = field(default_factory=Reconstruction)

    def find(self, context: SearchContext) -> Proposal:
        """Notes: ``threshold``, the worth per budget under which channels go; None if all of them stay."""
        scores = context.scores(self.importance)
        axes = zip(context.costs.axes, context.levels, _prices(context), strict=True)
        keys = [-step_values(scores[name], levels) / price for name, levels, price in axes]
        found = widen_to_budget(context, keys)
        return Proposal(keep_best(context, found.widths, scores), {"threshold": -found.threshold})


def _prices(context: SearchContext) -> FloatArray:
    """(axes,) share of the budget that the last channel of each axis costs in the full network.

    Times go in steps of many channels, up and down: where they are limited it is the mean over all the channels that
    the space lets go.
    """
    full = np.array([levels[-1] for levels in context.levels], dtype=np.int64)
    least = np.array([levels[0] for levels in context.levels], dtype=np.int64)
    gone = np.maximum(full - least, 1) if LatencyModel.field in context.limits else np.ones_like(full)
    fewer = np.tile(full, (len(full), 1)) - np.diag(gone)
    spared = context.utilization(full[None])[0] - context.utilization(fewer)
    return np.maximum(spared / gone, 1e-12)


Normalizer = Callable[[FloatArray], FloatArray]


def as_scored(scores: FloatArray) -> FloatArray:
    """s: for importances that compare across axes by themselves (Taylor, LAMP, BatchNormScale)."""
    return scores


def by_axis_mean(scores: FloatArray) -> FloatArray:
    """s / mean(s): an average channel of every axis is worth 1. Scores that are all zero stay zero."""
    return _divided(scores, float(scores.mean()))


def by_axis_max(scores: FloatArray) -> FloatArray:
    """s / max(s): the best channel of every axis is worth 1. Scores that are all zero stay zero."""
    return _divided(scores, float(scores.max()))


def by_axis_norm(scores: FloatArray) -> FloatArray:
    """s / ||s||_2: Molchanov et al., arXiv:1611.06440, Section 2.2 (layer-wise l2). All zero stay zero."""
    return _divided(scores, float(np.linalg.norm(scores)))


def by_axis_rank(scores: FloatArray) -> FloatArray:
    """(number of channels with a lower score) / size: only the order within an axis counts."""
    return np.searchsorted(np.sort(scores), scores) / len(scores)


@settings
class GlobalImportance(Strategy):
    """Rank the channels of all axes together and keep the best that fit the budget.

    With divisors above 1, the channels between two allowed widths stay or go together and rank by their mean score.

    Attributes:
        importance: Which channels matter; they are ranked within and across axes.
        normalize: Makes the scores of different axes comparable: (size,) to (size,), order-preserving.

    References:
        Molchanov et al., arXiv:1611.06440; Liu et al., arXiv:1708.06519 (one threshold for all layers).
    """

    importance: Importance = field(default_factory=L2)
    normalize: Normalizer = by_axis_mean

    def find(self, context: SearchContext) -> Proposal:
        """Notes: ``threshold``, the normalized score under which channels go."""
        raw = context.scores(self.importance)
        graph = context.inputs.graph
        scores = checked_scores({name: self.normalize(values) for name, values in raw.items()}, graph, self.normalize)
        axes = zip(context.costs.axes, context.levels, strict=True)
        keys = [-step_values(scores[name], levels) for name, levels in axes]
        found = widen_to_budget(context, keys)
        # Rank within an axis by the raw scores: normalizing may have made ties of what was not equal.
        return Proposal(keep_best(context, found.widths, raw), {"threshold": -found.threshold})


def _divided(scores: FloatArray, by: float) -> FloatArray:
    return scores / by if by > 0 else scores


@settings
class Uniform(Strategy):
    """Keep the same fraction f of every axis: width = the largest allowed width up to f * size.

    f is the largest one within the budget; the room that rounding leaves goes to the axes whose next width is the
    smallest part of their size.

    Attributes:
        importance: Which channels stay.

    References:
        The "uniform" baseline of the pruning literature, such as Liu et al., arXiv:1810.05270, Section 4.
    """

    importance: Importance = field(default_factory=L2)

    def find(self, context: SearchContext) -> Proposal:
        """Notes: ``kept_fraction``, the f at which the next axis would overrun the budget."""
        found = widen_to_budget(context, [levels[1:] / levels[-1] for levels in context.levels])
        scores = context.scores(self.importance)
        return Proposal(keep_best(context, found.widths, scores), {"kept_fraction": min(found.threshold, 1.0)})
