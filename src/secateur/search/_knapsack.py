"""One ranking of all channels, by worth per price."""

from dataclasses import dataclass, field

import numpy as np

from secateur.cost import LatencyModel
from secateur.importance import Importance, Reconstruction
from secateur.search._fit import fit, step_values
from secateur.search._problem import FloatArray, Problem, Proposal, Strategy, keep_best


@dataclass(frozen=True)
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

    def find(self, problem: Problem) -> Proposal:
        """Notes: ``threshold``, the worth per budget under which channels go."""
        scores = problem.scores(self.importance)
        axes = zip(problem.costs.axes, problem.levels, _prices(problem), strict=True)
        keys = [-step_values(scores[name], levels) / price for name, levels, price in axes]
        found = fit(problem, keys)
        return Proposal(keep_best(problem, found.widths, scores), {"threshold": -found.threshold})


def _prices(problem: Problem) -> FloatArray:
    """(axes,) share of the budget that the last channel of each axis costs in the full network.

    Times go in steps of many channels, up and down: where they are limited it is the mean over all the channels that
    the space lets go.
    """
    full = np.array([levels[-1] for levels in problem.levels], dtype=np.int64)
    least = np.array([levels[0] for levels in problem.levels], dtype=np.int64)
    gone = np.maximum(full - least, 1) if LatencyModel.field in problem.limits else np.ones_like(full)
    fewer = np.tile(full, (len(full), 1)) - np.diag(gone)
    spared = problem.utilisation(full[None])[0] - problem.utilisation(fewer)
    return np.maximum(spared / gone, 1e-12)
