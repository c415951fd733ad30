"""What a split is: labelled images that come in normalised batches."""

from collections.abc import Iterator
from typing import Protocol, Self

import torch
from torch import Tensor

from secateur.data._augment import Augment
from secateur.data._finish import Batch
from secateur.data._normalise import Normalisation
from secateur.errors import DataError


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

    @property
    def classes(self) -> int:
        """How many there are, more than the highest label: the columns of mixed labels."""
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
        start: int = 0,
    ) -> Iterator[Batch]:
        """One pass over the images; a pure function of its arguments, whatever the global random state.

        What becomes of an image depends on (seed, epoch, image) alone, not on its batch, the device or the number of
        threads; but for mixup and CutMix, which mix images of one batch: they depend on the batches too.

        Args:
            batch_size: Images per batch, positive; the last batch holds the rest.
            device: Where the batches are made.
            seed: Shuffle with it; None keeps the fixed order.
            epoch: Each has its own order and augmentation for the same seed.
            augment: Vary the images; needs a seed.
            drop_last: Leave out a last batch that is not full.
            start: Begin with this batch, from 0, as if the ones before had been read; nothing of them is decoded.

        Raises:
            DataError: If a setting makes no sense, or an image cannot be read (at the batch that needs it).
        """
        ...


def checked_classes(labels: Tensor, classes: int) -> int:
    """The number of classes; 0 stands for the fewest that the labels allow."""
    fewest = int(labels.max()) + 1
    if classes and classes < fewest:
        raise DataError(f"`classes` must be more than the highest label, {fewest - 1}; got {classes}.")
    return classes or fewest


def checked_labels(labels: Tensor, n: int) -> Tensor:
    """The labels as int64 on the CPU, one per image."""
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != n:
        raise DataError(f"`labels` must be {n} integers, one per image; got {labels.dtype} {tuple(labels.shape)}.")
    if n == 0:
        raise DataError("`images` must hold at least one image; got an empty set.")
    if int(labels.min()) < 0:
        raise DataError(f"`labels` must not be negative; got {int(labels.min())}.")
    return labels.to("cpu", torch.int64)
