"""Splits: labelled images that come in normalised batches."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from secateur.data._augment import ORDER_STREAM, Augment, Draws, crop_boxes, resized_crop
from secateur.data._normalise import Normalisation
from secateur.errors import DataError

Batch = tuple[Tensor, Tensor]
"""(n, c, h, w) float32 normalised images, channels last in memory, and (n,) int64 labels, on the same device."""


class Split(Protocol):
    """Labelled images of one split, in a fixed order."""

    @property
    def labels(self) -> Tensor:
        """(n,) int64 class of each image, on the CPU."""
        ...

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height, width of an image as it comes out."""
        ...

    @property
    def normalisation(self) -> Normalisation:
        """What turns its bytes into floats."""
        ...

    def __len__(self) -> int: ...

    def subset(self, index: Tensor) -> Self:
        """The images at some positions, in that order."""
        ...

    def normalised(self, normalisation: Normalisation) -> Self:
        """The same images with another mean and standard deviation."""
        ...

    def batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        epoch: int = 0,
        augment: Augment | None = None,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """One pass over the images; a pure function of its arguments, whatever the global random state.

        Args:
            batch_size: Images per batch, positive; the last batch holds the rest.
            device: Where the batches are made.
            seed: Shuffle with it; None keeps the fixed order.
            epoch: Each has its own order and augmentation for the same seed.
            augment: Vary the images; needs a seed.
            drop_last: Leave out a last batch that is not full.

        Raises:
            DataError: If a setting makes no sense, or an image cannot be read (at the batch that needs it).
        """
        ...


def epoch_order(
    n: int, batch_size: int, *, seed: int | None, epoch: int, augment: Augment | None, drop_last: bool
) -> Tensor:
    """The positions of one epoch in order, after checking the settings of `Split.batches`."""
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


def checked_labels(labels: Tensor, n: int) -> Tensor:
    """The labels as int64 on the CPU, one per image."""
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != n:
        raise DataError(f"`labels` must be {n} integers, one per image; got {labels.dtype} {tuple(labels.shape)}.")
    if n == 0:
        raise DataError("`images` must hold at least one image; got an empty set.")
    if int(labels.min()) < 0:
        raise DataError(f"`labels` must not be negative; got {int(labels.min())}.")
    return labels.to("cpu", torch.int64)


@dataclass(frozen=True, eq=False)
class MemorySplit:
    """Images held as bytes, on the CPU and on each device that asked for batches; everything runs there in batch.

    Attributes:
        images: (n, c, h, w) uint8.
        labels: (n,) integers, not negative.
        normalisation: Applied last.
    """

    images: Tensor
    labels: Tensor
    normalisation: Normalisation
    _copies: dict[torch.device, Batch] = field(default_factory=dict[torch.device, Batch], init=False, repr=False)

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            shape = tuple(self.images.shape)
            raise DataError(f"`images` must be uint8 of shape (n, c, h, w); got {self.images.dtype} {shape}.")
        if self.images.shape[1] != len(self.normalisation.mean):
            raise DataError(
                f"`normalisation` must have one mean per channel; got {len(self.normalisation.mean)} for "
                f"{self.images.shape[1]} channel(s)."
            )
        object.__setattr__(self, "labels", checked_labels(self.labels, len(self.images)))
        object.__setattr__(self, "images", self.images.contiguous(memory_format=torch.channels_last))

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> "MemorySplit":
        """The images at some positions, in that order (copied)."""
        pixels = self.images.permute(0, 2, 3, 1)[index]  # one copy: rows are contiguous in this order
        return MemorySplit(pixels.permute(0, 3, 1, 2), self.labels[index], self.normalisation)

    def normalised(self, normalisation: Normalisation) -> "MemorySplit":
        """The same images (shared) with another mean and standard deviation."""
        return MemorySplit(self.images, self.labels, normalisation)

    def batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        epoch: int = 0,
        augment: Augment | None = None,
        drop_last: bool = False,
    ) -> Iterator[Batch]:
        """See `Split.batches`."""
        order = epoch_order(len(self), batch_size, seed=seed, epoch=epoch, augment=augment, drop_last=drop_last)
        draws = None if augment is None else Draws.of_epoch(augment, len(self), seed=seed or 0, epoch=epoch)
        return self._batches(order, batch_size, torch.device(device), draws)

    def _batches(self, order: Tensor, batch_size: int, device: torch.device, draws: Draws | None) -> Iterator[Batch]:
        images, labels = self._on(device)
        pixels, order = images.permute(0, 2, 3, 1), order.to(device)
        draws = None if draws is None else draws.to(device)
        boxes = None if draws is None else _boxes(draws, device)
        for index in order.split(batch_size):
            batch = pixels[index]
            if draws is not None:
                batch = draws.vary(batch, index)
            if boxes is not None:
                batch = resized_crop(batch.permute(0, 3, 1, 2).float(), boxes[index]).permute(0, 2, 3, 1)
            yield self.normalisation(batch), labels[index]

    def _on(self, device: torch.device) -> Batch:
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0": one copy for both names
        if device not in self._copies:
            self._copies[device] = (self.images.to(device), self.labels.to(device))
        return self._copies[device]


def _boxes(draws: Draws, device: torch.device) -> Tensor | None:
    if draws.augment.min_area == 1.0:
        return None
    return torch.from_numpy(crop_boxes(draws.crops, draws.augment.min_area)).float().to(device)
