"""Noise images of four classes for tests of whole pipelines."""

from typing import Any

import torch

from secateur.data import Augment, ImageData, MemorySplit, Normalization


def noise_split(n: int, seed: int) -> MemorySplit:
    """Images of 8 x 8 pixels."""
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=draw, dtype=torch.uint8)
    return MemorySplit(images, torch.arange(n) % 4, Normalization.default(3))


def noise_data(train: MemorySplit | None = None) -> ImageData:
    """64 training images by default, 16 validation images and 32 test images."""
    normalization = Normalization.default(3)
    return ImageData(
        train=train or noise_split(64, 0),
        validation=noise_split(16, 1),
        test=noise_split(32, 2),
        classes=("a", "b", "c", "d"),
        mean=normalization.mean,
        std=normalization.std,
        size=(3, 8, 8),
        name="noise",
        augment=Augment(padding=1),
    )


class Dying(MemorySplit):
    """Training images that raise KeyboardInterrupt in the second epoch."""

    def batches(self, *args: Any, epoch: int = 0, **settings: Any) -> Any:
        if settings.get("augment") is not None and epoch == 1:
            raise KeyboardInterrupt
        return super().batches(*args, epoch=epoch, **settings)
