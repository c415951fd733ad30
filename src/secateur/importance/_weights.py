"""Importances that read nothing but weights."""

from dataclasses import dataclass

import numpy as np

from secateur.importance._base import Evidence, FloatArray, Importance, checked_scores
from secateur.importance._filters import mean_over_producers


@dataclass(frozen=True)
class L1(Importance):
    """Sum of the absolute weights of a filter: s_c = sum_d |W[c, d]|.

    W is (channels, weights per channel). On a coupled axis, the mean of s over its producers: a producer with larger
    weights has more to say, as its channels contribute more to the sum that couples them.

    References:
        Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710, Section 3.1.
    """

    def scores(self, evidence: Evidence) -> dict[str, FloatArray]:
        """(axis size,) per axis, in units of the weights. Raises ModelError for weights that are not finite."""
        scores = mean_over_producers(evidence, lambda rows: np.abs(rows).sum(axis=1))
        return checked_scores(scores, evidence.graph, self)


@dataclass(frozen=True)
class L2(Importance):
    """Euclidean norm of a filter: s_c = sqrt(sum_d W[c, d]^2).

    W is (channels, weights per channel). On a coupled axis, the mean of s over its producers.

    References:
        He et al., Soft Filter Pruning, arXiv:1808.06866, Section 3 (the p-norm with p = 2).
    """

    def scores(self, evidence: Evidence) -> dict[str, FloatArray]:
        """(axis size,) per axis, in units of the weights. Raises ModelError for weights that are not finite."""
        return checked_scores(mean_over_producers(evidence, norms), evidence.graph, self)


@dataclass(frozen=True)
class GeometricMedian(Importance):
    """Distance of a filter to all filters of its layer: s_c = sum_j ||W[c] - W[j]||_2 (FPGM).

    A filter with a small sum lies near the geometric median of the layer and is the most replaceable by the others,
    however large its norm. All pairs are computed, in float64. On a coupled axis, the mean of s over its producers.

    References:
        He et al., Filter Pruning via Geometric Median, arXiv:1811.00250, Section 3 (not at
        hand here, so the equation has no number).
    """

    def scores(self, evidence: Evidence) -> dict[str, FloatArray]:
        """(axis size,) per axis, in units of the weights. Raises ModelError for weights that are not finite."""
        return checked_scores(mean_over_producers(evidence, distance_sums), evidence.graph, self)


@dataclass(frozen=True)
class LAMP(Importance):
    """Share of a channel's energy among the channels of its layer that are at least as strong.

    With e_c = sum_d W[c, d]^2:  s_c = e_c / sum of e_j over every j that is not weaker than c (c included). Equal
    energies are ordered by channel number. The strongest channel scores 1, so scores compare across layers as they
    are: rank globally with `secateur.search.as_scored`. On a coupled axis, the mean of s over its producers.

    References:
        Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, arXiv:2010.07611 (the LAMP score). There
        for single weights; here for whole channels [ours].
    """

    def scores(self, evidence: Evidence) -> dict[str, FloatArray]:
        """(axis size,) per axis, in [0, 1]. Raises ModelError for weights that are not finite."""
        return checked_scores(mean_over_producers(evidence, lamp), evidence.graph, self)


@dataclass(frozen=True)
class RandomImportance(Importance):
    """Uniform random scores in [0, 1): the baseline every criterion must beat.

    They depend on the evidence's seed and the position of the axis in the graph, on nothing else.
    """

    def scores(self, evidence: Evidence) -> dict[str, FloatArray]:
        """(axis size,) per axis, dimensionless."""
        return {
            axis.name: np.random.default_rng([evidence.seed, position]).random(axis.size)
            for position, axis in enumerate(evidence.graph.prunable)
        }


def norms(rows: FloatArray) -> FloatArray:
    """(channels,) Euclidean norm of each row of (channels, d)."""
    return np.sqrt(np.einsum("cd,cd->c", rows, rows))


def distance_sums(rows: FloatArray) -> FloatArray:
    """(channels,) sum of the Euclidean distances of each row of (channels, d) to every row.

    ||a - b||^2 = a.a + b.b - 2 a.b, one matrix product for all pairs. Rows are centred first: distances stay and the
    cancellation shrinks to a relative 1e-8 of the spread of the rows in the worst case (equal rows).
    """
    centred = rows - rows.mean(axis=0)
    gram = centred @ centred.T
    squares = np.diagonal(gram)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0)
    np.fill_diagonal(distances, 0)
    return np.sqrt(distances).sum(axis=1)


def lamp(rows: FloatArray) -> FloatArray:
    """(channels,) LAMP score of each row of (channels, d); rows of zeros score 0."""
    energy = np.einsum("cd,cd->c", rows, rows)
    order = np.argsort(energy, kind="stable")
    ascending = energy[order]
    at_least = np.cumsum(ascending[::-1])[::-1]
    scores = np.empty_like(energy)
    scores[order] = np.divide(ascending, at_least, out=np.zeros_like(ascending), where=at_least != 0)
    return scores
