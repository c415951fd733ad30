"""Batch memory is reused, but never while a part of it is in use."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.data import Augment, MemorySplit, Normalization
from secateur.data._buffers import BufferPool

HOLDERS: dict[str, Callable[[Tensor], object]] = {
    "itself": lambda batch: batch,
    "a view": lambda batch: batch[1:2, :, 2:],
    "a view of numpy": lambda batch: batch.numpy()[0],
    "its storage": lambda batch: batch.untyped_storage(),
    "what autograd keeps": lambda batch: (torch.ones(1, requires_grad=True) * batch.detach()).sum(),
}


def address(batch: Tensor) -> int:
    return batch.untyped_storage().data_ptr()


def made(floats: BufferPool, n: int = 2) -> Tensor:
    return Normalization((0.5,) * 3, (0.5,) * 3)(torch.zeros(n, 4, 4, 3, dtype=torch.uint8), floats)


@pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS.keys())
def test_memory_is_reused_once_nothing_refers_to_it(holder: Callable[[Tensor], object]) -> None:
    floats = BufferPool()
    first = made(floats)
    where = address(first)
    held = holder(first)
    del first
    second = made(floats)
    assert address(second) != where
    del held
    third = made(floats)
    assert address(third) == where


def test_memory_of_only_a_few_batches_is_kept() -> None:
    floats = BufferPool()
    held = [made(floats) for _ in range(10)]
    assert len({address(batch) for batch in held}) == 10
    assert len(floats._arrays) == 3


@given(kept=st.lists(st.booleans(), min_size=9, max_size=9))
def test_batches_that_the_caller_keeps_do_not_change(kept: list[bool]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (41, 3, 6, 5), dtype=np.uint8)
    split = MemorySplit(torch.from_numpy(pixels), torch.arange(41), Normalization((0.5,) * 3, (0.2,) * 3))
    varied = Augment(padding=1, mixup=0.2)
    copies = [images.clone() for images, _ in split.batches(5, seed=3, augment=varied)]
    batches = split.batches(5, seed=3, augment=varied)
    held = [(k, images) for k, (images, _) in enumerate(batches) if kept[k]]
    assert all(torch.equal(images, copies[k]) for k, images in held)
