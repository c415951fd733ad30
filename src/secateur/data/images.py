"""Image files: safe decoding, resizing, and folders with one subfolder per class.

Small folders are read into memory; `FolderSplit` streams large ones.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from secateur.data._buffers import prefetch
from secateur.data.dataset import (
    MemorySplit,
    Split,
    TrainAndTest,
    count_training_images,
    default_augment,
    resolve_class_count,
    validate_labels,
)
from secateur.data.epoch import Epoch, ImageBatch
from secateur.data.image_files import (
    IMAGE_SUFFIXES,
    MODES,
    Encoded,
    ImageProblems,
    decoding_problem,
    end_problem,
    header_problem,
    open_image,
    open_pixels,
    read_image_header,
)
from secateur.data.preprocessing import Resizing, resize_bands
from secateur.data.transforms import Augment, EpochDraws, Normalization, crop_box
from secateur.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


MEMORY_LIMIT = 4 * 2**30
"""The most bytes of pixels of a set held in memory."""
TEST_FOLDERS = ("test", "val", "validation", "valid")
"""Folders of test images; the first that exists is used."""
PHOTOGRAPHS = Resizing(crop_fraction=0.875)
"""224 / 256: side of the evaluated central part over the shorter side (Krizhevsky et al., NeurIPS 2012)."""
WHOLE = Resizing(crop_fraction=1.0)
"""The default for images that are held in memory, which are mostly small: all of the shorter side is kept."""
PHOTOGRAPH_MIN_AREA = 0.08
"""Smallest area of random resized crops in training (Szegedy et al., arXiv:1409.4842, Section 6)."""
_MEMORY_CHUNK = 1024
_THREADED_FROM = 16 * 1024
"""Encoded bytes per image from which threads are faster. With smaller ones PIL mostly holds the interpreter lock.

