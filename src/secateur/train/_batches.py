"""What the engine asks of data. The splits of `secateur.data` satisfy it; so does any class with these methods."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Batches(Protocol):
    """Labelled images that can be read in batches, again and again."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batches(
        self,
        batch_size: int,
        *,
        device: torch.device,
        seed: int | None = None,
        epoch: int = 0,
        augment: Any = None,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the images, a pure function of the arguments.

        Args:
            batch_size: Images per batch; the last one may be smaller.
            device: Where the tensors shall lie.
            seed: Seed of order and augmentation; None means the stored order.
            epoch: Changes order and augmentation; 0 or more.
            augment: Settings of the data room, passed through; None means none.
            drop_last: Leave a smaller last batch out.
            start: Leave out so many batches at the beginning, with what it takes to read them: a resumed run begins
                in the middle of an epoch.

        Returns:
            Pairs of images, float32 (batch, channels, height, width), normalised, and labels, int64 (batch,), or
            probabilities, float32 (batch, classes), where ``augment`` mixes images.
        """
        ...


class TrainingData(Protocol):
    """A training and a validation split and how to vary the former, such as `secateur.data.ImageData`."""

    @property
    def train(self) -> Batches:
        """What the student learns from."""
        ...

    @property
    def validation(self) -> Batches:
        """What the best epoch is chosen on; never the test split."""
        ...

    @property
    def augment(self) -> Any:
        """What ``train.batches`` is given to vary the images; None varies nothing."""
        ...
