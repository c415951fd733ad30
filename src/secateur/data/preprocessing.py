"""The one rule by which an image file becomes the input of a model: size, interpolation, mean, std, channel order.

The same rule is used in training, validation and test, is stored in the artifact, and is what a program that uses the
exported file must do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor

from secateur.errors import DataError

LETTERBOX_FILL = 114
"""Gray value of the borders of letterboxed images, as detectors of the YOLO family are trained with."""


class ResizeMode(Enum):
    """How an image gets the size of the model's input."""

    SQUASH = "squash"
    """Height and width are scaled on their own."""
    CROP = "crop"
    """The image is scaled to cover the size / the crop fraction, and its middle is taken."""
    LETTERBOX = "letterbox"
    """The image is scaled to fit into the size, and gray borders are added."""


class Interpolation(Enum):
    """How pixels are computed where an image is scaled."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"


@dataclass(frozen=True)
class Preprocessing:
    """From an image file to the input of a model.

    In this order: convert to the number of channels, resize, divide by 255, subtract the mean and divide by the
    standard deviation, exchange red and blue.

    Attributes:
        size: Height and width; None keeps every image's own.
        resize: How the size is reached.
        crop_fraction: Height of what `ResizeMode.CROP` takes / height that the image is scaled to, in (0, 1].
        interpolation: How pixels are computed; targets of classes always take the nearest one.
        mean: Mean of pixels / 255 per channel; empty subtracts nothing.
        std: Standard deviation of pixels / 255 per channel; empty divides by nothing.
        channels: Channels of the input: 1 for gray, 3 for color, 4 for color with transparency.
        bgr: Whether blue comes first.
    """

    size: tuple[int, int] | None = None
    resize: ResizeMode = ResizeMode.CROP
    crop_fraction: float = 0.875
    interpolation: Interpolation = Interpolation.BILINEAR
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    channels: int = 3
    bgr: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and min(self.size) < 1:
            raise DataError(f"`size` must be a positive height and width, in pixels; got {self.size}.")
        if not 0 < self.crop_fraction <= 1:
            raise DataError(f"`crop_fraction` must be in (0, 1]; got {self.crop_fraction}. 0.875 is usual.")
        for name in ("mean", "std"):
            values: tuple[float, ...] = getattr(self, name)
            if values and len(values) != self.channels:
                raise DataError(f"`{name}` must have a number for each of {self.channels} channels; got {values}.")
            if not all(math.isfinite(value) for value in values) or (name == "std" and min(values, default=1) <= 0):
                raise DataError(f"`{name}` must be finite, and a standard deviation positive; got {values}.")
        if self.channels not in _MODES:
            raise DataError(f"`channels` must be one of {sorted(_MODES)}; got {self.channels}.")

    def to_json(self) -> dict[str, Any]:
        """Return the rule as a JSON object, for secateur.json."""
        return {
            "size": None if self.size is None else list(self.size),
            "resize": self.resize.value,
            "crop_fraction": self.crop_fraction,
            "interpolation": self.interpolation.value,
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": self.channels,
            "bgr": self.bgr,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """Inverse of `to_json`."""
        size = data["size"]
        return cls(
            size=None if size is None else (int(size[0]), int(size[1])),
            resize=ResizeMode(data["resize"]),
            crop_fraction=float(data["crop_fraction"]),
            interpolation=Interpolation(data["interpolation"]),
            mean=tuple(map(float, data["mean"])),
            std=tuple(map(float, data["std"])),
            channels=int(data["channels"]),
            bgr=bool(data["bgr"]),
        )

    def pixels(self, image: Any) -> Tensor:
        """Return a PIL image as (channels, height, width) uint8 with the number of channels, in its own size."""
        from torchvision.transforms.v2 import functional

        converted = image if image.mode == _MODES[self.channels] else image.convert(_MODES[self.channels])
        return functional.pil_to_tensor(converted)

    def geometry(self, *items: Any) -> tuple[Any, ...]:
        """ResizeMode an image, and with it boxes and masks, which are tv_tensors of torchvision.

        Args:
            items: The image, a `tv_tensors.Image`, then others of the same image.
        """
        if self.size is None:
            return items
        from torchvision.transforms import v2

        height, width = items[0].shape[-2:]
        steps: list[Any] = []
        if self.resize is ResizeMode.SQUASH:
            steps = [self._scaled(*self.size)]
        elif self.resize is ResizeMode.CROP:
            factor = max(self.size[0] / height, self.size[1] / width) / self.crop_fraction
            scaled = [max(least, round(side * factor)) for side, least in zip((height, width), self.size, strict=True)]
            steps = [self._scaled(*scaled), v2.CenterCrop(list(self.size))]
        else:
            factor = min(self.size[0] / height, self.size[1] / width)
            scaled = [
                max(1, min(most, round(side * factor))) for side, most in zip((height, width), self.size, strict=True)
            ]
            down, right = self.size[0] - scaled[0], self.size[1] - scaled[1]
            borders = [right // 2, down // 2, right - right // 2, down - down // 2]
            fill = {"image": LETTERBOX_FILL}
            steps = [self._scaled(*scaled), _Padded(borders, fill["image"])]
        found = v2.Compose(steps)(*items)
        return found if isinstance(found, tuple) else (found,)

    def finish(self, pixels: Tensor) -> Tensor:
        """Return (channels, height, width) float32 from uint8 pixels: scaled to 0...1, normalized, in channel order."""
        image = pixels.float() / 255
        if self.mean:
            image = image - torch.tensor(self.mean)[:, None, None]
        if self.std:
            image = image / torch.tensor(self.std)[:, None, None]
        return image.flip(0) if self.bgr else image

    def _scaled(self, height: int, width: int) -> Any:
        from torchvision.transforms import v2

        mode = getattr(v2.InterpolationMode, self.interpolation.name)
        return v2.Resize((height, width), interpolation=mode, antialias=True)


class _Padded:
    """Adds borders: gray ones to images, none that count to masks; boxes move."""

    def __init__(self, borders: list[int], fill: int) -> None:
        self._borders, self._fill = borders, fill

    def __call__(self, *items: Any) -> Any:
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional

        found: list[Any] = []
        for item in items:
            fill = MASK_BORDER if isinstance(item, tv_tensors.Mask) else self._fill
            found.append(cast(Any, functional.pad)(item, self._borders, fill=fill))
        return tuple(found)


MASK_BORDER = 255
"""Class of the pixels that letterboxing adds to a mask: they count for nothing."""
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