Measured on two cores with 2.3 kB PNGs of CIFAR-10: 13,400 images/s in one thread, 8,000 in two.
"""
_SAMPLED_HEADERS = 64
_MANY = 10_000
"""From so many images on, reading them takes seconds, and the log says what is being done."""

_LOGGER = logging.getLogger("secateur")


def read_image_folder(
    folder: Path,
    *,
    limit: int | None,
    image_size: tuple[int, int] | None,
    usual_size: tuple[int, int] | None = None,
    resizing: Resizing | None = None,
    channels: int | None = None,
    skip_bad_images: bool = False,
) -> TrainAndTest:
    """Read or open ``folder/train`` and ``folder/test`` (or ``val``), each with one subfolder per class.

    The order is the first image of every class, then the second of every class, and so on, so that the first N images
    represent all classes. If a sample of the images has one size, which is the one asked for, and all fit into memory,
    they are held there; otherwise they are streamed.

    Every image is looked at before anything else is done: those held in memory are decoded, of others the header and
    the end are checked, or all of them is decoded if ``skip_bad_images`` asks to leave out what is damaged.

    Raises:
        DataError: If folders or images are missing, train and test differ in their classes, or images cannot be used,
            which are all named.
    """
    train_folder = folder / "train"
    test_folder = next((folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None)
    if not train_folder.is_dir():
        raise DataError(
            f"{folder} must hold a folder `train` with one folder per class, or parquet files; "
            f"got {_list_entries(folder)}."
        )
    if test_folder is None:
        raise DataError(f"{folder} must hold a folder `test` or `val` beside `train`; got {_list_entries(folder)}.")
    train_files, test_files = _files_by_class(train_folder), _files_by_class(test_folder)
    if set(train_files) != set(test_files):
        odd = sorted(set(train_files) ^ set(test_files))
        raise DataError(
            f"train and test must have the same classes; {odd[:5]} ({len(odd)} in all) are in only one of "
            f"{train_folder} and {test_folder}. Add or remove these folders."
        )
    classes = tuple(sorted(train_files))
    train_paths, train_labels = _interleave([train_files[name] for name in classes])
    test_paths, test_labels = _interleave([test_files[name] for name in classes])
    count = count_training_images(train_labels, limit, classes)
    sets, name = ((train_paths[:count], train_labels[:count]), (test_paths, test_labels)), folder.resolve().name
    problems, images = ImageProblems(skip_bad_images), count + len(test_paths)
    if images >= _MANY:
        _LOGGER.info(f"Checking {images:,} image files in {len(classes):,} classes of {name}, before anything begins.")
    readable = [_usable(*each, header_problem, problems) for each in sets]
    problems.check_left(name, images, min(len(paths) for paths, _ in readable))
    probed = _probed(tuple(paths for paths, _ in readable))
    headers = [read_image_header(path) for path in probed]
    if image_size is None and any(size != headers[0][1] for _, size in headers):
        image_size = usual_size
    most = max(len(paths) for paths, _ in readable)
    chosen = _choose_format(probed, headers, image_size, most=most, resizing=resizing or PHOTOGRAPHS, asked=channels)
    splits = [chosen.split(*each, problems) for each in readable]
    problems.check_left(name, images, 0 if None in splits else 1)
    skipped = problems.settle(name, images)
    train, test = (split for split in splits if split is not None)
    augment = default_augment(train.size) if chosen.in_memory else Augment(0, train.size[0] == 3, PHOTOGRAPH_MIN_AREA)
    return TrainAndTest(train, test, classes, name, augment, skipped, chosen.resizing)


def _usable(
    paths: tuple[Path, ...],
    labels: Tensor,
    problem_of: Callable[[Path], DataError | None],
    problems: ImageProblems,
) -> tuple[tuple[Path, ...], Tensor]:
    """Return the images, and their labels, that a check finds nothing wrong with; note the others."""
    chunks = [paths[start : start + _MEMORY_CHUNK] for start in range(0, len(paths), _MEMORY_CHUNK)]
    with ThreadPoolExecutor(decoding_threads()) as pool:
        found = list(chain.from_iterable(pool.map(lambda chunk: [problem_of(path) for path in chunk], chunks)))
    for path, problem in zip(paths, found, strict=True):
        if problem is not None:
            problems.note(str(path), problem)
    kept = [i for i, problem in enumerate(found) if problem is None]
    return tuple(paths[i] for i in kept), labels[torch.tensor(kept, dtype=torch.int64)]


@dataclass(frozen=True)
class _FolderFormat:
    """How the images of a folder are decoded and held.

    Attributes:
        channels: Channels of the images.
        size: Height and width to resize to, or None if all images have one size.
        in_memory: Whether they are held in memory or streamed.
        resizing: How the size is reached.
        as_asked: The channels that the user named, or None.
    """

    channels: int
    size: tuple[int, int] | None
    in_memory: bool
    resizing: Resizing
    as_asked: int | None

    def split(self, paths: tuple[Path, ...], labels: Tensor, problems: ImageProblems) -> Split | None:
        """Read or open a split without the images that cannot be used, which are noted; None if none is left."""
        if self.size is None or self.in_memory:
            images, kept = decode_images(
                paths,
                len(paths),
                self.size,
                lambda i: str(paths[i]),
                problems,
                resizing=self.resizing,
                channels=self.as_asked,
            )
            return MemorySplit(images, labels[kept], Normalization.default(images.shape[1])) if len(kept) else None

        check = partial(decoding_problem if problems.skip else end_problem, channels=self.as_asked)
        paths, labels = _usable(paths, labels, check, problems)
        size, usual = (self.channels, *self.size), Normalization.default(self.channels)
        return FolderSplit(paths, labels, size, usual, resizing=self.resizing) if paths else None


def _probed(sets: tuple[tuple[Path, ...], ...]) -> list[Path]:
    """Up to 64 evenly spaced images of each split."""
    return [path for paths in sets for path in paths[:: max(1, len(paths) // _SAMPLED_HEADERS)][:_SAMPLED_HEADERS]]


def _choose_format(
    probed: Sequence[Path],
    headers: Sequence[tuple[str, tuple[int, int]]],
    image_size: tuple[int, int] | None,
    *,
    most: int,
    resizing: Resizing,
    asked: int | None,
) -> _FolderFormat:
    """Choose by the headers of some images; ``most`` is the number of images of the largest split."""
    channels = asked or (1 if all(mode in ("1", "L", "LA") for mode, _ in headers) else 3)
    width, height = headers[0][1]
    odd = next((i for i, (_, size) in enumerate(headers) if size != (width, height)), None)
    fits = most * max(channels, 3) * width * height <= MEMORY_LIMIT
    if image_size is not None:
        in_memory = odd is None and fits and (height, width) == image_size
        return _FolderFormat(channels, image_size, in_memory, resizing, asked)
    if odd is not None:
        other = "{} x {}".format(*headers[odd][1])
        raise DataError(
            f"images must all have the same size unless `image_size` is given; got {width} x {height} for {probed[0]} "
            f"and {other} for {probed[odd]}. Pass image_size=224, say."
        )
    if not fits and width != height:
        raise DataError(f"`image_size` must be given for a large set of {width} x {height} images, such as 240x320.")
    return _FolderFormat(channels, (height, width) if width == height else None, fits, resizing, asked)


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    """List the image files of each class folder, sorted by name."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise DataError(f"{folder} must hold one folder of images per class; got {_list_entries(folder)}.")
    files: dict[str, list[Path]] = {}
    ignored: list[Path] = []
    for path in classes:
        inside = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        files[path.name] = [file for file in inside if file.suffix.lower() in IMAGE_SUFFIXES]
        ignored += [file for file in inside if file.suffix.lower() not in IMAGE_SUFFIXES]
        if not files[path.name]:
            raise DataError(f"{path} must hold at least one image; got {_list_entries(path)}. Add images or remove it.")
    if ignored:
        message = f"{folder}: {len(ignored)} entries are not image files and are left out, such as {ignored[0]}."
        warnings.warn(message, stacklevel=2)
    return files


