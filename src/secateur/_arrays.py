"""Types of numpy arrays, and vectorized operations on arrays of ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


def unique_values(values: IntArray) -> IntArray:
    """Return the distinct numbers of a vector in increasing order.

    `numpy.unique` does the same, but imports `numpy.ma` at its first call, which takes longer than tracing a small
    network.
    """
    ordered = np.sort(values)
    return ordered[run_starts(ordered)]


def unique_rows(matrix: IntArray) -> IntArray:
    """Return the distinct rows of a matrix, which must have at least one, in lexicographic order."""
    ordered = matrix[np.lexsort(matrix.T[::-1])]
    return ordered[np.append(0, np.flatnonzero((ordered[1:] != ordered[:-1]).any(1)) + 1)]


def run_starts(ordered: np.ndarray[tuple[int, ...], Any]) -> IntArray:
    """Return the positions at which the runs of equal numbers in a vector begin."""
    return np.append(np.arange(min(len(ordered), 1)), np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)


def connected_components(count: int, ties: Sequence[tuple[IntArray, IntArray]]) -> IntArray:
    """Return the smallest id of the connected component of every id.

    The algorithm is hooking and pointer jumping: in every round, each tie attaches the larger root to the smaller one,
    and paths are halved until they are flat. The number of rounds is logarithmic in the longest chain.

    Args:
        count: The number of ids, which are 0 to count - 1.
        ties: Pairs of equally long vectors of ids; ids at the same position are connected.

    Returns:
        (count,) the representative of each id.
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
