"""The last steps of a batch, on its device: normalize, erase, mix.

One pass over a split: everything that is drawn for it, before its first batch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from secateur.data._buffers import BufferPool
from secateur.data.auto_augment import Policy, policy_of
from secateur.data.transforms import ORDER_STREAM, Augment, Draws, Mix, Normalization, drawn_mixes, erase_, erased_boxes
from secateur.errors import DataError

Batch = tuple[Tensor, Tensor]
"""(n, c, h, w) float32 normalized images, channels last in memory, and labels on the same device: (n,) int64, or
float32 probabilities (n, classes) where images are mixed."""


@dataclass(frozen=True, eq=False)
class BatchTransform:
    """What makes a batch of an epoch's bytes.

    Attributes:
        normalization: Applied first.
        classes: Columns of mixed labels.
        boxes: (n, 4) of every image of the split, on the device, see `secateur.data._erase`; None erases nothing.
        mixes: Of every batch; empty mixes nothing.
        floats: Memory of the batches.
    """

    normalization: Normalization
    classes: int = 0
    boxes: Tensor | None = None
    mixes: tuple[Mix, ...] = ()
    floats: BufferPool = field(default_factory=BufferPool)

    @classmethod
    def of_epoch(
        cls,
        normalization: Normalization,
        augment: Augment,
        *,
        images: int,
        size: tuple[int, int, int],
        classes: int,
        batches: int,
        device: torch.device,
        seed: int,
        epoch: int,
    ) -> "BatchTransform":
        """Draw what an epoch needs."""
        _, height, width = size
        boxes, mixes = None, ()
        if augment.erase:
            boxes = erased_boxes(images, augment.erase, height, width, seed=seed, epoch=epoch).to(device)
        if augment.mixes:
            mixes = drawn_mixes(augment, batches, height, width, seed=seed, epoch=epoch)
        return cls(normalization, classes, boxes, mixes)

    def __call__(self, place: int, index: Tensor, pixels: Tensor, labels: Tensor) -> Batch:
        """One batch.

        Args:
            place: Of the batch in the epoch, from 0.
            index: (n,) the positions of its images in the split, on the device.
            pixels: (n, h, w, c), uint8 or float in [0, 255]; on the device.
            labels: (n,) int64, on the device.
        """
        images = self.normalization(pixels, self.floats)
        if self.boxes is not None:
            images = erase_(images, self.boxes[index])
        if self.mixes:
            mix = self.mixes[place]
            return mix.images_(images), mix.labels(labels, self.classes)
        return images, labels


class SplitInfo(Protocol):
    """What must be known of a split to draw for it; see `secateur.data.Split`."""

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height, and width of its images."""
        ...

    @property
    def normalization(self) -> Normalization:
        """What turns bytes into the floats a model expects."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class Epoch:
    """One pass over a split.

    Attributes:
        order: (m,) positions, on the CPU, of the batches that are left.
        batch_size: Images per batch; the last holds the rest.
        device: Where the batches are made.
        draws: How each image is varied; None varies nothing.
        policy: How its colors and shapes are; None varies none.
        finish: The last steps.
        start: Batches left out before these.
    """

    order: Tensor
    batch_size: int
    device: torch.device
    draws: Draws | None
    policy: Policy | None
    finish: BatchTransform
    start: int = 0

    @property
    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """The number of each batch that is left, from 0 for the first of the pass, and its positions."""
        # Of no positions torch would make one batch.
        return enumerate(self.order.split(self.batch_size) if len(self.order) else (), self.start)

    @classmethod
    def of(
        cls,
        split: SplitInfo,
        batch_size: int,
        *,
        device: torch.device | str,
        seed: int | None,
        epoch: int,
        augment: Augment | None,
        drop_last: bool,
        start: int = 0,
    ) -> "Epoch":
        """Check the settings of `Split.batches` and draw."""
        n, device = len(split), torch.device(device)
        if start < 0:
            raise DataError(f"`start` must be the number of batches to leave out, 0 or more; got {start}.")
        order = _order(n, batch_size, seed=seed, epoch=epoch, augment=augment, drop_last=drop_last)
        left = order[start * batch_size :]
        if augment is None or seed is None:
            return cls(left, batch_size, device, None, None, BatchTransform(split.normalization), start)
        policy = None
        if augment.auto_augment is not None:
            policy = policy_of(augment.auto_augment, split.size, split.normalization.mean)
        finish = BatchTransform.of_epoch(
            split.normalization,
            augment,
            images=n,
            size=split.size,
            classes=split.classes,
            batches=-(-len(order) // batch_size),
            device=device,
            seed=seed,
            epoch=epoch,
        )
        draws = Draws.of_epoch(augment, n, seed=seed, epoch=epoch)
        return cls(left, batch_size, device, draws, policy, finish, start)


def _order(
    n: int, batch_size: int, *, seed: int | None, epoch: int, augment: Augment | None, drop_last: bool
) -> Tensor:
    """The positions of one pass in order, after checking the settings of `Split.batches`."""
    if batch_size < 1:
        raise DataError(f"`batch_size` must be positive; got {batch_size}.")
    if epoch < 0 or (seed is not None and seed < 0):
        raise DataError(f"`seed` and `epoch` must not be negative; got {seed} and {epoch}.")
    if augment is not None and seed is None:
        raise DataError("`seed` must be given when `augment` is: augmentation is drawn from it. Pass seed=0, say.")
    if drop_last and batch_size > n:
        raise DataError(
            f"`batch_size` must be at most the {n} images of the split when `drop_last` is set; got {batch_size}."
        )
    order = np.arange(n) if seed is None else np.random.default_rng((seed, epoch, ORDER_STREAM)).permutation(n)
    return torch.from_numpy(order[: n - n % batch_size] if drop_last else order)
