"""Batches of bytes that threads fill while earlier ones are in use."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_BATCHES_AHEAD = 2
_AT_ONCE = 4
"""Images of one task. Handing a task over takes some hundredths of a millisecond under the interpreter's lock."""

Fill = Callable[[int, np.ndarray], None]
"""Writes image i into its (h, w, c) place."""


def filled_ahead(
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
