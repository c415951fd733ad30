"""What a data set is: three splits, class names and how its images are normalised and varied."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.data._augment import Augment
from secateur.data._choose import hold_out
from secateur.data._finish import Batch
from secateur.data._split import Split
from secateur.errors import DataError

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
    """A labelled image set.

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
                f"{sets.test.size} in {sets.name}. Pass `image_size`, or make them all grey or all colour."
            )
        kept, held = hold_out(sets.train.labels, validation_fraction, seed)
        normalisation = sets.train.normalisation
        return cls(
            train=sets.train.subset(kept),
            validation=sets.train.subset(held),
            test=sets.test,
            classes=sets.classes,
            mean=normalisation.mean,
            std=normalisation.std,
            size=sets.train.size,
            name=sets.name,
            augment=sets.augment,
        )


def usual_augment(size: tuple[int, int, int]) -> Augment:
    """The usual augmentation of small images: pad by 1/8 of the side (4 at 32 pixels, 1 at 8) and crop.

    Colour images are mirrored too; grey ones are not, because most grey sets are characters.

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
