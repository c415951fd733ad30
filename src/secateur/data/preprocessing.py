"""The one rule by which an image file becomes the input of a model: size, interpolation, mean, std, channel order.

The same rule is used in training, validation and test, is stored in the artifact, and is what a program that uses the
exported file must do.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_CHANNELS_OF_IMAGES = 16
"""The most channels of an input: those of satellites."""
MAX_SCALED_PIXELS = 2**26
"""The most pixels of an image while it is scaled, 8192 x 8192."""
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
class Resizing:
    """How an image gets a size.

    Attributes:
        mode: How the size is reached.
        crop_fraction: Side of what `ResizeMode.CROP` takes / side that the image is scaled to, in (0, 1].
        interpolation: How pixels are computed.
    """

    mode: ResizeMode = ResizeMode.CROP
    crop_fraction: float = 0.875
    interpolation: Interpolation = Interpolation.BILINEAR

    def __post_init__(self) -> None:
        if not 0 < self.crop_fraction <= 1:
            raise DataError(f"`crop_fraction` must be in (0, 1]; got {self.crop_fraction}. 0.875 is usual.")

    def placement(self, source: tuple[int, int], size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the size that an image is scaled to, and where the input begins in it.

        Args:
            source: Height and width of the image.
            size: Height and width of the input.

        Returns:
            (height, width) and (top, left); the latter is negative where borders are added.

        Raises:
            DataError: If the image is so long that scaling it would take too much memory.
        """
        if source == size:
            return size, (0, 0)
        if self.mode is ResizeMode.SQUASH:
            return size, (0, 0)
        sides = list(zip(source, size, strict=True))
        if self.mode is ResizeMode.CROP:
            factor = max(round(wanted / self.crop_fraction) / side for side, wanted in sides)
            height, width = (max(wanted, round(side * factor)) for side, wanted in sides)
        else:
            factor = min(wanted / side for side, wanted in sides)
            height, width = (max(1, min(wanted, round(side * factor))) for side, wanted in sides)
        if height * width > MAX_SCALED_PIXELS:
            raise DataError(
                f"images must not be much longer than wide; got {source[1]} x {source[0]}, which would become "
                f"{width} x {height}. Cut it, or remove it."
            )
        return (height, width), ((height - size[0]) // 2, (width - size[1]) // 2)

    def image(self, image: "Image", size: tuple[int, int]) -> "Image":
        """Return an image of Pillow in a size; one that has it already is returned as it is."""
        if (image.height, image.width) == size:
            return image
        (height, width), (top, left) = self.placement((image.height, image.width), size)
        scaled = resize_bands(image, (height, width), self.interpolation)
        if top >= 0 and left >= 0:
            return scaled.crop((left, top, left + size[1], top + size[0]))
        from PIL import Image

        framed = Image.new(image.mode, (size[1], size[0]), (LETTERBOX_FILL,) * len(image.getbands()))
        framed.paste(scaled, (-left, -top))
        return framed

    def pixels(self, pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Return (height, width, channels) uint8 pixels in a size: every channel on its own, as an image of Pillow."""
        from PIL import Image

        if pixels.shape[:2] == size:
            return pixels
        if pixels.shape[2] == 3:
            return np.asarray(self.image(Image.fromarray(np.ascontiguousarray(pixels)), size))
        bands = [Image.fromarray(np.ascontiguousarray(pixels[..., band])) for band in range(pixels.shape[2])]
        return np.stack([np.asarray(self.image(band, size)) for band in bands], -1)


def resize_bands(
    image: "Image",
    size: tuple[int, int],
    interpolation: Interpolation = Interpolation.BILINEAR,
    box: tuple[float, float, float, float] | None = None,
) -> "Image":
    """Scale an image, or a box of it (left, top, right, bottom), to a height and width, every channel on its own.

    Pillow would multiply the other channels by the transparency.
    """
    from PIL import Image

    how, wanted = getattr(Image.Resampling, interpolation.name), (size[1], size[0])
    if image.mode not in ("LA", "RGBA"):
        return image.resize(wanted, how, box=box)
    return Image.merge(image.mode, [band.resize(wanted, how, box=box) for band in image.split()])


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
        channels: Channels of the input, 1 to 16: 1 for gray, 3 for color; 2 and 4 are the same with transparency.
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
        check_channels(self.channels)
        for name in ("mean", "std"):
            values: tuple[float, ...] = getattr(self, name)
            if values and len(values) != self.channels:
                raise DataError(f"`{name}` must have a number for each of {self.channels} channels; got {values}.")
            if not all(math.isfinite(value) for value in values) or (name == "std" and min(values, default=1) <= 0):
                raise DataError(f"`{name}` must be finite, and a standard deviation positive; got {values}.")
        if self.bgr and self.channels != 3:
            raise DataError(f"`bgr` must go with 3 channels; got {self.channels}.")
        _ = self.resizing

    @property
    def resizing(self) -> Resizing:
        """How the size is reached."""
        return Resizing(self.resize, self.crop_fraction, self.interpolation)

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

    def geometry(self, *items: Any) -> tuple[Any, ...]:
        """Resize an image, and with it boxes and masks, which are tv_tensors of torchvision.

        Args:
            items: The image, a `tv_tensors.Image` of uint8, then others of the same image.
        """
        if self.size is None:
            return items
        from torchvision import tv_tensors

        source = (int(items[0].shape[-2]), int(items[0].shape[-1]))
        scaled, begin = self.resizing.placement(source, self.size)
        found: list[Any] = []
        for item in items:
            if isinstance(item, tv_tensors.BoundingBoxes):
                found.append(_placed_boxes(item, source, scaled, begin, self.size))
            elif isinstance(item, tv_tensors.Mask):
                found.append(tv_tensors.Mask(_placed_mask(item.as_subclass(Tensor), scaled, begin, self.size)))
            else:
                pixels = self.resizing.pixels(item.permute(1, 2, 0).numpy(), self.size)
                found.append(tv_tensors.Image(torch.from_numpy(np.array(pixels)).permute(2, 0, 1)))
        return tuple(found)

    def finish(self, pixels: Tensor) -> Tensor:
        """Return (channels, height, width) float32 from uint8 pixels: scaled to 0...1, normalized, in channel order."""
        image = pixels.float() / 255
        if self.mean:
            image = image - torch.tensor(self.mean)[:, None, None]
        if self.std:
            image = image / torch.tensor(self.std)[:, None, None]
        return image.flip(0) if self.bgr else image


def check_channels(channels: int) -> None:
    """Refuse a number of channels that no input has.

    Raises:
        DataError: If it is not from 1 to 16.
    """
    if not 1 <= channels <= MAX_CHANNELS_OF_IMAGES:
        raise DataError(
            f"`channels` must be from 1 to {MAX_CHANNELS_OF_IMAGES}; got {channels}. 1 is gray, 3 is color, and 4 is "
            "color with transparency."
        )


def _placed_boxes(
    boxes: Any, source: tuple[int, int], scaled: tuple[int, int], begin: tuple[int, int], size: tuple[int, int]
) -> Any:
    from torchvision import tv_tensors

    factors = torch.tensor([scaled[1] / source[1], scaled[0] / source[0]]).repeat(2)
    moved = boxes.as_subclass(Tensor).float() * factors - torch.tensor([begin[1], begin[0]]).repeat(2)
    moved[:, 0::2].clamp_(0, size[1])
    moved[:, 1::2].clamp_(0, size[0])
    form: Any = tv_tensors.BoundingBoxFormat.XYXY
    return tv_tensors.BoundingBoxes(moved, format=form, canvas_size=size)  # pyright: ignore


def _placed_mask(mask: Tensor, scaled: tuple[int, int], begin: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The nearest class of every pixel; borders count for nothing."""
    steps = [
        ((torch.arange(many) + 0.5) * (mask.shape[dim] / many)).long()
        for dim, many in zip((-2, -1), scaled, strict=True)
    ]
    near = mask[..., steps[0][:, None], steps[1][None, :]]
    top, left = begin
    if top >= 0 and left >= 0:
        return near[..., top : top + size[0], left : left + size[1]].contiguous()
    framed = mask.new_full((*mask.shape[:-2], *size), MASK_BORDER)
    framed[..., -top : -top + scaled[0], -left : -left + scaled[1]] = near
    return framed


MASK_BORDER = 255
"""Class of the pixels that letterboxing adds to a mask: they count for nothing."""
