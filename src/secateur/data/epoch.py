"""One pass over a split: all random choices, drawn before its first batch, and the last steps of every batch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from secateur.data._buffers import BufferPool
from secateur.data.auto_augment import Policy, load_policy
from secateur.data.transforms import (
    ORDER_STREAM,
    Augment,
    EpochDraws,
    Mix,
    Normalization,
    draw_erase_boxes,
    draw_mixes,
    erase_,
)
from secateur.errors import DataError

ImageBatch = tuple[Tensor, Tensor]
"""(n, c, h, w) float32 normalized images, channels last in memory, and labels on the same device: (n,) int64, or
(n, classes) float32 probabilities where images are mixed."""


class SplitInfo(Protocol):
    """The properties of a `secateur.data.Split` that determine what is drawn for it."""

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height, and width of its images."""
        ...

    @property
    def normalization(self) -> Normalization:
        """The normalization of its pixels."""
        ...

    @property
    def classes(self) -> int:
        """Number of classes, more than the highest label; it is the number of columns of mixed labels."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class BatchTransform:
    """The last steps of a batch, on its device: normalize, erase, mix.

    Attributes:
        normalization: The normalization, applied first.
        classes: Number of columns of mixed labels.
        boxes: (n, 4) erased boxes of all images of the split, on the device, see `erase_`; None erases nothing.
        mixes: The mix of each batch; empty mixes nothing.
        floats: Reused memory of the batches.
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
        """Draw the boxes and mixes of an epoch."""
        _, height, width = size
        boxes, mixes = None, ()
        if augment.erase:
            boxes = draw_erase_boxes(images, augment.erase, height, width, seed=seed, epoch=epoch).to(device)
        if augment.mixes:
            mixes = draw_mixes(augment, batches, height, width, seed=seed, epoch=epoch)
        return cls(normalization, classes, boxes, mixes)

    def __call__(self, place: int, index: Tensor, pixels: Tensor, labels: Tensor) -> ImageBatch:
        """Finish one batch.

        Args:
            place: Number of the batch in the epoch, from 0.
            index: (n,) positions of its images in the split, on the device.
            pixels: (n, h, w, c), uint8 or float in [0, 255]; on the device.
            labels: (n,) int64, on the device.
        """
        images = self.normalization(pixels, self.floats)
        if self.boxes is not None:
            images = erase_(images, self.boxes[index])
        if self.mixes:
            mix = self.mixes[place]
            return mix.mix_images_(images), mix.mix_labels(labels, self.classes)
        return images, labels


@dataclass(frozen=True, eq=False)
class Epoch:
    """One pass over a split.

    Attributes:
        order: (m,) positions of the remaining images in order, on the CPU.
        batch_size: Images per batch; the last batch holds the rest.
        device: The device of the batches.
        draws: How each image is shifted, cropped and mirrored; None varies nothing.
        policy: A policy of timm that is applied to each image, or None.
        finish: The last steps of a batch.
        start: Number of batches that are skipped.
    """

    order: Tensor
    batch_size: int
    device: torch.device
    draws: EpochDraws | None
    policy: Policy | None
    finish: BatchTransform
    start: int = 0

    @property
    def batches(self) -> Iterator[tuple[int, Tensor]]:
        """The number of each remaining batch, counted from the first one of the pass, and its positions."""
        # torch would split an empty order into one empty batch.
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
        """Check the settings of `Split.batches`, and draw everything random."""
        n, device = len(split), torch.device(device)
        if start < 0:
            raise DataError(f"`start` must be the number of batches to leave out, 0 or more; got {start}.")
        order = _batch_order(n, batch_size, seed=seed, epoch=epoch, augment=augment, drop_last=drop_last)
        left = order[start * batch_size :]
        if augment is None or seed is None:
            return cls(left, batch_size, device, None, None, BatchTransform(split.normalization), start)
        policy = None
        if augment.auto_augment is not None:
            policy = load_policy(augment.auto_augment, split.size, split.normalization.mean)
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
        draws = EpochDraws.of_epoch(augment, n, seed=seed, epoch=epoch)
        return cls(left, batch_size, device, draws, policy, finish, start)


def _batch_order(
    n: int, batch_size: int, *, seed: int | None, epoch: int, augment: Augment | None, drop_last: bool
) -> Tensor:
    """Check the settings of `Split.batches`, and return the positions of one pass in order."""
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
