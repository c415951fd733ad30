"""From encoded images to bytes of one size and number of channels."""

import contextlib
import errno
import io
import math
import os
import stat
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from secateur.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MEMORY_LIMIT = 4 * 2**30
"""Bytes of pixels that a set held in memory may have."""

_MEMORY_CHUNK = 1024
_THREADED_FROM = 16 * 1024
"""Encoded bytes per image from which threads pay: below, PIL holds the interpreter lock most of the time.

Measured on two cores, 2.3 kB PNGs of CIFAR-10: 13,400 images/s in one thread, 8,000 in two.
"""

_CONVERTED_TO = {"1": "L", "LA": "L"} | dict.fromkeys(("RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"), "RGB")
"""PIL modes with at most 8 bits per channel, and what they become; others (16-bit, float) would be clipped."""

MOST_PIXELS = 2**26
"""Of one image, encoded or on its way to another size: 8192 x 8192. A file of a few kilobytes can claim any number."""

_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
"""What is decoded, whatever a file is called. PIL knows many more formats; some of them start other programs (EPS)."""

_MOST_AT_ONCE = 2**24
"""Bytes of a file that are read before it is known what they are; of larger ones only what the decoder asks for."""

Encoded = bytes | Path
"""An image file, in memory or on disk."""


def open_image(
    encoded: Encoded, where: Callable[[], str], least: Callable[[tuple[int, int]], tuple[int, int]] | None = None
) -> "Image":
    """Open and decode an image with 8 bits per channel.

    Args:
        encoded: The file.
        where: Says, for the error, which file or row it is.
        least: Gives, for its (width, height), those that are enough: a JPEG may then come at a half, a quarter or an
            eighth of its size, which is quicker to decode. None decodes the whole.

    Returns:
        Mode "L" (grey) or "RGB"; transparency is dropped.

    Raises:
        DataError: If it cannot be decoded or has more than 8 bits per channel.
    """
    try:
        with _opened(_at_once(encoded)) as image:
            if least is not None:
                image.draft(None, least(image.size))
            image.load()
    except Exception as error:  # damaged files make decoders fail in every way
        reason = _reason(error)
        raise DataError(
            f"{where()} must be an image that PIL can decode; got {reason}. Repair or remove it."
        ) from error
    if image.mode in ("L", "RGB"):
        return image
    if image.mode not in _CONVERTED_TO:
        raise DataError(
            f"{where()} must have 8 bits per channel; got PIL mode {image.mode!r}. Convert it to 8-bit PNG."
        )
    return image.convert(_CONVERTED_TO[image.mode])


def _at_once(encoded: Encoded) -> Encoded:
    """The bytes of a file of usual size: one call instead of PIL's dozens, each of which waits for a disk by itself."""
    if isinstance(encoded, bytes):
        return encoded
    with open_regular(encoded) as file:
        size = os.fstat(file.fileno()).st_size
        return file.read(size) if size <= _MOST_AT_ONCE else encoded


def probe(path: Path) -> tuple[str, tuple[int, int]]:
    """PIL mode and (width, height) of an image file, from its header.

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
    """The header of an image is read, not yet its pixels."""
    from PIL import Image

    with (
        io.BytesIO(encoded) if isinstance(encoded, bytes) else open_regular(encoded) as file,
        Image.open(file, formats=_FORMATS) as image,
    ):
        if math.prod(image.size) > MOST_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MOST_PIXELS}")
        yield image


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it; a pipe or device, which could block or never end, is refused.

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


def fit_square(image: "Image", size: int, crop_fraction: float) -> "Image":
    """Resize the shorter side to size / crop_fraction and keep the central square, as published models evaluate.

    An image that has the size already is returned as it is.
    """
    from PIL.Image import Resampling

    if image.size == (size, size):
        return image
    scale = round(size / crop_fraction) / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if width * height > MOST_PIXELS:
        raise DataError(
            f"images must not be much longer than wide; got {image.width} x {image.height}, which would become "
            f"{width} x {height}. Cut it, or remove it."
        )
    left, top = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), Resampling.BILINEAR).crop((left, top, left + size, top + size))


def decode_all(encoded: Sequence[Encoded], image_size: int | None, name: Callable[[int], str]) -> Tensor:
    """Decode a whole set into memory.

    Args:
        encoded: The files, at least one.
        image_size: Resize to this square; None: all must have one size already.
        name: What to call image i in an error.

    Returns:
        (n, c, h, w) uint8, channels last in memory. c is 1 if every image is grey, else 3.

    Raises:
        DataError: If an image is damaged or differs in size, or the set is too large.
    """

    def decode(i: int) -> np.ndarray:
        image = open_image(encoded[i], lambda: name(i))
        return np.asarray(image if image_size is None else fit_square(image, image_size, crop_fraction=1.0))

    shape = decode(0).shape[:2]
    check_memory(len(encoded), 3 * math.prod(shape))
    pixels = np.empty((len(encoded), *shape, 3), dtype=np.uint8)
    grey = True
    for i, array in enumerate(_mapped(decode, encoded)):
        if array.shape[:2] != shape:
            raise DataError(
                f"images must all have the same size unless `image_size` is given; got {_size(shape)} for {name(0)} "
                f"and {_size(array.shape)} for {name(i)}. Pass image_size={min(shape)}, say."
            )
        grey = grey and array.ndim == 2
        pixels[i] = array[..., None] if array.ndim == 2 else array
    kept = np.ascontiguousarray(pixels[..., :1]) if grey else pixels
    return torch.from_numpy(kept).permute(0, 3, 1, 2)


def check_memory(n: int, bytes_per_image: int) -> None:
    """Refuse a set that would not fit into memory.

    Raises:
        DataError: If its pixels take more than ``MEMORY_LIMIT`` bytes.
    """
    if n * bytes_per_image > MEMORY_LIMIT:
        raise DataError(
            f"images held in memory must take at most {MEMORY_LIMIT / 2**30:.0f} GiB; got {n} images of "
            f"{bytes_per_image} bytes. Pass `limit` or a smaller `image_size`, or use an image folder, which streams."
        )


def resize_all(images: Tensor, image_size: int | None) -> Tensor:
    """Resize a decoded set to squares (bilinear, antialiased); None or the size it has: unchanged.

    Args:
        images: (n, c, s, s) uint8.
        image_size: In pixels.
    """
    if image_size is None or images.shape[-2:] == (image_size, image_size):
        return images
    check_memory(len(images), images.shape[1] * image_size**2)
    resized = [
        functional.interpolate(chunk.float(), (image_size, image_size), mode="bilinear", antialias=True)
        .round_()
        .clamp_(0, 255)
        .to(torch.uint8)
        for chunk in images.split(_MEMORY_CHUNK)
    ]
    return torch.cat(resized)


def _mapped(decode: Callable[[int], np.ndarray], encoded: Sequence[Encoded]) -> Iterator[np.ndarray]:
    sample = encoded[:64]
    mean_bytes = sum(len(e) if isinstance(e, bytes) else e.stat().st_size for e in sample) / len(sample)
    if mean_bytes < _THREADED_FROM:
        yield from map(decode, range(len(encoded)))
        return
    with ThreadPoolExecutor(worker_count()) as pool:
        for start in range(0, len(encoded), _MEMORY_CHUNK):
            yield from pool.map(decode, range(start, min(start + _MEMORY_CHUNK, len(encoded))))


def worker_count() -> int:
    """Threads that decode images: one per core, eight at most."""
    return min(8, os.cpu_count() or 1)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
