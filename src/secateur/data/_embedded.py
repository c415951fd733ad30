"""Sets that Python packages bring or know: scikit-learn's digits and torchvision's CIFAR."""

from pathlib import Path

import numpy as np
import torch

from secateur.data._choose import TEST_SEED, hold_out, training_count
from secateur.data._image_data import TrainAndTest, usual_augment
from secateur.data._memory import MemorySplit
from secateur.data._normalise import Normalisation
from secateur.data._pixels import resize_all
from secateur.errors import DataError

DIGITS_NORMALISATION = Normalisation((0.305,), (0.376,))
"""Of the 1,797 digits as bytes / 255, measured: 0.3053 and 0.3761."""

_DIGITS_TEST_FRACTION = 0.2
_DIGITS_LEVELS = 16
_SHOWN = 80

TORCHVISION_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100"}
"""Names after ``torchvision:`` and the classes they stand for."""


def read_digits(*, limit: int | None, image_size: int | None) -> TrainAndTest:
    """The 1,797 handwritten digits of scikit-learn: 1 x 8 x 8, ten classes; a fixed fifth of each class is for test.

    Args:
        limit: Use the first so many training images.
        image_size: Resize to squares of this side.

    Raises:
        DataError: If scikit-learn is not installed.

    References:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (its test set).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("`digits` needs scikit-learn, which is missing. Run: pip install 'secateur[demo]'") from error
    bunch = load_digits()  # pyright: ignore[reportUnknownVariableType]
    levels = np.asarray(bunch.images)  # type: ignore[union-attr]
    images = torch.from_numpy(np.rint(levels * (255 / _DIGITS_LEVELS)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(np.asarray(bunch.target, dtype=np.int64))  # type: ignore[union-attr]
    classes = tuple(str(i) for i in range(10))
    kept, held = hold_out(labels, _DIGITS_TEST_FRACTION, TEST_SEED)
    kept = kept[: training_count(labels[kept], limit, classes)]
    images = resize_all(images, image_size)
    train, test = (MemorySplit(images[index], labels[index], DIGITS_NORMALISATION) for index in (kept, held))
    return TrainAndTest(train, test, classes, "digits", usual_augment(train.size))


def read_torchvision(name: str, root: Path, *, limit: int | None, image_size: int | None) -> TrainAndTest:
    """CIFAR-10 or CIFAR-100 as torchvision stores them; nothing is downloaded.

    The files are pickles; torchvision reads them only after comparing their MD5 with the published one.

    Args:
        name: A key of ``TORCHVISION_SETS``.
        root: The folder that holds ``cifar-10-batches-py`` or ``cifar-100-python``.
        limit: Use the first so many training images.
        image_size: Resize to squares of this side.

    Raises:
        DataError: If the name is unknown or the files are missing or damaged.
    """
    from torchvision import datasets

    if name not in TORCHVISION_SETS:
        raise DataError(
            f"`torchvision:` must be followed by one of {sorted(TORCHVISION_SETS)}; got {repr(name)[:_SHOWN]}. Others "
            "can be given as an image folder or as Hugging Face parquet."
        )
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
    count = training_count(torch.tensor(train_set.targets), limit, classes)
    splits = [
        MemorySplit(
            resize_all(torch.from_numpy(np.asarray(dataset.data[:n])).permute(0, 3, 1, 2), image_size),
            torch.tensor(dataset.targets[:n]),
            Normalisation.usual(3),
        )
        for dataset, n in ((train_set, count), (test_set, None))
    ]
    return TrainAndTest(splits[0], splits[1], classes, name, usual_augment(splits[0].size))
