"""What a split is: labeled images that come in normalized batches.

Images held in memory.

What a data set is: three splits, class names and how its images are normalized and varied."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch
from torch import Tensor

from secateur.data.epoch import Batch, Epoch
from secateur.data.splits import hold_out
from secateur.data.transforms import Augment, Draws, Normalization, crop_box, resized_crop
from secateur.errors import DataError


class Split(Protocol):
    """Labeled images of one split, in a fixed order."""

    @property
    def labels(self) -> Tensor:
        """(n,) int64 class of each image, on the CPU."""
        ...

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height, width of an image as it comes out."""
        ...

    @property
    def normalization(self) -> Normalization:
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

    def normalized(self, normalization: Normalization) -> Self:
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


@dataclass(frozen=True, eq=False)
class MemorySplit:
    """Images held as bytes, on the CPU and on each device that asked for batches; everything runs there in batch.

    Attributes:
        images: (n, c, h, w) uint8.
        labels: (n,) integers, not negative.
        normalization: Applied last.
        classes: How many there are; 0 stands for the highest label + 1.
    """

    images: Tensor
    labels: Tensor
    normalization: Normalization
    classes: int = 0
    _copies: dict[torch.device, Batch] = field(default_factory=dict[torch.device, Batch], init=False, repr=False)

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            shape = tuple(self.images.shape)
            raise DataError(f"`images` must be uint8 of shape (n, c, h, w); got {self.images.dtype} {shape}.")
        if self.images.shape[1] != len(self.normalization.mean):
            raise DataError(
                f"`normalization` must have one mean per channel; got {len(self.normalization.mean)} for "
                f"{self.images.shape[1]} channel(s)."
            )
        object.__setattr__(self, "labels", checked_labels(self.labels, len(self.images)))
        object.__setattr__(self, "classes", checked_classes(self.labels, self.classes))
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
        return MemorySplit(pixels.permute(0, 3, 1, 2), self.labels[index], self.normalization, self.classes)

    def normalized(self, normalization: Normalization) -> "MemorySplit":
        """The same images (shared) with another mean and standard deviation."""
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
    ) -> Iterator[Batch]:
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

    def _batches(self, epoch: Epoch) -> Iterator[Batch]:
        images, labels = self._on(epoch.device)
        pixels, draws = images.permute(0, 2, 3, 1), epoch.draws
        placed = None if draws is None else draws.to(epoch.device)
        boxes = None if draws is None else _boxes(draws, epoch.device)
        for place, chosen in epoch.batches:
            index = chosen.to(epoch.device)
            batch = pixels[index]
            if placed is not None:
                batch = placed.vary(batch, index)
            if boxes is not None:
                batch = resized_crop(batch.permute(0, 3, 1, 2).float(), boxes[index]).permute(0, 2, 3, 1)
            if draws is not None and epoch.policy is not None:
                batch = epoch.policy.vary(batch, draws.keys[chosen.numpy()])
            yield epoch.finish(place, index, batch, labels[index])

    def _on(self, device: torch.device) -> Batch:
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0": one copy for both names
        if device not in self._copies:
            self._copies[device] = (self.images.to(device), self.labels.to(device))
        return self._copies[device]


def _boxes(draws: Draws, device: torch.device) -> Tensor | None:
    if draws.augment.min_area == 1.0:
        return None
    return torch.tensor([crop_box(crop, draws.augment.min_area) for crop in draws.crops.tolist()]).to(device)


_CALIBRATION_EPOCH = 0


@dataclass(frozen=True, eq=False)
class TrainAndTest:
    """What a reader found, before the validation split is taken from the training set.

    Attributes:
        train: Training images, already limited.
        test: Test images.
        classes: Names, by label.
        name: For reports.
        augment: What is usual for such images.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    name: str
    augment: Augment


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labeled image set.

    Attributes:
        train: For training; does not overlap ``validation``.
        validation: Held out of the training set: for choosing (the best epoch, settings).
        test: For the number that is reported; nothing is chosen on it.
        classes: Class names, by label.
        mean: Per channel, of pixels / 255.
        std: The same.
        size: Channels, height, width of an image.
        name: For reports.
        augment: The usual augmentation for these images, to be passed to ``train.batches``.
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
        )


def default_augment(size: tuple[int, int, int]) -> Augment:
    """The usual augmentation of small images: pad by 1/8 of the side (4 at 32 pixels, 1 at 8) and crop.

    Color images are mirrored too; gray ones are not, because most gray sets are characters.

    Args:
        size: Channels, height, width.
    """
    return Augment(padding=max(1, round(min(size[1:]) / 8)), flip=size[0] == 3)


def calibration(
    split: Split, n: int, *, device: torch.device | str = "cpu", batch_size: int = 128, seed: int = 0
) -> tuple[Batch, ...]:
    """A fair sample of a split, without augmentation, as a tuple of batches.

    Args:
        split: Where from; the training split, usually.
        n: Number of images, drawn without replacement.
        device: Where the batches are made.
        batch_size: Images per batch; the last holds the rest.
        seed: Chooses the images.

    Returns:
        ((images, labels), ...) as `Split.batches` gives them.

    Raises:
        DataError: If the split has fewer than ``n`` images.
    """
    if not 1 <= n <= len(split):
        raise DataError(f"`n` must lie between 1 and the {len(split)} images of the split; got {n}.")
    chosen: list[Batch] = []
    missing = n
    for images, labels in split.batches(min(batch_size, n), device=device, seed=seed, epoch=_CALIBRATION_EPOCH):
        chosen.append((_head(images, missing), _head(labels, missing)))
        missing -= len(labels)
        if missing <= 0:
            break
    return tuple(chosen)


def _head(tensor: Tensor, n: int) -> Tensor:
    return tensor if len(tensor) <= n else tensor[:n]
