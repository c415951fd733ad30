"""Memory of batches that is used again as soon as nobody has them any more.

Batches of bytes that threads fill while earlier ones are in use."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_KEPT = 3
"""Batches whose memory is kept: one that is trained on, one that is made, and the shorter last one."""


class BufferPool:
    """Arrays of floats for one batch after the other.

    New memory is cleared by the system, page by page, when it is first written; for a batch of 64 images of 224 x 224
    pixels that takes as long as normalizing them. A tensor made by ``torch.from_numpy``, and every view of it, holds a
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


_BATCHES_AHEAD = 2
_AT_ONCE = 4
"""Images of one task. Handing a task over takes some hundredths of a millisecond under the interpreter's lock."""

Fill = Callable[[int, np.ndarray], None]
"""Writes image i into its (h, w, c) place."""


def prefetch(
    batches: Iterable[tuple[int, Tensor]], shape: tuple[int, int, int], fill: Fill, threads: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Batches with their number, their positions and their (n, h, w, c) uint8 pixels.

    The pixels' memory is used again for a later batch: what is kept of it must be copied before the next one is taken.

    Args:
        batches: Numbers and (n,) positions, on the CPU.
        shape: Height, width, channels of an image.
        fill: Called once per position, in any order, by any thread. What it raises is raised here, at its batch.
        threads: That fill.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[int, Tensor, Tensor, list[Future[None]]]] = deque()
    free: deque[Tensor] = deque()
    try:
        for number, index in batches:
            # Memory that is new to the process is cleared by the system first, which takes as long as a copy.
            fits = free and len(free[0]) >= len(index)
            pixels = free.popleft()[: len(index)] if fits else torch.empty((len(index), *shape), dtype=torch.uint8)
            places = list(zip(index.tolist(), pixels.numpy(), strict=True))
            parts = (places[at : at + _AT_ONCE] for at in range(0, len(places), _AT_ONCE))
            futures = [pool.submit(_fill_all, fill, part) for part in parts]
            waiting.append((number, index, pixels, futures))
            if len(waiting) > _BATCHES_AHEAD:
                done = waiting.popleft()
                yield _done(*done)
                free.append(done[2])
        while waiting:
            yield _done(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _fill_all(fill: Fill, places: Sequence[tuple[int, np.ndarray]]) -> None:
    for i, place in places:
        fill(i, place)


def _done(number: int, index: Tensor, pixels: Tensor, futures: list[Future[None]]) -> tuple[int, Tensor, Tensor]:
    for future in futures:
        future.result()
    return number, index, pixels
