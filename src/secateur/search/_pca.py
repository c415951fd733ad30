"""Widths from principal components: 3AS."""

from dataclasses import dataclass, field

import numpy as np

from secateur.importance import L2, Importance
from secateur.search._fit import fit
from secateur.search._problem import Problem, Proposal, Strategy, keep_best
from secateur.search._sources import Source, Weights


@dataclass(frozen=True)
class PCASlimming(Strategy):
    """Each axis keeps as many channels as it takes principal components to explain a share tau of its variance.

    With the eigenvalues l_1 >= ... >= l_N of an axis and CCR(i) = sum_{j <= i} l_j / sum_j l_j:

        width = min { i : CCR(i) >= tau },  rounded up to an allowed width.

    One tau serves the whole network and is the largest one within the budget. Widths change only where tau passes
    some CCR(i), so tau is bisected over these values, which is exact; the room that is left then goes to the axes in
    the order in which a growing tau would widen them.

    How many channels stay comes from the components; which ones, from the importance.

    An axis of N channels whose spectrum is shorter than N (the rank cap) can still keep them all, see
    `unexplained_variance`; an axis with several producers (a residual stream) averages their normalised spectra.

    Attributes:
        source: What the components are taken of.
        importance: Which channels stay.

    References:
        Wang et al. (3AS), arXiv:2202.10461: CCR and one pass without search. The paper's text could not be read in
        full: one tau for all layers, its bisection, pooling and the treatment of the rank cap are ours.
    """

    source: Source = field(default_factory=Weights)
    importance: Importance = field(default_factory=L2)

    def find(self, problem: Problem) -> Proposal:
        """Notes: ``tau``, and ``explained``: CCR at the width of each axis."""
        problem.progress(0.0, "principal components")
        rest = self.source.unexplained(problem.evidence)
        axes = problem.costs.axes
        # The step from one allowed width to the next is taken when tau exceeds CCR at the former: in the order of CCR,
        # which is the order of -(1 - CCR).
        keys = [-rest[name][levels[:-1]] for name, levels in zip(axes, problem.levels, strict=True)]
        found = fit(problem, keys)
        problem.progress(0.5, "importance")
        scores = problem.scores(self.importance)
        explained = {name: 1 - float(rest[name][width]) for name, width in zip(axes, found.widths, strict=True)}
        tau = 1 + float(np.minimum(found.threshold, 0))
        return Proposal(keep_best(problem, found.widths, scores), {"tau": tau, "explained": explained})
