"""Strategies that rank channels by importance: globally over the network, or within every layer."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from secateur._arrays import FloatArray
from secateur.search.base import Proposal, SearchContext, Strategy, keep_best
from secateur.search.importance import L2, Importance, checked_scores
from secateur.search.knapsack import step_values, widen_to_budget

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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
