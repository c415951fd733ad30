"""`load_data`: image data by a short description, including the sets of scikit-learn and torchvision."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur._kinds import checked
from secateur.data.dataset import (
    TEST_SEED,
    ImageData,
    MemorySplit,
    TrainAndTest,
    count_training_images,
    default_augment,
    hold_out,
)
from secateur.data.images import read_image_folder, resize_images
from secateur.data.parquet import parquet_files, read_parquet
from secateur.data.preprocessing import ResizeMode, Resizing, check_channels
from secateur.data.transforms import Normalization
from secateur.errors import DataError

DIGITS_NORMALIZATION = Normalization((0.305,), (0.376,))
"""Measured mean and standard deviation of the 1,797 digits as bytes / 255: 0.3053 and 0.3761."""
TORCHVISION_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
"""Names after ``torchvision:``, and torchvision's classes."""
_DIGITS_TEST_FRACTION = 0.2
_DIGITS_LEVELS = 16
_SQUASHED = Resizing(ResizeMode.SQUASH)
"""How sets that are no files get their size."""
_NO_SKLEARN = "`digits` needs scikit-learn, which is missing. Run: pip install 'secateur[demo]'"
_TORCHVISION = "torchvision:"
_TORCHVISION_ROOT = "data"
_MAX_NAME_SHOWN = 80
_MAX_SPEC_SHOWN = 500


@checked
def load_data(
    spec: str | Path,
    *,
    limit: int | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    image_size: int | tuple[int, int] | None = None,
    usual_size: tuple[int, int] | None = None,
    resizing: Resizing | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    skip_bad_images: bool = False,
) -> ImageData:
    """Load a labeled image set; nothing is downloaded.

    Args:
        spec: One of

            - a folder of Hugging Face parquet files (``train-*.parquet`` and ``test-*.parquet``; columns ``img`` or
              ``image`` and ``label``),
            - a folder with ``train`` and ``test`` (or ``val``), each with one folder of images per class,
            - ``torchvision:cifar10`` or ``torchvision:cifar100``, optionally with ``:ROOT`` (``data`` if left out),
            - ``digits``: scikit-learn's 8 x 8 handwritten digits.

        limit: Number of training images to use, the first ones, including those held out; None uses all.
        validation_fraction: Fraction of the training images that is held out for validation, class by class.
        seed: Seed of the choice of validation images.
        image_size: Height and width to resize to, in pixels, or the side of squares; None keeps the size that all
            images share.
        usual_size: Height and width for folders of images of different sizes without ``image_size``; None refuses them.
        resizing: How files get the size. None crops the center: of streamed photographs 0.875 of the shorter side, of
            images in memory all of it.
        channels: 1 to 16 channels: 1 for gray, 2 for gray with transparency, 3 for color, 4 for color with
            transparency, more for TIFFs with a page for each. None takes 1 or 3, and refuses transparent images.
        mean: Mean of pixels / 255 per channel. By default ImageNet's for color images and 0.5 for gray ones.
        std: Standard deviation of pixels / 255 per channel, with the same defaults.
        skip_bad_images: Leave out images that cannot be decoded, with a warning that names them; by default they are
            an error that names them.

    Returns:
        Three splits with class names and the default augmentation.

    Raises:
        DataError: If something is missing, damaged or contradictory; the message says what to do.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and min(size) < 1:
        raise DataError(f"`image_size` must be positive, in pixels; got {image_size}.")
    if channels is not None:
        check_channels(channels)
    if not 0.0 < validation_fraction < 1.0:
        raise DataError(
            f"`validation_fraction` must lie in (0, 1), both excluded; got {validation_fraction}. 0.1 is usual."
        )
    sets = _read(
        spec,
        limit=limit,
        image_size=size,
        usual_size=usual_size,
        resizing=resizing,
        channels=channels,
        skip_bad_images=skip_bad_images,
    )
    normalization = sets.train.normalization.override(mean, std)
    sets = replace(sets, train=sets.train.normalized(normalization), test=sets.test.normalized(normalization))
    _warn_of_absent_classes(sets)
    return ImageData.of(sets, validation_fraction=validation_fraction, seed=seed)


def check_data(spec: str | Path) -> None:
    """Refuse a description of data that names none, without reading any image.

    Raises:
        DataError: If it is none of those of `load_data`, or the folder or library is missing.
    """
    if spec == "digits":
        if find_spec("sklearn") is None:
            raise DataError(_NO_SKLEARN)
        return
    if isinstance(spec, str) and spec.startswith(_TORCHVISION):
        _check_torchvision_name(spec.removeprefix(_TORCHVISION).partition(":")[0])
        return
    if not os.path.isdir(spec):  # noqa: PTH112 - unlike Path's, it takes any text
        problem = "is a file" if os.path.exists(spec) else "is none of these and there is no such folder"  # noqa: PTH110
        raise DataError(
            "`data` must be a folder (Hugging Face parquet, or train/ and test/ with class folders), "
            f"'torchvision:cifar10[:ROOT]', 'torchvision:cifar100[:ROOT]' or 'digits'; got "
            f"{repr(str(spec))[:_MAX_SPEC_SHOWN]}, which {problem}. Check the path."
        )


def _check_torchvision_name(name: str) -> None:
    if name not in TORCHVISION_SETS:
        raise DataError(
            f"`torchvision:` must be followed by one of {sorted(TORCHVISION_SETS)}; got "
            f"{repr(name)[:_MAX_NAME_SHOWN]}. Other data can be given as an image folder or as Hugging Face parquet."
        )


def _read(
    spec: str | Path,
    *,
    limit: int | None,
    image_size: tuple[int, int] | None,
    usual_size: tuple[int, int] | None,
    resizing: Resizing | None,
    channels: int | None,
    skip_bad_images: bool,
) -> TrainAndTest:
    named = isinstance(spec, str) and spec.startswith(_TORCHVISION)
    if spec == "digits" or named:
        has = 3 if named else 1
        if channels not in (None, has):
            raise DataError(f"`channels` must be {has} for {spec}; got {channels}. Leave it out.")
    if spec == "digits":
        return read_digits(limit=limit, image_size=image_size)
    if named:
        name, _, root = str(spec).removeprefix(_TORCHVISION).partition(":")
        return read_torchvision(name, Path(root or _TORCHVISION_ROOT), limit=limit, image_size=image_size)
    check_data(spec)
    folder, files = Path(spec), parquet_files(Path(spec))
    settings: dict[str, Any] = {
        "limit": limit,
        "image_size": image_size,
        "resizing": resizing,
        "channels": channels,
        "skip_bad_images": skip_bad_images,
    }
    if files:
        return read_parquet(folder, files, **settings)
    return read_image_folder(folder, usual_size=usual_size, **settings)


def _warn_of_absent_classes(sets: TrainAndTest) -> None:
    absent = sorted(set(range(len(sets.classes))) - set(sets.train.labels.tolist()))
    if absent:
        warnings.warn(
            f"{sets.name}: {len(absent)} of {len(sets.classes)} classes have no training image, such as "
            f"{sets.classes[absent[0]]!r}.",
            stacklevel=3,
        )


def read_digits(*, limit: int | None, image_size: tuple[int, int] | None) -> TrainAndTest:
    """Read the 1,797 handwritten digits of scikit-learn: 1 x 8 x 8, ten classes. A fixed fifth of each is for testing.

    Args:
        limit: Number of training images to use, the first ones; None uses all.
        image_size: Height and width to resize to, in pixels; None keeps 8.

    Raises:
        DataError: If scikit-learn is not installed.

    References:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test set).
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="joblib")  # It reports a system without /dev/shm; no matter here.
            from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(_NO_SKLEARN) from error
    bunch = load_digits()  # pyright: ignore[reportUnknownVariableType]
    levels = np.asarray(bunch.images)  # type: ignore[union-attr]
    images = torch.from_numpy(np.rint(levels * (255 / _DIGITS_LEVELS)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))  # type: ignore[union-attr]
    classes = tuple(str(i) for i in range(10))
    kept, held = hold_out(labels, _DIGITS_TEST_FRACTION, TEST_SEED)
    kept = kept[: count_training_images(labels[kept], limit, classes)]
    images = resize_images(images, image_size)
    train, test = (MemorySplit(images[index], labels[index], DIGITS_NORMALIZATION) for index in (kept, held))
    return TrainAndTest(train, test, classes, "digits", default_augment(train.size), resizing=_SQUASHED)


