"""From a short description to a data set."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from secateur.data._embedded import read_digits, read_torchvision
from secateur.data._folder import read_image_folder
from secateur.data._image_data import ImageData, TrainAndTest
from secateur.data._parquet import parquet_files, read_parquet
from secateur.errors import DataError

_TORCHVISION = "torchvision:"
_TORCHVISION_ROOT = "data"
_SHOWN = 500


def load_data(
    spec: str | Path,
    *,
    limit: int | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageData:
    """Load a labelled image set; nothing is downloaded.

    Args:
        spec: One of

            - a folder of Hugging Face parquet files (``train-*.parquet`` and ``test-*.parquet``; columns ``img`` or
              ``image`` and ``label``),
            - a folder with ``train`` and ``test`` (or ``val``), each with one folder of images per class,
            - ``torchvision:cifar10`` or ``torchvision:cifar100``, optionally with ``:ROOT`` (``data`` if left out),
            - ``digits``: scikit-learn's 8 x 8 handwritten digits.

        limit: Use only the first so many training images (before validation images are taken from them).
        validation_fraction: Part of the training images that is held out for choosing, class by class.
        seed: Chooses the validation images.
        image_size: Resize to squares of this side, in pixels; None keeps the size that all images share.
        mean: Per channel, of pixels / 255. By default ImageNet's for colour images and 0.5 for grey ones.
        std: The same.

    Returns:
        Three splits with class names and the usual augmentation.

    Raises:
        DataError: If anything of it is missing, damaged or contradictory; the message says what to do.
    """
    if image_size is not None and image_size < 1:
        raise DataError(f"`image_size` must be positive, in pixels; got {image_size}.")
    if not 0.0 < validation_fraction < 1.0:
        raise DataError(
            f"`validation_fraction` must lie in (0, 1), both excluded; got {validation_fraction}. 0.1 is usual."
        )
    sets = _read(spec, limit=limit, image_size=image_size)
    normalisation = sets.train.normalisation.override(mean, std)
    sets = replace(sets, train=sets.train.normalised(normalisation), test=sets.test.normalised(normalisation))
    _warn_of_absent_classes(sets)
    return ImageData.of(sets, validation_fraction=validation_fraction, seed=seed)


def _read(spec: str | Path, *, limit: int | None, image_size: int | None) -> TrainAndTest:
    if spec == "digits":
        return read_digits(limit=limit, image_size=image_size)
    if isinstance(spec, str) and spec.startswith(_TORCHVISION):
        name, _, root = spec.removeprefix(_TORCHVISION).partition(":")
        return read_torchvision(name, Path(root or _TORCHVISION_ROOT), limit=limit, image_size=image_size)
    folder = Path(spec)
    if not os.path.isdir(spec):  # noqa: PTH112 - unlike Path's, it takes any text
        problem = "is a file" if os.path.exists(spec) else "is none of these and there is no such folder"  # noqa: PTH110
        raise DataError(
            "`data` must be a folder (Hugging Face parquet, or train/ and test/ with class folders), "
            f"'torchvision:cifar10[:ROOT]', 'torchvision:cifar100[:ROOT]' or 'digits'; got "
            f"{repr(str(spec))[:_SHOWN]}, which {problem}. Check the path."
        )
    files = parquet_files(folder)
    if files:
        return read_parquet(folder, files, limit=limit, image_size=image_size)
    return read_image_folder(folder, limit=limit, image_size=image_size)


def _warn_of_absent_classes(sets: TrainAndTest) -> None:
    absent = sorted(set(range(len(sets.classes))) - set(sets.train.labels.tolist()))
    if absent:
        warnings.warn(
            f"{sets.name}: {len(absent)} of {len(sets.classes)} classes have no training image, such as "
            f"{sets.classes[absent[0]]!r}.",
            stacklevel=3,
        )