def _interleave(by_class: Sequence[list[Path]]) -> tuple[tuple[Path, ...], Tensor]:
    """Return the first file of every class, then the second of every class, and so on, with their labels."""
    rounds = zip_longest(*([(path, label) for path in paths] for label, paths in enumerate(by_class)))
    pairs = [pair for pair in chain.from_iterable(rounds) if pair is not None]
    return tuple(path for path, _ in pairs), torch.tensor([label for _, label in pairs])


def _list_entries(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return f"{', '.join(names[:5])} ({len(names)} entries)" if names else "nothing"


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Image files that threads decode, crop and resize when they are needed.

    Without augmentation they are resized as ``resizing`` says. With ``Augment.min_area`` below 1 a random box is taken
    instead; a JPEG is then decoded at a half, a quarter or an eighth of its size if the box has pixels to spare.

    Attributes:
        paths: The files.
        labels: (n,) integers, not negative.
        size: Channels, height, width of the resulting images.
        normalization: Applied last.
        classes: Number of classes; 0 stands for the highest label + 1.
        resizing: How images without augmentation get their size.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    size: tuple[int, int, int]
    normalization: Normalization
    classes: int = 0
    resizing: Resizing = PHOTOGRAPHS

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", validate_labels(self.labels, len(self.paths)))
        object.__setattr__(self, "classes", resolve_class_count(self.labels, self.classes))
        if self.size[0] not in MODES or min(self.size[1:]) < 1:
            raise DataError(f"`size` must be 1 to 4 channels, a height and a width; got {self.size}.")

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Tensor) -> "FolderSplit":
        """Return the images at some positions, in that order."""
        return replace(self, paths=tuple(self.paths[i] for i in index.tolist()), labels=self.labels[index])

    def normalized(self, normalization: Normalization) -> "FolderSplit":
        """Return the same images with another mean and standard deviation."""
        return replace(self, normalization=normalization)

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
        channels, height, width = self.size

        def fill(i: int, place: np.ndarray) -> None:
            array = self._image(i, epoch.draws)
            if epoch.draws is None:
                np.copyto(place, array)
                return
            epoch.draws.apply_to_image(array, i, place)
            if epoch.policy is not None:
                np.copyto(place, epoch.policy(place, int(epoch.draws.keys[i])))

        ahead = prefetch(epoch.batches, (height, width, channels), fill, decoding_threads())
        for place, chosen, pixels in ahead:
            index = chosen.to(epoch.device)
            yield epoch.finish(place, index, pixels.to(epoch.device), self.labels[chosen].to(epoch.device))

    def _image(self, i: int, draws: EpochDraws | None) -> np.ndarray:
        if draws is not None and draws.augment.min_area < 1.0:
            array = np.asarray(self._random_crop(i, draws))
        else:
            array = np.asarray(self.resizing.image(self._opened(i), self.size[1:]))
        return array[..., None] if array.ndim == 2 else array

    def _random_crop(self, i: int, draws: EpochDraws) -> "Image":
        crop, min_area, (height, width) = draws.crops[i].tolist(), draws.augment.min_area, self.size[1:]
        sizes: list[tuple[int, int]] = []  # Of the whole image, because sides of smaller decoded ones are rounded up.

        def box_in(size: tuple[int, int]) -> tuple[float, float, float, float]:
            """Of the aspect ratio of the input, but for what is drawn."""
            return crop_box(crop, min_area, stretch=size[1] / size[0] * (width / height))

        def least(size: tuple[int, int]) -> tuple[int, int]:
            """The size at which the box has at least as many pixels as the input that it is resized to."""
            sizes.append(size)
            _, _, down, across = box_in(size)
            return math.ceil(width / across), math.ceil(height / down)

        image = self._opened(i, least)
        across, down = sizes[0]
        smaller = round(across / image.width)
        box = _pixel_box(box_in(sizes[0]), (across / smaller, down / smaller))
        return resize_bands(image, (height, width), box=box)

    def _opened(self, i: int, least: Callable[[tuple[int, int]], tuple[int, int]] | None = None) -> "Image":
        asked = self.size[0] if self.size[0] in (2, 4) else None
        image = open_image(self.paths[i], lambda: str(self.paths[i]), least, channels=asked)
        if self.size[0] == 1 and image.mode == "RGB":
            raise DataError(f"{self.paths[i]} must be gray like the other images; got color. Convert one or the other.")
        return image.convert("RGB") if self.size[0] == 3 and image.mode == "L" else image


