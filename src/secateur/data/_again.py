"""Memory of batches that is used again as soon as nobody has them any more."""

import sys

import numpy as np

_KEPT = 3
"""Batches whose memory is kept: one that is trained on, one that is made, and the shorter last one."""


class Floats:
    """Arrays of floats for one batch after the other.

    New memory is cleared by the system, page by page, when it is first written; for a batch of 64 images of 224 x 224
    pixels that takes as long as normalising them. A tensor made by ``torch.from_numpy``, and every view of it, holds a
    reference to the array, so an array with no reference but ours is free.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._idle = 0

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array that nobody else has, float32, of any content."""
        for at in range(len(self._arrays)):
            if self._references(at) == self._idle and self._arrays[at].shape == shape:
                return self._arrays[at]
        if len(self._arrays) >= _KEPT:
            return np.empty(shape, np.float32)
        self._arrays.append(np.empty(shape, np.float32))
        # Counted, not known: what the call itself adds differs between versions of Python.
        self._idle = self._references(-1)
        return self._arrays[-1]

    def _references(self, at: int) -> int:
        return sys.getrefcount(self._arrays[at])
