"""From bytes to the floats a model expects."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.data._again import Floats
from secateur.errors import DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of RGB / 255 over ImageNet, as in torchvision, timm and most published weights."""

GREY_MEAN, GREY_STD = (0.5,), (0.5,)

_AT_ONCE = 2**17
"""Floats of a part: half a megabyte, which fits into a second-level cache."""


@dataclass(frozen=True)
class Normalisation:
    """(pixel / 255 - mean) / std, per channel.

    Attributes:
        mean: One number per channel, on the scale [0, 1].
        std: The same, positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise DataError(f"`mean` and `std` must have one number per channel; got {self.mean} and {self.std}.")
        if not all(math.isfinite(m) for m in self.mean):
            raise DataError(f"`mean` must be finite numbers; got {self.mean}.")
        if not all(math.isfinite(s) and s > 0 for s in self.std):
            raise DataError(f"`std` must be positive numbers (on the scale of pixels / 255); got {self.std}.")

    @classmethod
    def usual(cls, channels: int) -> "Normalisation":
        """ImageNet's for three channels, 0.5 and 0.5 otherwise."""
        if channels == 3:
            return cls(IMAGENET_MEAN, IMAGENET_STD)
        return cls(GREY_MEAN * channels, GREY_STD * channels)

    def override(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> "Normalisation":
        """Replace what is given; the number of channels stays."""
        new = Normalisation(
            self.mean if mean is None else tuple(float(m) for m in mean),
            self.std if std is None else tuple(float(s) for s in std),
        )
        if len(new.mean) != len(self.mean):
            raise DataError(
                f"`mean` and `std` must have one number per channel; got {len(new.mean)} for images with "
                f"{len(self.mean)} channel(s)."
            )
        return new

    def __call__(self, pixels: Tensor, floats: Floats | None = None) -> Tensor:
        """Normalise a batch.

        Args:
            pixels: (n, h, w, c) uint8 or float in [0, 255].
            floats: Memory for what is made on the CPU; None: new memory.

        Returns:
            (n, c, h, w) float32, channels last in memory.
        """
        # Row by row, with the channels' numbers repeated along it: three times as fast on a CPU as an innermost loop
        # over three channels.
        n, height, width, channels = pixels.shape
        mean = torch.tensor(self.mean, dtype=torch.float32, device=pixels.device).mul_(255.0).repeat(width)
        std = torch.tensor(self.std, dtype=torch.float32, device=pixels.device).mul_(255.0).repeat(width)
        if pixels.device.type == "cpu":
            made = (Floats() if floats is None else floats).take((n * height, width * channels))
            _by_parts(pixels, mean.numpy(), std.numpy(), made)
            return torch.from_numpy(made).view(pixels.shape).permute(0, 3, 1, 2)
        images = pixels.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        images.view(n * height, width * channels).sub_(mean).div_(std)
        return images.permute(0, 3, 1, 2)


def _by_parts(pixels: Tensor, mean: np.ndarray, std: np.ndarray, made: np.ndarray) -> None:
    """Write (pixels - mean) / std into memory, by one thread, a part that stays in the cache after the other.

    torch's threads wait for their next work in a busy loop, on the cores where the next images are decoded, and its new
    memory comes in pages of 4 kB, whose first touch takes longer than the arithmetic; numpy asks for large ones.

    Args:
        pixels: (n, h, w, c) on the CPU.
        mean: (w * c,) float32, on the scale of pixels.
        std: The same.
        made: (n * h, w * c) float32.
    """
    bytes_ = (pixels if pixels.dtype == torch.uint8 else pixels.float()).reshape(made.shape).numpy()
    rows = max(1, _AT_ONCE // len(mean))
    for at in range(0, len(made), rows):
        part = np.subtract(bytes_[at : at + rows], mean, out=made[at : at + rows])
        np.divide(part, std, out=part)
