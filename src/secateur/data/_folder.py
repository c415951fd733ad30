"""Image folders: one subfolder per class; small ones are read into memory, large ones are streamed."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from secateur.data._ahead import filled_ahead
from secateur.data._augment import Augment, Draws, crop_box
from secateur.data._choose import training_count
from secateur.data._epoch import Epoch
from secateur.data._finish import Batch
from secateur.data._image_data import TrainAndTest, usual_augment
from secateur.data._memory import MemorySplit
from secateur.data._normalise import Normalisation
from secateur.data._pixels import MEMORY_LIMIT, decode_all, fit_square, open_image, probe, worker_count
from secateur.data._split import Split, checked_classes, checked_labels
from secateur.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
TEST_FOLDERS = ("test", "val", "validation", "valid")
"""Where test images are looked for, in this order."""

CROP_FRACTION = 0.875
"""224 / 256: the central part of a resized photograph that is evaluated (Krizhevsky et al., NeurIPS 2012)."""

PHOTOGRAPH_MIN_AREA = 0.08
"""Of random resized crops in training (Szegedy et al., arXiv:1409.4842, Section 6)."""

_PROBED = 64


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Image files decoded, cropped and resized by threads while they are needed; mirrored and normalised in batch.

    Without augmentation the shorter side is resized to side / 0.875 and the central square kept, unless the image
    has the size already. With ``Augment.min_area`` below 1 a random box is resized instead; a JPEG is then decoded at a
    half, a quarter or an eighth of its size where the box has more than enough pixels.

    Attributes:
        paths: The files.
        labels: (n,) integers, not negative.
        size: Channels, height, width of the images made; height = width.
        normalisation: Applied last.
        classes: How many there are; 0 stands for the highest label + 1.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    size: tuple[int, int, int]
    normalisation: Normalisation
    classes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", checked_labels(self.labels, len(self.paths)))
        object.__setattr__(self, "classes", checked_classes(self.labels, self.classes))
        if self.size[0] not in (1, 3) or self.size[1] != self.size[2]:
            raise DataError(f"`size` must be 1 or 3 channels and a square; got {self.size}.")

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Tensor) -> "FolderSplit":
        """The images at some positions, in that order."""
        return replace(self, paths=tuple(self.paths[i] for i in index.tolist()), labels=self.labels[index])

    def normalised(self, normalisation: Normalisation) -> "FolderSplit":
        """The same images with another mean and standard deviation."""
        return replace(self, normalisation=normalisation)

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
        channels, height, width = self.size

        def fill(i: int, place: np.ndarray) -> None:
            array = self._image(i, epoch.draws)
            if epoch.draws is None:
                np.copyto(place, array)
                return
            epoch.draws.vary_one(array, i, place)
            if epoch.policy is not None:
                np.copyto(place, epoch.policy(place, int(epoch.draws.keys[i])))

        ahead = filled_ahead(epoch.batches, (height, width, channels), fill, worker_count())
        for place, chosen, pixels in ahead:
            index = chosen.to(epoch.device)
            yield epoch.finish(place, index, pixels.to(epoch.device), self.labels[chosen].to(epoch.device))

    def _image(self, i: int, draws: Draws | None) -> np.ndarray:
        if draws is not None and draws.augment.min_area < 1.0:
            array = np.asarray(self._cropped(i, draws))
        else:
            array = np.asarray(fit_square(self._opened(i), self.size[1], CROP_FRACTION))
        return array[..., None] if array.ndim == 2 else array

    def _cropped(self, i: int, draws: Draws) -> "Image":
        from PIL.Image import Resampling

        side, crop, min_area = self.size[1], draws.crops[i].tolist(), draws.augment.min_area
        sizes: list[tuple[int, int]] = []  # The whole image's; decoded smaller, its sides are rounded up.

        def least(size: tuple[int, int]) -> tuple[int, int]:
            """So that the box has at least the pixels of the square that is made of it."""
            sizes.append(size)
            _, _, height, width = crop_box(crop, min_area, stretch=size[1] / size[0])
            return math.ceil(side / width), math.ceil(side / height)

        image = self._opened(i, least)
        across, down = sizes[0]
        box = crop_box(crop, min_area, stretch=down / across)
        smaller = round(across / image.width)
        box = _pixel_box(box, (across / smaller, down / smaller))
        return image.resize((side, side), Resampling.BILINEAR, box=box)

    def _opened(self, i: int, least: Callable[[tuple[int, int]], tuple[int, int]] | None = None) -> "Image":
        image = open_image(self.paths[i], lambda: str(self.paths[i]), least)
        if self.size[0] == 1 and image.mode == "RGB":
            raise DataError(
                f"{self.paths[i]} must be grey like the other images; got colour. Convert one or the other."
            )
        return image.convert("RGB") if self.size[0] == 3 and image.mode == "L" else image


def read_image_folder(folder: Path, *, limit: int | None, image_size: int | None) -> TrainAndTest:
    """Read or open ``folder/train`` and ``folder/test`` (or ``val``), each with one subfolder per class.

    Images are numbered class by class in turn (the first of every class, then the second, ...), so that the first N
    are a fair sample. If a sample of them has one size, which is the size asked for, and all fit into memory, they
    are held there; otherwise they are streamed.

    Raises:
        DataError: If folders or images are missing, or train and test differ in their classes.
    """
    train_folder = folder / "train"
    test_folder = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if not train_folder.is_dir():
        raise DataError(
            f"{folder} must hold a folder `train` with one folder per class, or parquet files; got {_contents(folder)}."
        )
    if test_folder is None:
        raise DataError(f"{folder} must hold a folder `test` or `val` beside `train`; got {_contents(folder)}.")
    train_files, test_files = _by_class(train_folder), _by_class(test_folder)
    if set(train_files) != set(test_files):
        odd = sorted(set(train_files) ^ set(test_files))
        raise DataError(
            f"train and test must have the same classes; {odd[:5]} ({len(odd)} in all) are in only one of "
            f"{train_folder} and {test_folder}. Add or remove these folders."
        )
    classes = tuple(sorted(train_files))
    train_paths, train_labels = _interleaved([train_files[name] for name in classes])
    test_paths, test_labels = _interleaved([test_files[name] for name in classes])
    count = training_count(train_labels, limit, classes)
    train_paths, train_labels = train_paths[:count], train_labels[:count]
    form = _form((train_paths, test_paths), image_size)
    train, test = form.split(train_paths, train_labels), form.split(test_paths, test_labels)
    augment = usual_augment(train.size) if form.in_memory else Augment(0, train.size[0] == 3, PHOTOGRAPH_MIN_AREA)
    return TrainAndTest(train, test, classes, folder.resolve().name, augment)


@dataclass(frozen=True)
class _Form:
    """How the images of a folder are held.

    Attributes:
        channels: 1 if those probed are grey, else 3.
        side: Height and width to make, or None if all are said to have one size that need not be square.
        in_memory: Or streamed.
    """

    channels: int
    side: int | None
    in_memory: bool

    def split(self, paths: tuple[Path, ...], labels: Tensor) -> Split:
        if self.side is None or self.in_memory:
            images = decode_all(paths, self.side, lambda i: str(paths[i]))
            return MemorySplit(images, labels, Normalisation.usual(images.shape[1]))
        size = (self.channels, self.side, self.side)
        return FolderSplit(paths, labels, size, Normalisation.usual(self.channels))


def _form(sets: tuple[tuple[Path, ...], ...], image_size: int | None) -> _Form:
    """Decide by the headers of up to 64 images of each split, evenly spaced."""
    probed = [path for paths in sets for path in paths[:: max(1, len(paths) // _PROBED)][:_PROBED]]
    headers = [probe(path) for path in probed]
    channels = 1 if all(mode in ("1", "L", "LA") for mode, _ in headers) else 3
    width, height = headers[0][1]
    odd = next((i for i, (_, size) in enumerate(headers) if size != (width, height)), None)
    fits = max(len(paths) for paths in sets) * 3 * width * height <= MEMORY_LIMIT
    if image_size is not None:
        return _Form(channels, image_size, in_memory=odd is None and fits and (width, height) == (image_size,) * 2)
    if odd is not None:
        other = "{} x {}".format(*headers[odd][1])
        raise DataError(
            f"images must all have the same size unless `image_size` is given; got {width} x {height} for {probed[0]} "
            f"and {other} for {probed[odd]}. Pass image_size=224, say."
        )
    if not fits and width != height:
        raise DataError(
            f"`image_size` must be given for a large set of {width} x {height} images; they become squares."
        )
    return _Form(channels, width if width == height else None, in_memory=fits)


def _by_class(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder, sorted by name."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise DataError(f"{folder} must hold one folder of images per class; got {_contents(folder)}.")
    files: dict[str, list[Path]] = {}
    ignored: list[Path] = []
    for path in classes:
        inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        files[path.name] = [file for file in inside if file.suffix.lower() in SUFFIXES]
        ignored += [file for file in inside if file.suffix.lower() not in SUFFIXES]
        if not files[path.name]:
            raise DataError(f"{path} must hold at least one image; got {_contents(path)}. Add images or remove it.")
    if ignored:
        message = f"{folder}: {len(ignored)} entries are not image files and are left out, such as {ignored[0]}."
        warnings.warn(message, stacklevel=2)
    return files


def _interleaved(by_class: Sequence[list[Path]]) -> tuple[tuple[Path, ...], Tensor]:
    """The first file of every class, then the second of every class, ...; with their labels."""
    rounds = zip_longest(*([(path, label) for path in paths] for label, paths in enumerate(by_class)))
    pairs = [pair for pair in chain.from_iterable(rounds) if pair is not None]
    return tuple(path for path, _ in pairs), torch.tensor([label for _, label in pairs])


def _pixel_box(fractions: Sequence[float], size: tuple[float, float]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) in pixels of (top, left, height, width) as fractions of the image."""
    (top, left, height, width), (across, down) = fractions, size
    return left * across, top * down, min(left + width, 1.0) * across, min(top + height, 1.0) * down


def _contents(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return f"{', '.join(names[:5])} ({len(names)} entries)" if names else "nothing"
