"""How images are varied: crops and flips as a pure function of (seed, epoch, image)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from secateur.data._policy import check_policy
from secateur.errors import DataError

ORDER_STREAM, AUGMENT_STREAM, POLICY_STREAM, ERASE_STREAM, MIX_STREAM = range(5)
"""Third word of the random seed, so that the order of an epoch and each kind of augmentation are independent."""

_LOG_ASPECT = math.log(4 / 3)
"""Aspect ratios of resized crops are log-uniform in [3/4, 4/3] (Szegedy et al., arXiv:1409.4842, Section 6)."""


@dataclass(frozen=True)
class Augment:
    """How training images are varied. The defaults are the usual ones for 32 x 32 colour images.

    Attributes:
        padding: Zero (black) pixels added on every side before a crop of the original size is taken at random.
            4 for CIFAR (He et al., arXiv:1512.03385, Section 4.2).
        flip: Mirror left and right with probability 1/2.
        min_area: Smallest part of the image area that a random resized crop may cover, in (0, 1]; 1 takes no such
            crop. 0.08 is usual for photographs at 224 pixels (arXiv:1409.4842, Section 6).
        auto_augment: A policy of timm by its name there, such as "rand-m9-mstd0.5-inc1" (RandAugment,
            arXiv:1909.13719), "original" (AutoAugment, arXiv:1805.09501) or "augmix-m3-w3" (arXiv:1912.02781), after
            crop and flip; None varies no colours or shapes. Grey or colour images only.
        erase: Probability that a rectangle of the image is erased, see `secateur.data._erase`; in [0, 1].
        mixup: Alpha of the Beta distribution that mixes pairs of images and their labels, see `secateur.data._mix`;
            0 mixes none. 0.2 to 0.8 is usual on photographs.
        cutmix: The same for pasting a part of one image into the other; 1.0 is usual. With both, each batch has one of
            the two, with equal probability.
    """

    padding: int = 4
    flip: bool = True
    min_area: float = 1.0
    auto_augment: str | None = None
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise DataError(f"`padding` must be 0 or more pixels; got {self.padding}.")
        if not 0.0 < self.min_area <= 1.0:
            raise DataError(f"`min_area` must lie in (0, 1]; got {self.min_area}. 1 takes no resized crops.")
        if self.auto_augment is not None:
            check_policy(self.auto_augment)
        if not 0.0 <= self.erase <= 1.0:
            raise DataError(f"`erase` must be a probability in [0, 1]; got {self.erase}. 0.25 is usual.")
        for name, alpha, usual in (("mixup", self.mixup, 0.2), ("cutmix", self.cutmix, 1.0)):
            if not (math.isfinite(alpha) and alpha >= 0):
                raise DataError(f"`{name}` must be finite and not negative; got {alpha}. {usual} is usual, 0 is none.")

    @property
    def mixes(self) -> bool:
        """Whether labels become probabilities, float32 (n, classes)."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, eq=False)
