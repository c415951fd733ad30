"""How much of the variance of an axis its leading principal components explain."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from secateur.search._problem import FloatArray


class Matrix(ABC):
    """Which matrix of the variables is analysed: diag(s) C diag(s), C their covariance matrix."""

    @abstractmethod
    def scales(self, variances: FloatArray) -> FloatArray:
        """(variables,) s from the (variables,) diagonal of C."""


@dataclass(frozen=True)
class Covariance(Matrix):
    """The covariance matrix itself, s = 1: a filter with larger weights has more variance to explain."""

    def scales(self, variances: FloatArray) -> FloatArray:
        """Ones."""
        return np.ones_like(variances)


@dataclass(frozen=True)
class Correlation(Matrix):
    """The correlation matrix, s = 1 / standard deviation: all filters count alike, whatever their scale.

    A variable without variance has no correlation and counts nothing.
    """

    def scales(self, variances: FloatArray) -> FloatArray:
        """1 / sqrt(variance), or 0 where there is none."""
        positive = variances > 0
        return np.where(positive, 1 / np.sqrt(np.where(positive, variances, 1.0)), 0.0)


def eigenvalues_of_rows(rows: FloatArray, matrix: Matrix) -> FloatArray:
    """Eigenvalues of the matrix of (variables, samples) data, up to a common factor; at most min(n, d) of them."""
    centred = rows - rows.mean(axis=1, keepdims=True)
    centred = centred * matrix.scales(np.einsum("nd,nd->n", centred, centred))[:, None]
    # The smaller Gram matrix has the same non-zero eigenvalues.
    data = torch.from_numpy(centred)
    with _one_thread():
        gram = data @ data.T if len(data) <= data.shape[1] else data.T @ data
        return np.asarray(torch.linalg.eigvalsh(gram).numpy(), dtype=np.float64)


def eigenvalues_of_covariance(covariance: FloatArray, matrix: Matrix) -> FloatArray:
    """Eigenvalues of the matrix of (variables, variables) covariances."""
    scales = matrix.scales(np.diagonal(covariance))
    with _one_thread():
        return np.asarray(torch.linalg.eigvalsh(torch.from_numpy(covariance * scales * scales[:, None])), np.float64)


def unexplained_variance(eigenvalues: FloatArray, size: int, rank: int) -> FloatArray:
    """1 - CCR(i): the share of the variance that i of ``size`` components leave unexplained.

    The cumulative contribution rate is CCR(i) = sum_{j <= i} l_j / sum_j l_j over eigenvalues l_1 >= l_2 >= ...

    The shape of the data caps the number of non-zero eigenvalues at ``rank``, often below ``size`` (27 weights of a
    3 x 3 RGB filter give 64 filters a centred rank of 26). CCR would be 1 from there on, and the layer could never keep
    its other filters. So the spectrum is stretched: CCR(i) is read at the component i * rank / size, linear between
    whole components. CCR then reaches 1 at i = size and nowhere before, unless eigenvalues below the cap are zero.
    Without any variance there is nothing to go by, and CCR(i) = i / size.

    Args:
        eigenvalues: In any order; small negative ones are rounding errors and count as zero.
        size: Channels of the axis.
        rank: Most eigenvalues that can be non-zero.

    Returns:
        (size + 1,) from 1 (no component) down to 0 (all), float64. Kept as what is unexplained, because near CCR = 1
        a float has no digits left for the difference.
    """
    largest = np.maximum(np.sort(eigenvalues)[::-1][: max(min(rank, size), 0)], 0)
    total = largest.sum()
    if not total > 0:
        return 1 - np.arange(size + 1) / size
    rest = np.append(np.cumsum(largest[::-1])[::-1], 0) / total
    unexplained = np.interp(np.arange(size + 1) * (len(largest) / size), np.arange(len(rest)), rest)
    unexplained[0], unexplained[-1] = 1, 0
    return unexplained


def pooled(spectra: Sequence[FloatArray]) -> FloatArray:
    """The unexplained variance of an axis with several producers: the mean over them, (size + 1,).

    Each producer's variance counts as 1, since their scales do not compare. Averaging CCR is pooling the normalised
    spectra component by component.
    """
    return np.mean(np.stack(spectra), axis=0)


@contextmanager
def _one_thread() -> Generator[None]:
    """One thread for torch, as before afterwards.

    Eigenvalues take many small steps in which threads wait for each other. On a busy machine with two cores, a
    512 x 512 matrix took 10 s with two threads and 0.03 s with one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