def _pixel_box(fractions: Sequence[float], size: tuple[float, float]) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) in pixels for (top, left, height, width) as fractions of the image."""
    (top, left, height, width), (across, down) = fractions, size
    return left * across, top * down, min(left + width, 1.0) * across, min(top + height, 1.0) * down


def decode_images(
    encoded: Iterable[Encoded | None],
    count: int,
    image_size: tuple[int, int] | None,
    name: Callable[[int], str],
    problems: ImageProblems,
    *,
    resizing: Resizing = WHOLE,
    channels: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode a whole set into memory.

    Args:
        encoded: The files; None for one that is missing. No more than 1,024 are held at once.
        count: Number of files, at least one.
        image_size: Height and width to resize to, in pixels; None requires images of one size.
        name: Returns the name of image i, for errors.
        problems: Receives the images that cannot be decoded.
        resizing: How the size is reached.
        channels: Channels of the images; None takes what they have, without transparency.

    Returns:
        (n, c, h, w) uint8, channels last in memory, and (n,) the positions of these images among the files. Without
        ``channels``, c is 1 if every image is gray, else 3.

    Raises:
        DataError: If an image differs in size, or the set is too large.
    """

    def decode(numbered: tuple[int, Encoded | None]) -> np.ndarray | DataError:
        i, file = numbered
        if file is None:
            return DataError(f"{name(i)} must hold the bytes of an image; got null. Embed the images.")
        try:
            if channels is not None and channels not in MODES:
                pixels = open_pixels(file, lambda: name(i), channels)
                return pixels if image_size is None else resizing.pixels(pixels, image_size)
            image = open_image(file, lambda: name(i), channels=channels)
            return np.asarray(image if image_size is None else resizing.image(image, image_size))
        except DataError as error:
            return error

    depth = channels or 3
    pixels, kept, gray = np.empty((0, 1, 1, depth), dtype=np.uint8), list[int](), channels is None
    for i, array in enumerate(_decode_in_order(decode, encoded)):
        if isinstance(array, DataError):
            problems.note(name(i), array)
            continue
        if not kept:
            check_fits_in_memory(count, depth * math.prod(array.shape[:2]))
            if count >= _MANY:
                _LOGGER.info(f"Decoding {count:,} images into memory.")
            pixels = np.empty((count, *array.shape[:2], depth), dtype=np.uint8)
        shape = pixels.shape[1:3]
        if array.shape[:2] != shape:
            raise DataError(
                f"images must all have the same size unless `image_size` is given; got {_format_size(shape)} for "
                f"{name(kept[0])} and {_format_size(array.shape)} for {name(i)}. Pass image_size={min(shape)}, say."
            )
        gray = gray and array.ndim == 2
        pixels[len(kept)] = array[..., None] if array.ndim == 2 else array
        kept.append(i)
    pixels = pixels[: len(kept)]
    whole = np.ascontiguousarray(pixels[..., :1]) if gray else pixels
    return torch.from_numpy(whole).permute(0, 3, 1, 2), torch.tensor(kept, dtype=torch.int64)