class Draws:
    """One epoch's random choices, one row per image of the split (not per position in the epoch).

    Because a row belongs to an image, the same image is varied in the same way whatever the batch size, the order
    and the device.

    Attributes:
        augment: What is varied.
        top: (n,) int64 rows by which the padded image is shifted, in [0, 2 * padding].
        left: (n,) the same for columns.
        flip: (n,) bool, mirrored or not.
        crops: (n, 4) float64, uniform in [0, 1): area, aspect, down, right of a resized crop (see `crop_box`).
        keys: (n,) uint64, what a policy of timm draws from.
    """

    augment: Augment
    top: Tensor
    left: Tensor
    flip: Tensor
    crops: np.ndarray
    keys: np.ndarray

    @classmethod
    def of_epoch(cls, augment: Augment, n: int, *, seed: int, epoch: int) -> "Draws":
        """Draw for ``n`` images; the global random state is neither read nor changed."""
        random = np.random.default_rng((seed, epoch, AUGMENT_STREAM))
        shifts = torch.from_numpy(random.integers(0, 2 * augment.padding + 1, size=(2, n)))
        flip = torch.from_numpy(random.random(n) < 0.5) & augment.flip
        crops = random.random((n, 4)) if augment.min_area < 1.0 else np.empty((n, 0))
        keys = np.random.default_rng((seed, epoch, POLICY_STREAM)).integers(2**64, size=n, dtype=np.uint64)
        return cls(augment, shifts[0], shifts[1], flip, crops, keys)

    def to(self, device: torch.device) -> "Draws":
        """The same choices with the tensors on another device."""
        return replace(self, top=self.top.to(device), left=self.left.to(device), flip=self.flip.to(device))

    def vary(self, pixels: Tensor, index: Tensor) -> Tensor:
        """Shift and mirror (n, h, w, c) pixels of the images at ``index``; all on the device of the draws."""
        return shift_and_flip(pixels, self.augment.padding, self.top[index], self.left[index], self.flip[index])

    def vary_one(self, pixels: np.ndarray, i: int, place: np.ndarray) -> None:
        """Write the shifted and mirrored (h, w, c) pixels of image i into a place; for draws on the CPU."""
        height, width, channels = pixels.shape
        padding = self.augment.padding
        if padding:
            top, left = int(self.top[i]), int(self.left[i])
            padded = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)))
            pixels = padded[top : top + height, left : left + width]
        # A pixel at a time: mirrored byte by byte it takes more than twice the time.
        whole = np.dtype((np.void, channels))
        pixels, place = pixels.view(whole), place.view(whole)
        np.copyto(place, pixels[:, ::-1] if self.flip.numpy()[i] else pixels)


def crop_box(crop: Sequence[float], min_area: float, stretch: float = 1.0) -> tuple[float, float, float, float]:
    """Turn uniform numbers into a box, in fractions of an image.

    Area a is uniform in [min_area, 1], aspect r log-uniform in [3/4, 4/3] (times ``stretch``); then height = sqrt(a/r),
    width = sqrt(a*r), and the position is uniform. A side that would be longer than the image is cut to it; the usual
    implementation draws again instead. Cutting keeps the number of draws fixed and differs only for crops that are
    nearly whole.

    Args:
        crop: Four numbers, uniform in [0, 1): area, aspect, down, right.
        min_area: In (0, 1].
        stretch: Aspect (width / height) of the image that is made over that of the image cropped.

    Returns:
        Top, left, height, width, all in [0, 1].
    """
    area = min_area + (1.0 - min_area) * crop[0]
    aspect = stretch * math.exp(_LOG_ASPECT * (2.0 * crop[1] - 1.0))
    height, width = min(math.sqrt(area / aspect), 1.0), min(math.sqrt(area * aspect), 1.0)
    return crop[2] * (1.0 - height), crop[3] * (1.0 - width), height, width


def shift_and_flip(pixels: Tensor, padding: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Zero-pad, crop back to the original size and mirror, in one gather.

    Args:
        pixels: (n, h, w, c), any dtype.
        padding: Zero pixels on every side.
        top: (n,) row of the padded image where the crop begins, in [0, 2 * padding].
        left: (n,) the same for columns.
        flip: (n,) bool, mirrored or not.

    Returns:
        (n, h, w, c), contiguous.
    """
    n, height, width, _ = pixels.shape
    padded = functional.pad(pixels, (0, 0, padding, padding, padding, padding)) if padding else pixels
    across = torch.arange(width, device=pixels.device)
    rows = top[:, None] + torch.arange(height, device=pixels.device)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - across, across)
    image = torch.arange(n, device=pixels.device)
    return padded[image[:, None, None], rows[:, :, None], columns[:, None, :]]


def resized_crop(images: Tensor, boxes: Tensor) -> Tensor:
    """Cut a box out of each image and stretch it to the full size (bilinear).

    Args:
        images: (n, c, h, w) float.
        boxes: (n, 4) top, left, height, width as fractions of the image.
    """
    n, _, height, width = images.shape
    rows = (torch.arange(height, device=images.device) + 0.5) / height
    columns = (torch.arange(width, device=images.device) + 0.5) / width
    y = 2.0 * (boxes[:, 0, None] + boxes[:, 2, None] * rows) - 1.0
    x = 2.0 * (boxes[:, 1, None] + boxes[:, 3, None] * columns) - 1.0
    grid = torch.stack([x[:, None, :].expand(n, height, width), y[:, :, None].expand(n, height, width)], dim=-1)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
