"""Image data: `ImageData` with its three splits, the interface `Split`, and `MemorySplit` for images held in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from secateur._batches import batch_length, take
from secateur.data.epoch import Epoch, ImageBatch, SplitInfo
from secateur.data.preprocessing import Preprocessing, Resizing
from secateur.data.transforms import Augment, EpochDraws, Normalization, crop_box, resized_crop
from secateur.errors import DataError


class Split(SplitInfo, Protocol):
    """Labeled images of one split, in a fixed order."""

    @property
    def labels(self) -> Tensor:
        """(n,) int64 class of each image, on the CPU."""
        ...

    def subset(self, index: Tensor) -> Self:
        """Return the images at some positions, in that order."""
        ...

    def normalized(self, normalization: Normalization) -> Self:
        """Return the same images with another mean and standard deviation."""
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
    ) -> Iterator[ImageBatch]:
        """Yield the batches of one pass: a pure function of the arguments, whatever the global random state.

        How an image is varied depends on (seed, epoch, image) alone, not on its batch, the device or the number of
        threads. Only mixup and CutMix, which mix the images of a batch, depend on the batches too.

        Args:
            batch_size: Images per batch, positive; the last batch holds the rest.
            device: The device of the batches.
            seed: Seed of order and augmentation; None keeps the fixed order.
            epoch: Number of the epoch; each has its own order and augmentation for the same seed.
            augment: How the images are varied; needs a seed.
            drop_last: Leave out a last batch that is not full.
            start: Number of batches to skip, as if they had been read; nothing of them is decoded.

        Raises:
            DataError: If a setting is out of range, or an image cannot be read (at the batch that needs it).
        """
        ...


@dataclass(frozen=True, eq=False)
class TrainAndTest:
    """What is read from disk, before the validation split is taken from the training set.

    Attributes:
        train: Training images, already limited.
        test: Test images.
        classes: Class names, by label.
        name: Name of the data in reports.
        augment: The default augmentation for such images.
        skipped: Names of the images that were left out because they cannot be used.
        resizing: How the images got their size.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    name: str
    augment: Augment
    skipped: tuple[str, ...] = ()
    resizing: Resizing = Resizing()  # noqa: RUF009 - frozen


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labeled image data set.

    Attributes:
        train: Training images; they do not overlap ``validation``.
        validation: Images held out of the training set, on which epochs and settings are chosen.
        test: Images for the reported accuracy; nothing is chosen on them.
        classes: Class names, by label.
        mean: Mean of pixels / 255, per channel.
        std: Standard deviation of pixels / 255, per channel.
        size: Channels, height, width of an image.
        name: Name of the data in reports.
        augment: The default augmentation for these images, to be passed to ``train.batches``.
        skipped: Names of the images that were left out because they cannot be used.
        preprocessing: How an image file becomes an input; None if nobody has said.
    """

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int, int]
    name: str
    augment: Augment
    skipped: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None

    @classmethod
    def of(cls, sets: TrainAndTest, *, validation_fraction: float, seed: int) -> "ImageData":
        """Take the validation split from the training set, stratified by class.

        Raises:
            DataError: If train and test images differ in size, or no image can be held out.
        """
        if sets.train.size != sets.test.size:
            raise DataError(
                f"training and test images must have the same (channels, height, width); got {sets.train.size} and "
                f"{sets.test.size} in {sets.name}. Pass `image_size`, or make them all gray or all color."
            )
        kept, held = hold_out(sets.train.labels, validation_fraction, seed)
        normalization = sets.train.normalization
        return cls(
            train=sets.train.subset(kept),
            validation=sets.train.subset(held),
            test=sets.test,
            classes=sets.classes,
            mean=normalization.mean,
            std=normalization.std,
            size=sets.train.size,
            name=sets.name,
            augment=sets.augment,
            skipped=sets.skipped,
            preprocessing=Preprocessing(
                sets.train.size[1:],
                sets.resizing.mode,
                sets.resizing.crop_fraction,
                sets.resizing.interpolation,
                normalization.mean,
                normalization.std,
                sets.train.size[0],
            ),
        )


@dataclass(frozen=True, eq=False)
class MemorySplit:
    """Images held as bytes in memory, and on each device that asks for batches, which are computed there.

    Attributes:
        images: (n, c, h, w) uint8.
        labels: (n,) integers, not negative.
        normalization: Applied last.
        classes: Number of classes; 0 stands for the highest label + 1.
    """

    images: Tensor
    labels: Tensor
    normalization: Normalization
    classes: int = 0
    _copies: dict[torch.device, ImageBatch] = field(
        default_factory=dict[torch.device, ImageBatch], init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            shape = tuple(self.images.shape)
            raise DataError(f"`images` must be uint8 of shape (n, c, h, w); got {self.images.dtype} {shape}.")
        if self.images.shape[1] != len(self.normalization.mean):
            raise DataError(
                f"`normalization` must have one mean per channel; got {len(self.normalization.mean)} for "
                f"{self.images.shape[1]} channel(s)."
            )
        object.__setattr__(self, "labels", validate_labels(self.labels, len(self.images)))
        object.__setattr__(self, "classes", resolve_class_count(self.labels, self.classes))
        object.__setattr__(self, "images", self.images.contiguous(memory_format=torch.channels_last))

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> "MemorySplit":
        """Return copies of the images at some positions, in that order."""
        pixels = self.images.permute(0, 2, 3, 1)[index]  # Contiguous in this order, so that there is only one copy.
        return MemorySplit(pixels.permute(0, 3, 1, 2), self.labels[index], self.normalization, self.classes)

    def normalized(self, normalization: Normalization) -> "MemorySplit":
        """Return the same images (shared) with another mean and standard deviation."""
        return MemorySplit(self.images, self.labels, normalization, self.classes)

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
    ) -> Iterator[ImageBatch]:
        """See `Split.batches`."""
        return self._batches(
            Epoch.of(
                self,
                batch_size,
                device=device,
                seed=seed,
                epoch=epoch,
                augment=augment,
                drop_last=drop_last,
                start=start,
            )
        )

    def _batches(self, epoch: Epoch) -> Iterator[ImageBatch]:
        images, labels = self._copy_on(epoch.device)
        pixels, draws = images.permute(0, 2, 3, 1), epoch.draws
        placed = None if draws is None else draws.to(epoch.device)
        boxes = None if draws is None else _crop_boxes(draws, epoch.device)
        for place, chosen in epoch.batches:
            index = chosen.to(epoch.device)
            batch = pixels[index]
            if placed is not None:
                batch = placed.apply(batch, index)
            if boxes is not None:
                batch = resized_crop(batch.permute(0, 3, 1, 2).float(), boxes[index]).permute(0, 2, 3, 1)
            if draws is not None and epoch.policy is not None:
                batch = epoch.policy.apply(batch, draws.keys[chosen.numpy()])
            yield epoch.finish(place, index, batch, labels[index])

    def _copy_on(self, device: torch.device) -> ImageBatch:
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", so that both share a copy.
        if device not in self._copies:
            self._copies[device] = (self.images.to(device), self.labels.to(device))
        return self._copies[device]


def resolve_class_count(labels: Tensor, classes: int) -> int:
    """Return the number of classes; 0 stands for the fewest that the labels allow."""
    fewest = int(labels.max()) + 1
    if classes and classes < fewest:
        raise DataError(f"`classes` must be more than the highest label, {fewest - 1}; got {classes}.")
    return classes or fewest


def validate_labels(labels: Tensor, n: int) -> Tensor:
    """Return the labels as int64 on the CPU, one per image, or refuse them."""
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != n:
        raise DataError(f"`labels` must be {n} integers, one per image; got {labels.dtype} {tuple(labels.shape)}.")
    if n == 0:
        raise DataError("`images` must hold at least one image; got an empty set.")
    if int(labels.min()) < 0:
        raise DataError(f"`labels` must not be negative; got {int(labels.min())}.")
    return labels.to("cpu", torch.int64)


def _crop_boxes(draws: EpochDraws, device: torch.device) -> Tensor | None:
    if draws.augment.min_area == 1.0:
        return None
    return torch.tensor([crop_box(crop, draws.augment.min_area) for crop in draws.crops.tolist()]).to(device)


def with_normalization(data: ImageData, mean: Sequence[float], std: Sequence[float]) -> ImageData:
    """Return the same images with another mean and standard deviation of pixels / 255, one number per channel."""
    found = Normalization(tuple(mean), tuple(std))
    train, validation, test = (split.normalized(found) for split in (data.train, data.validation, data.test))
    rule = None if data.preprocessing is None else replace(data.preprocessing, mean=found.mean, std=found.std)
    return replace(
        data, train=train, validation=validation, test=test, mean=found.mean, std=found.std, preprocessing=rule
    )


_CALIBRATION_EPOCH = 0


def default_augment(size: tuple[int, int, int]) -> Augment:
    """Return the usual augmentation of small images: pad by 1/8 of the side (4 at 32 pixels, 1 at 8) and crop.

    Color images are mirrored too; gray ones are not, because most gray sets are characters.

    Args:
        size: Channels, height, width.
    """
    return Augment(padding=max(1, round(min(size[1:]) / 8)), flip=size[0] == 3)


def draw_calibration(
    split: Any, n: int, *, device: torch.device | str = "cpu", batch_size: int = 128, seed: int = 0
) -> tuple[tuple[Any, Any], ...]:
    """Draw random images of a split, without augmentation, as a tuple of batches.

    Args:
        split: The split to draw from, usually the training split; any with `Split.batches`.
        n: Number of images, drawn without replacement.
        device: The device of the batches.
        batch_size: Images per batch; the last batch holds the rest.
        seed: Random seed.

    Returns:
        ((images, labels), ...) as `Split.batches` yields them.

    Raises:
        DataError: If the split has fewer than ``n`` images.
    """
    if not 1 <= n <= len(split):
        raise DataError(f"`n` must lie between 1 and the {len(split)} images of the split; got {n}.")
    chosen: list[ImageBatch] = []
    missing = n
    for images, labels in split.batches(min(batch_size, n), device=device, seed=seed, epoch=_CALIBRATION_EPOCH):
        chosen.append((take(images, slice(missing)), take(labels, slice(missing))))
        missing -= batch_length(images)
        if missing <= 0:
            break
    return tuple(chosen)


def guessing_accuracy(split: object, classes: int) -> float:
    """Return the accuracy of always naming the most frequent class of a split, the best that can be done blindly.

    Args:
        split: Its labels are counted; one that does not say its labels counts as balanced.
        classes: Number of classes.
    """
    labels = getattr(split, "labels", None)
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or not len(labels):
        return 1 / classes
    return float(labels.unique(return_counts=True)[1].max()) / len(labels)


TEST_SEED = 0
"""Seed of the test split of sets that have none. It is fixed, so that everybody tests on the same images."""


def count_training_images(labels: Tensor, limit: int | None, classes: Sequence[str]) -> int:
    """Return the number of training images to use.

    Args:
        labels: (n,) classes of the whole training set.
        limit: Number of images to use, the first ones; None uses all.
        classes: Class names, by label.

    Raises:
        DataError: If ``limit`` is more than there are, or leaves a class without an image.
    """
    n = len(labels)
    if limit is None:
        return n
    if not 1 <= limit <= n:
        raise DataError(f"`limit` must lie between 1 and the {n} training images there are; got {limit}.")
    absent = sorted(set(labels.tolist()) - set(labels[:limit].tolist()))
    if absent:
        raise DataError(
            f"`limit` must hold at least one image of each class; the first {limit} training images have none of "
            f"class {classes[absent[0]]!r} ({len(absent)} of {len(classes)} classes are absent). Raise it."
        )
    return limit


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split positions into two parts, class by class, so that both have the classes in the same proportion.

    The number held out is round(fraction * n), at least 1. Each class gives its share rounded down and the classes
    with the largest remainders one more (Hamilton's method); a class always keeps one image.

    Args:
        labels: (n,) classes.
        fraction: Fraction of the images to hold out, in (0, 1).
        seed: Random seed.

    Returns:
        Positions kept and positions held out, both increasing.

    Raises:
        DataError: If the fraction is outside (0, 1) or no class can spare an image.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"`validation_fraction` must lie in (0, 1), both excluded; got {fraction}. 0.1 is usual.")
    if seed < 0:
        raise DataError(f"`seed` must not be negative; got {seed}.")
    random = np.random.default_rng(seed)
    array = labels.numpy()
    counts = np.bincount(array)
    wanted = max(1, round(fraction * len(array)))
    quotas = fraction * counts
    taken = np.minimum(np.floor(quotas).astype(np.int64), np.maximum(counts - 1, 0))
    for c in np.argsort(-(quotas - np.floor(quotas)), kind="stable"):
        if taken.sum() < wanted and taken[c] < counts[c] - 1:
            taken[c] += 1
    if not taken.any():
        raise DataError(
            f"`validation_fraction` must leave something to validate on; got {fraction} of {len(array)} training "
            f"images, of which no class has two. Use more images."
        )
    shuffled = random.permutation(len(array))
    by_class = shuffled[np.argsort(array[shuffled], kind="stable")]
    rank = np.arange(len(array)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = np.zeros(len(array), dtype=bool)
    held[by_class] = rank < np.repeat(taken, counts)
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
