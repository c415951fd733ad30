"""How images become the floats a model expects, and how training images are varied.

Everything random is a pure function of (seed, epoch, image). Only mixup and CutMix depend on the batch as well: as in
timm, an image is mixed with the one at the same distance from the other end of its batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from secateur._kinds import settings
from secateur.data._buffers import BufferPool
from secateur.data.auto_augment import check_policy
from secateur.errors import DataError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of RGB / 255 over ImageNet, as in torchvision, timm and most published weights."""

GRAY_MEAN, GRAY_STD = (0.5,), (0.5,)

_FLOATS_PER_PART = 2**17
"""Floats normalized at a time: half a megabyte, which fits into a second-level cache."""


@settings
class Normalization:
    """(pixel / 255 - mean) / std, per channel.

    Attributes:
        mean: One number per channel, on the scale [0, 1].
        std: One positive number per channel, on the same scale.
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
    def default(cls, channels: int) -> "Normalization":
        """Return ImageNet's normalization for three channels, mean and deviation 0.5 otherwise."""
        if channels == 3:
            return cls(IMAGENET_MEAN, IMAGENET_STD)
        return cls(GRAY_MEAN * channels, GRAY_STD * channels)

    def override(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> "Normalization":
        """Replace mean, deviation or both, for the same number of channels."""
        new = Normalization(
            self.mean if mean is None else tuple(float(m) for m in mean),
            self.std if std is None else tuple(float(s) for s in std),
        )
        if len(new.mean) != len(self.mean):
            raise DataError(
                f"`mean` and `std` must have one number per channel; got {len(new.mean)} for images with "
                f"{len(self.mean)} channel(s)."
            )
        return new

    def __call__(self, pixels: Tensor, floats: BufferPool | None = None) -> Tensor:
        """Normalize a batch.

        Args:
            pixels: (n, h, w, c) uint8 or float in [0, 255].
            floats: Reused memory for results on the CPU; None allocates new memory.

        Returns:
            (n, c, h, w) float32, channels last in memory.
        """
        # Whole rows, with mean and std repeated along the row, are three times as fast on a CPU as an innermost loop
        # over three channels.
        n, height, width, channels = pixels.shape
        mean = torch.tensor(self.mean, dtype=torch.float32, device=pixels.device).mul_(255.0).repeat(width)
        std = torch.tensor(self.std, dtype=torch.float32, device=pixels.device).mul_(255.0).repeat(width)
        if pixels.device.type == "cpu":
            made = (BufferPool() if floats is None else floats).take((n * height, width * channels))
            _normalize_by_parts(pixels, mean.numpy(), std.numpy(), made)
            return torch.from_numpy(made).view(pixels.shape).permute(0, 3, 1, 2)
        images = pixels.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        images.view(n * height, width * channels).sub_(mean).div_(std)
        return images.permute(0, 3, 1, 2)


def _normalize_by_parts(pixels: Tensor, mean: np.ndarray, std: np.ndarray, made: np.ndarray) -> None:
    """Write (pixels - mean) / std into memory in one thread, in parts that fit into the cache.

    This is numpy because torch's threads wait in a busy loop on the cores that decode the next images, and torch's new
    memory comes in pages of 4 kB, whose first touch takes longer than the arithmetic. numpy asks for large pages.

    Args:
        pixels: (n, h, w, c) on the CPU.
        mean: (w * c,) float32, on the scale of pixels.
        std: (w * c,) float32, on the scale of pixels.
        made: (n * h, w * c) float32, written to.
    """
    bytes_ = (pixels if pixels.dtype == torch.uint8 else pixels.float()).reshape(made.shape).numpy()
    rows = max(1, _FLOATS_PER_PART // len(mean))
    for at in range(0, len(made), rows):
        part = np.subtract(bytes_[at : at + rows], mean, out=made[at : at + rows])
        np.divide(part, std, out=part)


ORDER_STREAM, AUGMENT_STREAM, POLICY_STREAM, ERASE_STREAM, MIX_STREAM = range(5)
"""Third word of the random seed, which makes the order of an epoch and each kind of augmentation independent."""

_LOG_ASPECT = math.log(4 / 3)
"""Aspect ratios of resized crops are log-uniform in [3/4, 4/3] (Szegedy et al., arXiv:1409.4842, Section 6)."""


@settings
class Augment:
    """How training images are varied. The defaults are common for 32 x 32 color images.

    Attributes:
        padding: Zero (black) pixels added on every side before a crop of the original size is taken at random.
            4 for CIFAR (He et al., arXiv:1512.03385, Section 4.2).
        flip: Mirror left and right with probability 1/2.
        min_area: Smallest fraction of the image area that a random resized crop may cover, in (0, 1]; 1 makes no such
            crop. 0.08 is usual for photographs at 224 pixels (arXiv:1409.4842, Section 6).
        auto_augment: A policy of timm by its name there, such as "rand-m9-mstd0.5-inc1" (RandAugment,
            arXiv:1909.13719), "original" (AutoAugment, arXiv:1805.09501) or "augmix-m3-w3" (arXiv:1912.02781), after
            crop and flip; None applies no policy. Gray or color images only.
        erase: Probability that a rectangle of the image is erased, see `draw_erase_boxes`; in [0, 1].
        mixup: Alpha of the Beta distribution that mixes pairs of images and their labels, see `draw_mixes`;
            0 mixes none. 0.2 to 0.8 is usual on photographs.
        cutmix: Alpha of the Beta distribution for pasting a part of one image into the other; 0 pastes none, 1.0 is
            usual. With both, each batch gets one of the two, with equal probability.
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
        """Whether labels become probabilities, (n, classes) float32."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, eq=False)
class EpochDraws:
    """One epoch's random choices, one row per image of the split (not per position in the epoch).

    Because a row belongs to an image, the same image is varied in the same way whatever the batch size, the order
    and the device.

    Attributes:
        augment: The settings.
        top: (n,) int64 rows by which the padded image is shifted, in [0, 2 * padding].
        left: (n,) int64 columns, likewise.
        flip: (n,) bool, whether the image is mirrored.
        crops: (n, 4) float64, uniform in [0, 1): area, aspect, down, right of a resized crop (see `crop_box`).
        keys: (n,) uint64, seeds of the policies of timm.
    """

    augment: Augment
    top: Tensor
    left: Tensor
    flip: Tensor
    crops: np.ndarray
    keys: np.ndarray

    @classmethod
    def of_epoch(cls, augment: Augment, n: int, *, seed: int, epoch: int) -> "EpochDraws":
        """Draw for ``n`` images; the global random state is neither read nor changed."""
        random = np.random.default_rng((seed, epoch, AUGMENT_STREAM))
        shifts = torch.from_numpy(random.integers(0, 2 * augment.padding + 1, size=(2, n)))
        flip = torch.from_numpy(random.random(n) < 0.5) & augment.flip
        crops = random.random((n, 4)) if augment.min_area < 1.0 else np.empty((n, 0))
        keys = np.random.default_rng((seed, epoch, POLICY_STREAM)).integers(2**64, size=n, dtype=np.uint64)
        return cls(augment, shifts[0], shifts[1], flip, crops, keys)

    def to(self, device: torch.device) -> "EpochDraws":
        """Return the same choices with the tensors on another device."""
        return replace(self, top=self.top.to(device), left=self.left.to(device), flip=self.flip.to(device))

    def apply(self, pixels: Tensor, index: Tensor) -> Tensor:
        """Shift and mirror the (n, h, w, c) pixels of the images at ``index``, on the device of the draws."""
        return shift_and_flip(pixels, self.augment.padding, self.top[index], self.left[index], self.flip[index])

    def apply_to_image(self, pixels: np.ndarray, i: int, place: np.ndarray) -> None:
        """Write the shifted and mirrored (h, w, c) pixels of image i into ``place``; for draws on the CPU."""
        height, width, channels = pixels.shape
        padding = self.augment.padding
        if padding:
            top, left = int(self.top[i]), int(self.left[i])
            padded = np.pad(pixels, ((padding, padding), (padding, padding), (0, 0)))
            pixels = padded[top : top + height, left : left + width]
        # Copying pixel by pixel takes less than half the time of copying byte by byte.
        whole = np.dtype((np.void, channels))
        pixels, place = pixels.view(whole), place.view(whole)
        np.copyto(place, pixels[:, ::-1] if self.flip.numpy()[i] else pixels)


def crop_box(crop: Sequence[float], min_area: float, stretch: float = 1.0) -> tuple[float, float, float, float]:
    """Turn uniform numbers into a box, in fractions of an image.

    Area a is uniform in [min_area, 1], aspect r log-uniform in [3/4, 4/3] (times ``stretch``); then height = sqrt(a/r),
    width = sqrt(a*r), and the position is uniform. A side that would be longer than the image is cut to it, where
    torchvision draws again. Cutting keeps the number of draws fixed and differs only for crops of nearly the whole.

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
        left: (n,) column where the crop begins, likewise.
        flip: (n,) bool, whether the image is mirrored.

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
    """Cut a box out of each image and resize it to the full size (bilinear).

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


Box = tuple[int, int, int, int]
"""Top, bottom, left, right, in pixels; bottom and right exclusive."""


@dataclass(frozen=True)
class Mix:
    """How one batch is mixed.

    Attributes:
        share: lambda, the weight of an image's own label, in [0, 1].
        box: The part that is pasted from the other image; None averages the whole images.
    """

    share: float
    box: Box | None = None

    def mix_images_(self, images: Tensor) -> Tensor:
        """Mix (n, c, h, w) images in place.

        With x' the images of the batch in reverse order, the result is lambda * x + (1 - lambda) * x' without a box,
        else x' inside the box and x outside.
        """
        if self.box is None:
            return images.copy_(images * self.share + images.flip(0) * (1.0 - self.share))
        top, bottom, left, right = self.box
        images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
        return images

    def mix_labels(self, labels: Tensor, classes: int) -> Tensor:
        """Return (n, classes) float32: lambda for an image's own class plus 1 - lambda for that of the other image."""
        own = functional.one_hot(labels, classes).float()
        return own * self.share + own.flip(0) * (1.0 - self.share)


def draw_mixes(augment: Augment, batches: int, height: int, width: int, *, seed: int, epoch: int) -> tuple[Mix, ...]:
    """Draw a mix for each batch of an epoch, in order; the global random state is neither read nor changed.

    lambda ~ Beta(alpha, alpha). For CutMix a box of the sides floor(h sqrt(1 - lambda)) and floor(w sqrt(1 - lambda))
    is laid around a pixel drawn uniformly and cut to the image; lambda then becomes 1 - its area / (h w), the part that
    remains of the image. These are the formulas of ``timm.data.Mixup``, with its default modes (one draw per batch).

    Args:
        augment: With a positive ``mixup`` or ``cutmix``.
        batches: Number of batches.
        height: h, height of the images in pixels.
        width: w, width of the images in pixels.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.

    References:
        Zhang et al. (mixup), arXiv:1710.09412, Eq. (1) and Section 2; Yun et al. (CutMix), arXiv:1905.04899, Eq. (1)
        and (2).
    """
    random = np.random.default_rng((seed, epoch, MIX_STREAM))
    return tuple(_draw_mix(augment, height, width, random) for _ in range(batches))


def _draw_mix(augment: Augment, height: int, width: int, random: np.random.Generator) -> Mix:
    pastes = augment.cutmix > 0 and (augment.mixup == 0 or random.random() < 0.5)
    if not pastes:
        return Mix(float(random.beta(augment.mixup, augment.mixup)))
    box = draw_paste_box(float(random.beta(augment.cutmix, augment.cutmix)), height, width, random)
    top, bottom, left, right = box
    return Mix(1.0 - (bottom - top) * (right - left) / (height * width), box)


def draw_paste_box(share: float, height: int, width: int, random: np.random.Generator) -> Box:
    """Draw the box of CutMix for a lambda, see `draw_mixes`."""
    side = np.sqrt(1.0 - share)
    down, across = int(height * side), int(width * side)
    y, x = int(random.integers(height)), int(random.integers(width))
    return (
        max(y - down // 2, 0),
        min(y + (down + 1) // 2, height),
        max(x - across // 2, 0),
        min(x + (across + 1) // 2, width),
    )


_ERASED_AREA = (0.02, 1 / 3)
_ERASED_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
"""Fraction of the image area and height / width: those of timm, and of the paper except for its largest area, 0.4."""


def draw_erase_boxes(n: int, probability: float, height: int, width: int, *, seed: int, epoch: int) -> Tensor:
    """Draw a box for every image of a set; the global random state is neither read nor changed.

    With probability p: area a uniform in [0.02, 1/3] of the image, aspect r log-uniform in [0.3, 1/0.3], sides
    round(sqrt(a h w r)) and round(sqrt(a h w / r)), position uniform. A side that is longer than the image is cut to
    it; timm draws again instead. Cutting keeps the number of draws fixed, and few boxes are so long.

    Args:
        n: Number of images.
        probability: p, the probability that an image gets a box.
        height: h, height of the images in pixels.
        width: w, width of the images in pixels.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.

    Returns:
        (n, 4) int64: top, left, bottom, right (exclusive); all zero where nothing is erased.

    References:
        Zhong et al., arXiv:1708.04896, Algorithm 1.
    """
    draws = np.random.default_rng((seed, epoch, ERASE_STREAM)).random((n, 5))
    area = (_ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * draws[:, 1]) * height * width
    aspect = np.exp(_ERASED_LOG_ASPECT[0] + (_ERASED_LOG_ASPECT[1] - _ERASED_LOG_ASPECT[0]) * draws[:, 2])
    down = np.minimum(np.rint(np.sqrt(area * aspect)), height)
    across = np.minimum(np.rint(np.sqrt(area / aspect)), width)
    top = np.floor(draws[:, 3] * (height - down + 1))
    left = np.floor(draws[:, 4] * (width - across + 1))
    boxes = np.stack([top, left, top + down, left + across], axis=1) * (draws[:, :1] < probability)
    return torch.from_numpy(boxes.astype(np.int64))


def erase_(images: Tensor, boxes: Tensor) -> Tensor:
    """Set the inside of each image's box to 0, which is the mean color of normalized images.

    Args:
        images: (n, c, h, w), changed in place.
        boxes: (n, 4) top, left, bottom, right, on their device.
    """
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside_rows = (rows >= boxes[:, 0, None]) & (rows < boxes[:, 2, None])
    inside_columns = (columns >= boxes[:, 1, None]) & (columns < boxes[:, 3, None])
    return images.masked_fill_((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0.0)
