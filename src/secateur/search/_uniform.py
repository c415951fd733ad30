"""The same fraction of every layer: the baseline."""

from dataclasses import dataclass, field

from secateur.importance import L2, Importance
from secateur.search._fit import fit
from secateur.search._problem import Problem, Proposal, Strategy, keep_best


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

    def find(self, problem: Problem) -> Proposal:
        """Notes: ``kept_fraction``, the f at which the next axis would overrun the budget."""
        found = fit(problem, [levels[1:] / levels[-1] for levels in problem.levels])
        scores = problem.scores(self.importance)
        return Proposal(keep_best(problem, found.widths, scores), {"kept_fraction": min(found.threshold, 1.0)})
