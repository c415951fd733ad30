"""Image files: safe decoding, resizing, and folders with one subfolder per class.

Small folders are read into memory; `FolderSplit` streams large ones.
"""

import contextlib
import errno
import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

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
from secateur.data.problems import ImageProblems
from secateur.data.transforms import Augment, EpochDraws, Normalization, crop_box
from secateur.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


MEMORY_LIMIT = 4 * 2**30
"""The most bytes of pixels of a set held in memory."""
MAX_PIXELS = 2**26
"""The most pixels of one image, encoded or while resized: 8192 x 8192. A file of kilobytes can claim any number."""
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
TEST_FOLDERS = ("test", "val", "validation", "valid")
"""Folders of test images; the first that exists is used."""
CROP_FRACTION = 0.875
"""224 / 256: side of the evaluated central square over the shorter side (Krizhevsky et al., NeurIPS 2012)."""
PHOTOGRAPH_MIN_AREA = 0.08
"""Smallest area of random resized crops in training (Szegedy et al., arXiv:1409.4842, Section 6)."""
_MEMORY_CHUNK = 1024
_THREADED_FROM = 16 * 1024
"""Encoded bytes per image from which threads are faster. With smaller ones PIL mostly holds the interpreter lock.

Measured on two cores with 2.3 kB PNGs of CIFAR-10: 13,400 images/s in one thread, 8,000 in two.
"""
_CONVERTED_TO = {"1": "L", "LA": "L"} | dict.fromkeys(("RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"), "RGB")
"""PIL modes with at most 8 bits per channel, and the mode they are converted to; others would be clipped."""
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
"""Formats that are decoded, whatever a file is called. PIL has more, of which some start other programs (EPS)."""
_MAX_READ_AT_ONCE = 2**24
"""Files up to this size are read at once; of larger ones only what the decoder asks for is read."""
_SAMPLED_HEADERS = 64
_ENDS = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND"), (b"GIF8", b"\x3b"))
"""How files of JPEG, PNG and GIF begin, and what is among their last bytes if nothing is missing."""
_END_BYTES = 64
Encoded = bytes | Path
"""An image file, in memory or on disk."""


