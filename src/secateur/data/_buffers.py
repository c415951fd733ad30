"""Memory that is reused from batch to batch, and threads that fill the next batches while one is in use."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_MAX_BUFFERS = 3
"""Batches whose memory is kept: the one in training, the one being filled, and a shorter last one."""


class BufferPool:
    """Arrays of floats that are reused from batch to batch.

    The system clears new memory page by page when it is first written; for a batch of 64 images of 224 x 224 pixels
    that takes as long as normalizing them. A tensor made by ``torch.from_numpy``, and every view of it, holds a
    reference to the array, so an array to which only the pool refers is free.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._idle = 0

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return a float32 array of arbitrary content that is not in use elsewhere."""
        for at in range(len(self._arrays)):
            if self._references(at) == self._idle and self._arrays[at].shape == shape:
                return self._arrays[at]
        if len(self._arrays) >= _MAX_BUFFERS:
            return np.empty(shape, np.float32)
        self._arrays.append(np.empty(shape, np.float32))
        # Measured, because the references that the call itself adds differ between versions of Python.
        self._idle = self._references(-1)
        return self._arrays[-1]

    def _references(self, at: int) -> int:
        return sys.getrefcount(self._arrays[at])


_BATCHES_AHEAD = 2
_IMAGES_PER_TASK = 4
"""Images per task. Submitting a task takes some hundredths of a millisecond under the interpreter's lock."""

Fill = Callable[[int, np.ndarray], None]
"""Writes image i into its (h, w, c) place in the batch."""


def prefetch(
    batches: Iterable[tuple[int, Tensor]], shape: tuple[int, int, int], fill: Fill, threads: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield batches with their number, their positions and their (n, h, w, c) uint8 pixels, which threads fill ahead.

    The memory of the pixels is reused for a later batch, so copy what you keep before taking the next batch.

    Args:
        batches: Numbers and (n,) positions, on the CPU.
        shape: Height, width, channels of an image.
        fill: Called once per position, in any order, by any thread. What it raises is raised here, at its batch.
        threads: Number of threads.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[int, Tensor, Tensor, list[Future[None]]]] = deque()
    free: deque[Tensor] = deque()
    try:
        for number, index in batches:
            # The system clears new memory first, which takes as long as a copy.
            fits = free and len(free[0]) >= len(index)
            pixels = free.popleft()[: len(index)] if fits else torch.empty((len(index), *shape), dtype=torch.uint8)
            places = list(zip(index.tolist(), pixels.numpy(), strict=True))
            parts = (places[at : at + _IMAGES_PER_TASK] for at in range(0, len(places), _IMAGES_PER_TASK))
            futures = [pool.submit(_fill_all, fill, part) for part in parts]
            waiting.append((number, index, pixels, futures))
            if len(waiting) > _BATCHES_AHEAD:
                done = waiting.popleft()
                yield _wait_for(*done)
                free.append(done[2])
        while waiting:
            yield _wait_for(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _fill_all(fill: Fill, places: Sequence[tuple[int, np.ndarray]]) -> None:
    for i, place in places:
        fill(i, place)


def _wait_for(number: int, index: Tensor, pixels: Tensor, futures: list[Future[None]]) -> tuple[int, Tensor, Tensor]:
    for future in futures:
        future.result()
    return number, index, pixels