def check_fits_in_memory(n: int, bytes_per_image: int) -> None:
    """Refuse a set that would not fit into memory.

    Raises:
        DataError: If its pixels take more than ``MEMORY_LIMIT`` bytes.
    """
    if n * bytes_per_image > MEMORY_LIMIT:
        raise DataError(
            f"images held in memory must take at most {MEMORY_LIMIT / 2**30:.0f} GiB; got {n} images of "
            f"{bytes_per_image} bytes. Pass `limit` or a smaller `image_size`, or use an image folder, which streams."
        )


def resize_images(images: Tensor, image_size: tuple[int, int] | None) -> Tensor:
    """Squash a decoded set to a size (bilinear, antialiased).

    Args:
        images: (n, c, h, w) uint8.
        image_size: Height and width in pixels; None or their own returns the images unchanged.
    """
    if image_size is None or images.shape[-2:] == image_size:
        return images
    check_fits_in_memory(len(images), images.shape[1] * math.prod(image_size))
    resized = [
        functional.interpolate(chunk.float(), image_size, mode="bilinear", antialias=True)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for chunk in images.split(_MEMORY_CHUNK)
    ]
    return torch.cat(resized)


def _decode_in_order(
    decode: Callable[[tuple[int, Encoded | None]], np.ndarray | DataError], encoded: Iterable[Encoded | None]
) -> Iterator[np.ndarray | DataError]:
    numbered = enumerate(encoded)
    chunk = [*islice(numbered, _MEMORY_CHUNK)]
    if _mean_bytes([file for _, file in chunk[:64] if file is not None]) < _THREADED_FROM:
        yield from map(decode, chain(chunk, numbered))
        return
    with ThreadPoolExecutor(decoding_threads()) as pool:
        while chunk:
            yield from pool.map(decode, chunk)
            chunk.clear()  # Before the next ones are read.
            chunk += islice(numbered, _MEMORY_CHUNK)


def _mean_bytes(files: Sequence[Encoded]) -> float:
    return sum(len(e) if isinstance(e, bytes) else e.stat().st_size for e in files) / max(len(files), 1)


def decoding_threads() -> int:
    """Return the number of threads that decode images: one per core, eight at most."""
    return min(8, os.cpu_count() or 1)


def _format_size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