def read_torchvision(name: str, root: Path, *, limit: int | None, image_size: tuple[int, int] | None) -> TrainAndTest:
    """Read CIFAR-10 or CIFAR-100 as torchvision stores them; nothing is downloaded.

    The files are pickles; torchvision reads them only after comparing their MD5 with the published one.

    Args:
        name: A key of ``TORCHVISION_SETS``.
        root: The folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        limit: Number of training images to use, the first ones; None uses all.
        image_size: Height and width to resize to, in pixels; None keeps 32.

    Raises:
        DataError: If the name is unknown or the files are missing or damaged.
    """
    from torchvision import datasets

    _check_torchvision_name(name)
    kind = getattr(datasets, TORCHVISION_SETS[name])
    try:
        train_set, test_set = kind(root=str(root), train=True), kind(root=str(root), train=False)
    except (RuntimeError, OSError, ValueError) as error:
        command = f"torchvision.datasets.{TORCHVISION_SETS[name]}({str(root)!r}, download=True)"
        raise DataError(
            f"{root} must hold torchvision's {name}; it is missing or damaged. Download it with {command}, or name "
            f"the folder: torchvision:{name}:FOLDER."
        ) from error
    classes: tuple[str, ...] = tuple(train_set.classes)
    count = count_training_images(torch.tensor(train_set.targets), limit, classes)
    splits = [
        MemorySplit(
            resize_images(torch.from_numpy(np.asarray(dataset.data[:n])).permute(0, 3, 1, 2), image_size),
            torch.tensor(dataset.targets[:n]),
            Normalization.default(3),
        )
        for dataset, n in ((train_set, count), (test_set, None))
    ]
    return TrainAndTest(splits[0], splits[1], classes, name, default_augment(splits[0].size), resizing=_SQUASHED)
