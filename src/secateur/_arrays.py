"""Which ids are one: connected components of the ties, vectorized."""

from collections.abc import Sequence
from typing import Any

import numpy as np

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def unique_values(values: IntArray) -> IntArray:
    """The different numbers in a vector, increasing.

    As `numpy.unique`, which imports `numpy.ma` when it is first called: longer than a small network takes to trace.
    """
    ordered = np.sort(values)
    return ordered[run_starts(ordered)]


def unique_rows(matrix: IntArray) -> IntArray:
    """The different rows of a matrix with at least one, in lexicographic order."""
    ordered = matrix[np.lexsort(matrix.T[::-1])]
    return ordered[np.append(0, np.flatnonzero((ordered[1:] != ordered[:-1]).any(1)) + 1)]


def run_starts(ordered: np.ndarray[tuple[int, ...], Any]) -> IntArray:
    """Where the runs of equal numbers in a vector begin."""
    return np.append(np.arange(min(len(ordered), 1)), np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)


def connected_components(count: int, ties: Sequence[tuple[IntArray, IntArray]]) -> IntArray:
    """The smallest id of the component of every id.

    Hooking and pointer jumping: every round, each tie pulls the larger root to the smaller one, then paths are
    halved until flat. Rounds grow with the logarithm of the longest chain.

    Args:
        count: Number of ids.
        ties: Pairs of equally long vectors; positions belong together.

    Returns:
        (count,) representative of each id.
    """
    parent = np.arange(count, dtype=np.int64)
    if not ties:
        return parent
    left = np.concatenate([first for first, _ in ties])
    right = np.concatenate([second for _, second in ties])
    while True:
        a, b = parent[left], parent[right]
        apart = a != b
        if not apart.any():
            return parent
        left, right = left[apart], right[apart]
        low, high = np.minimum(a[apart], b[apart]), np.maximum(a[apart], b[apart])
        np.minimum.at(parent, high, low)
        _flatten(parent)


def _flatten(parent: IntArray) -> None:
    while True:
        above = parent[parent]
        if np.array_equal(above, parent):
            return
        parent[:] = above