def read_image_folder(
    folder: Path, *, limit: int | None, image_size: int | None, skip_bad_images: bool = False
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
    readable = [_usable(*each, _header_problem, problems) for each in sets]
    problems.check_left(name, images, min(len(paths) for paths, _ in readable))
    chosen = _choose_format(tuple(paths for paths, _ in readable), image_size)
    splits = [chosen.split(*each, problems) for each in readable]
    problems.check_left(name, images, 0 if None in splits else 1)
    skipped = problems.settle(name, images)
    train, test = (split for split in splits if split is not None)
    augment = default_augment(train.size) if chosen.in_memory else Augment(0, train.size[0] == 3, PHOTOGRAPH_MIN_AREA)
    return TrainAndTest(train, test, classes, name, augment, skipped)


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


def _header_problem(path: Path) -> DataError | None:
    try:
        mode, _ = read_image_header(path)
        _check_mode(mode, str(path))
    except DataError as error:
        return error
    return None


def _decoding_problem(path: Path) -> DataError | None:
    try:
        open_image(path, lambda: str(path))
    except DataError as error:
        return error
    return None


def _end_problem(path: Path) -> DataError | None:
    """What is wrong with a file that does not end as complete ones do; such a file is decoded to find out."""
    try:
        with open_regular_file(path) as file:
            begin = file.read(12)
            file.seek(max(os.fstat(file.fileno()).st_size - _END_BYTES, 0))
            end, size = file.read(), os.fstat(file.fileno()).st_size
    except OSError:
        return _decoding_problem(path)
    if begin.startswith(b"RIFF"):
        complete = int.from_bytes(begin[4:8], "little") + 8 <= size
    else:
        complete = any(begin.startswith(start) and mark in end for start, mark in _ENDS)
    return None if complete else _decoding_problem(path)


@dataclass(frozen=True)
class _FolderFormat:
    """How the images of a folder are decoded and held.

    Attributes:
        channels: 1 if the sampled images are gray, else 3.
        side: Height and width to resize to, or None if all images have one size that need not be square.
        in_memory: Whether they are held in memory or streamed.
    """

    channels: int
    side: int | None
    in_memory: bool

    def split(self, paths: tuple[Path, ...], labels: Tensor, problems: ImageProblems) -> Split | None:
        """Read or open a split without the images that cannot be used, which are noted; None if none is left."""
        if self.side is None or self.in_memory:
            images, kept = decode_images(paths, self.side, lambda i: str(paths[i]), problems)
            return MemorySplit(images, labels[kept], Normalization.default(images.shape[1])) if len(kept) else None
        paths, labels = _usable(paths, labels, _decoding_problem if problems.skip else _end_problem, problems)
        size = (self.channels, self.side, self.side)
        return FolderSplit(paths, labels, size, Normalization.default(self.channels)) if paths else None


def _choose_format(sets: tuple[tuple[Path, ...], ...], image_size: int | None) -> _FolderFormat:
    """Choose by the headers of up to 64 evenly spaced images of each split."""
    probed = [path for paths in sets for path in paths[:: max(1, len(paths) // _SAMPLED_HEADERS)][:_SAMPLED_HEADERS]]
    headers = [read_image_header(path) for path in probed]
    channels = 1 if all(mode in ("1", "L", "LA") for mode, _ in headers) else 3
    width, height = headers[0][1]
    odd = next((i for i, (_, size) in enumerate(headers) if size != (width, height)), None)
    fits = max(len(paths) for paths in sets) * 3 * width * height <= MEMORY_LIMIT
    if image_size is not None:
        return _FolderFormat(
            channels, image_size, in_memory=odd is None and fits and (width, height) == (image_size,) * 2
        )
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
    return _FolderFormat(channels, width if width == height else None, in_memory=fits)


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

    Without augmentation the shorter side is resized to side / 0.875 and the central square kept, unless the image
    already has the size. With ``Augment.min_area`` below 1 a random box is resized instead; a JPEG is then decoded at a
    half, a quarter or an eighth of its size if the box has more than enough pixels.

    Attributes:
        paths: The files.
        labels: (n,) integers, not negative.
        size: Channels, height, width of the resulting images; height = width.
        normalization: Applied last.
        classes: Number of classes; 0 stands for the highest label + 1.
    """

    paths: tuple[Path, ...]
    labels: Tensor
    size: tuple[int, int, int]
    normalization: Normalization
    classes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", validate_labels(self.labels, len(self.paths)))
        object.__setattr__(self, "classes", resolve_class_count(self.labels, self.classes))
        if self.size[0] not in (1, 3) or self.size[1] != self.size[2]:
            raise DataError(f"`size` must be 1 or 3 channels and a square; got {self.size}.")

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
            array = np.asarray(resize_and_center_crop(self._opened(i), self.size[1], CROP_FRACTION))
        return array[..., None] if array.ndim == 2 else array

    def _random_crop(self, i: int, draws: EpochDraws) -> "Image":
        from PIL.Image import Resampling

        side, crop, min_area = self.size[1], draws.crops[i].tolist(), draws.augment.min_area
        sizes: list[tuple[int, int]] = []  # Of the whole image, because sides of smaller decoded ones are rounded up.

        def least(size: tuple[int, int]) -> tuple[int, int]:
            """The size at which the box has at least as many pixels as the square it is resized to."""
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
            raise DataError(f"{self.paths[i]} must be gray like the other images; got color. Convert one or the other.")
        return image.convert("RGB") if self.size[0] == 3 and image.mode == "L" else image


def _pixel_box(fractions: Sequence[float], size: tuple[float, float]) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) in pixels for (top, left, height, width) as fractions of the image."""
    (top, left, height, width), (across, down) = fractions, size
    return left * across, top * down, min(left + width, 1.0) * across, min(top + height, 1.0) * down


def open_image(
    encoded: Encoded, where: Callable[[], str], least: Callable[[tuple[int, int]], tuple[int, int]] | None = None
) -> "Image":
    """Open and decode an image with 8 bits per channel.

    Args:
        encoded: The file.
        where: Returns the name of the file or row, for errors.
        least: Returns a sufficient (width, height) for that of the image. A JPEG may then be decoded at a half, a
            quarter or an eighth of its size, which is faster. None decodes it in full size.

    Returns:
        Mode "L" (gray) or "RGB"; transparency is dropped.

    Raises:
        DataError: If it cannot be decoded or has more than 8 bits per channel.
    """
    try:
        with _opened(_read_small_file(encoded)) as image:
            if least is not None:
                image.draft(None, least(image.size))
            image.load()
    except Exception as error:  # Damaged files make decoders raise any exception.
        reason = _reason(error)
        raise DataError(
            f"{where()} must be an image that PIL can decode; got {reason}. Repair or remove it."
        ) from error
    if image.mode in ("L", "RGB"):
        return image
    _check_mode(image.mode, where())
    return image.convert(_CONVERTED_TO[image.mode])


def _check_mode(mode: str, where: str) -> None:
    if mode not in ("L", "RGB", *_CONVERTED_TO):
        raise DataError(f"{where} must have 8 bits per channel; got PIL mode {mode!r}. Convert it to 8-bit PNG.")


def _read_small_file(encoded: Encoded) -> Encoded:
    """Read a file of usual size in one call instead of PIL's dozens, each of which waits for the disk."""
    if isinstance(encoded, bytes):
        return encoded
    with open_regular_file(encoded) as file:
        size = os.fstat(file.fileno()).st_size
        return file.read(size) if size <= _MAX_READ_AT_ONCE else encoded


def read_image_header(path: Path) -> tuple[str, tuple[int, int]]:
    """Read the PIL mode and (width, height) of an image file from its header.

    Raises:
        DataError: If it cannot be read.
    """
    try:
        with _opened(path) as image:
            return image.mode, image.size
    except Exception as error:
        reason = _reason(error)
        raise DataError(f"{path} must be an image that PIL can decode; got {reason}. Repair or remove it.") from error


@contextlib.contextmanager
def _opened(encoded: Encoded) -> Generator["Image"]:
    """Read the header of an image, but not its pixels."""
    from PIL import Image

    with (
        io.BytesIO(encoded) if isinstance(encoded, bytes) else open_regular_file(encoded) as file,
        Image.open(file, formats=_FORMATS) as image,
    ):
        if math.prod(image.size) > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        yield image


def open_regular_file(path: Path) -> BinaryIO:
    """Open a file for reading; pipes and devices, which could block or never end, are refused.

    Raises:
        OSError: If it is not a regular file, or cannot be opened.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a pipe or device, not a file")
    return file


def _reason(error: Exception) -> str:
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return "an unknown format" if "cannot identify" in text else text.rstrip(".") or type(error).__name__


def resize_and_center_crop(image: "Image", size: int, crop_fraction: float) -> "Image":
    """ResizeMode the shorter side to size / crop_fraction and keep the central square, as published models evaluate.

    An image that already has the size is returned unchanged.
    """
    from PIL.Image import Resampling

    if image.size == (size, size):
        return image
    scale = round(size / crop_fraction) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if width * height > MAX_PIXELS:
        raise DataError(
            f"images must not be much longer than wide; got {image.width} x {image.height}, which would become "
            f"{width} x {height}. Cut it, or remove it."
        )
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Resampling.BILINEAR).crop((left, top, left + size, top + size))


def decode_images(
    encoded: Sequence[Encoded], image_size: int | None, name: Callable[[int], str], problems: ImageProblems
) -> tuple[Tensor, Tensor]:
    """Decode a whole set into memory.

    Args:
        encoded: The files, at least one.
        image_size: Side of the squares to resize to, in pixels; None requires images of one size.
        name: Returns the name of image i, for errors.
        problems: Receives the images that cannot be decoded.

    Returns:
        (n, c, h, w) uint8, channels last in memory, and (n,) the positions of these images among the files. c is 1 if
        every image is gray, else 3.

    Raises:
        DataError: If an image differs in size, or the set is too large.
    """

    def decode(i: int) -> np.ndarray | DataError:
        try:
            image = open_image(encoded[i], lambda: name(i))
            return np.asarray(
                image if image_size is None else resize_and_center_crop(image, image_size, crop_fraction=1.0)
            )
        except DataError as error:
            return error

    pixels, kept, gray = np.empty((0, 1, 1, 3), dtype=np.uint8), list[int](), True
    for i, array in enumerate(_decode_in_order(decode, encoded)):
        if isinstance(array, DataError):
            problems.note(name(i), array)
            continue
        if not kept:
            check_fits_in_memory(len(encoded), 3 * math.prod(array.shape[:2]))
            pixels = np.empty((len(encoded), *array.shape[:2], 3), dtype=np.uint8)
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


def resize_images(images: Tensor, image_size: int | None) -> Tensor:
    """ResizeMode a decoded set to squares (bilinear, antialiased).

    Args:
        images: (n, c, s, s) uint8.
        image_size: Side in pixels; None or s returns the images unchanged.
    """
    if image_size is None or images.shape[-2:] == (image_size, image_size):
        return images
    check_fits_in_memory(len(images), images.shape[1] * image_size**2)
    resized = [
        functional.interpolate(chunk.float(), (image_size, image_size), mode="bilinear", antialias=True)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for chunk in images.split(_MEMORY_CHUNK)
    ]
    return torch.cat(resized)


def _decode_in_order(
    decode: Callable[[int], np.ndarray | DataError], encoded: Sequence[Encoded]
) -> Iterator[np.ndarray | DataError]:
    sample = encoded[:64]
    mean_bytes = sum(len(e) if isinstance(e, bytes) else e.stat().st_size for e in sample) / len(sample)
    if mean_bytes < _THREADED_FROM:
        yield from map(decode, range(len(encoded)))
        return
    with ThreadPoolExecutor(decoding_threads()) as pool:
        for start in range(0, len(encoded), _MEMORY_CHUNK):
            yield from pool.map(decode, range(start, min(start + _MEMORY_CHUNK, len(encoded))))


def decoding_threads() -> int:
    """Return the number of threads that decode images: one per core, eight at most."""
    return min(8, os.cpu_count() or 1)


def _format_size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
