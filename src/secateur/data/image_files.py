"""Image files of strangers: opened safely, with all channels or none lost unasked, and what cannot be used is named."""

import contextlib
import errno
import io
import math
import os
import stat
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from secateur.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 2**26
"""The most pixels of one image, encoded or while resized: 8192 x 8192. A file of kilobytes can claim any number."""
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"})
_CONVERTED_TO = {"1": "L", "LA": "L"} | dict.fromkeys(("RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"), "RGB")
"""PIL modes with at most 8 bits per channel, and the mode they are converted to; others would be clipped."""
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
"""PIL modes by the number of channels."""
ARRAY_SUFFIX = ".npy"
"""Files of numpy, for images of more than four channels."""
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")
"""Formats that are decoded, whatever a file is called. PIL has more, of which some start other programs (EPS)."""
_MAX_READ_AT_ONCE = 2**24
"""Files up to this size are read at once; of larger ones only what the decoder asks for is read."""
_ENDS = ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND"), (b"GIF8", b"\x3b"))
"""How files of JPEG, PNG and GIF begin, and what is among their last bytes if nothing is missing."""
_END_BYTES = 64
Encoded = bytes | Path
"""An image file, in memory or on disk."""

_MOST_NAMED = 20
"""Images named in one message; more are counted."""
_LONGEST_LIST = 5_000
"""Characters of such a list, so that long paths do not fill the terminal."""


@dataclass
class ImageProblems:
    """Collects the images of a set that cannot be used, while the set is read.

    Attributes:
        skip: Whether they are left out instead of being refused.
        found: What is wrong, by the name of the image's file or row, as sentences.
    """

    skip: bool = False
    found: dict[str, str] = field(default_factory=dict[str, str])

    def note(self, name: str, problem: DataError) -> None:
        """Note that an image cannot be used."""
        self.found[name] = str(problem)

    def settle(self, data: str, images: int) -> tuple[str, ...]:
        """Refuse a set in which images cannot be used, or warn of those that are left out; return their names.

        Args:
            data: Name of the set.
            images: Number of images that were looked at.

        Raises:
            DataError: If there are some, and they are not to be left out.
        """
        if not self.found:
            return ()
        if not self.skip:
            raise DataError(self._refusal(data, images))
        warnings.warn(f"{describe_skipped(data, tuple(self.found))}.", stacklevel=3)
        return tuple(self.found)

    def check_left(self, data: str, images: int, left: int) -> None:
        """Refuse a split of which no image can be used.

        Raises:
            DataError: If so, with all images that were found so far.
        """
        if not left:
            raise DataError(self._refusal(data, images))

    def _refusal(self, data: str, images: int) -> str:
        problems = list(self.found.values())
        way_out = "" if self.skip else " To go on without such images: --skip-bad-images (skip_bad_images=True)."
        if len(problems) == 1:
            return problems[0] + way_out
        shown = [f"- {problem}" for problem in problems[:_MOST_NAMED]]
        while len(shown) > 1 and sum(map(len, shown)) > _LONGEST_LIST:
            shown.pop()
        if len(problems) > len(shown):
            shown.append(f"- and {len(problems) - len(shown)} more")
        return "\n".join((f"{len(problems)} of {images} images of {data} cannot be used:", *shown)) + (
            f"\n{way_out.strip()}" if way_out else ""
        )


def describe_skipped(data: str, names: Sequence[str]) -> str:
    """Return how many images of a set were left out, and which, as a clause; empty if there are none."""
    if not names:
        return ""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    count = "1 image" if len(names) == 1 else f"{len(names)} images"
    return f"{count} of {data} left out, which cannot be used: {', '.join(names[:_MOST_NAMED])}{more}"


def open_image(
    encoded: Encoded,
    where: Callable[[], str],
    least: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
    *,
    channels: int | None = None,
) -> "Image":
    """Open and decode an image with 8 bits per channel.

    Args:
        encoded: The file.
        where: Returns the name of the file or row, for errors.
        least: Returns a sufficient (width, height) for that of the image. A JPEG may then be decoded at a half, a
            quarter or an eighth of its size, which is faster. None decodes it in full size.
        channels: 1 to 4; None takes 1 for gray images and 3 for those of color, and refuses those with transparent
            pixels, of which it would lose something.

    Returns:
        Mode "L" (gray), "LA", "RGB" or "RGBA".

    Raises:
        DataError: If it cannot be decoded, has more than 8 bits per channel, or loses its transparency.
    """
    try:
        with _opened(_read_small_file(encoded)) as image:
            if least is not None:
                image.draft(None, least(image.size))
            _load(image)
    except Exception as error:  # Damaged files make decoders raise any exception.
        reason = reason_of(error)
        raise DataError(
            f"{where()} must be an image that PIL can decode; got {reason}. Repair or remove it."
        ) from error
    if channels is None:
        if image.has_transparency_data:
            _check_opaque(image, where())
        if image.mode in ("L", "RGB"):
            return image
    _check_mode(image.mode, where())
    if channels is not None:
        return image if image.mode == MODES[channels] else _in_channels(image, channels)
    return image.convert(_CONVERTED_TO[image.mode])


def _load(image: "Image") -> None:
    """Decode the pixels of an image, and find that it has all that they need."""
    image.load()
    if image.mode in ("P", "PA") and image.palette is None:
        raise ValueError("a palette image without its palette")


def _in_channels(image: "Image", channels: int) -> "Image":
    """Convert an image; where it has no transparency, all of it is opaque."""
    if image.mode in ("1", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"):  # Pillow converts these to few others.
        image = image.convert(_CONVERTED_TO[image.mode])
    elif image.mode == "P" or "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(MODES[channels])


def _check_opaque(image: "Image", where: str) -> None:
    """Refuse an image that has transparent pixels, and that nobody has said what to do with."""
    if image.mode not in ("LA", "PA", "RGBA", "P", "L", "RGB", "1"):
        return
    alpha = image.convert("RGBA").getchannel("A")
    if alpha.getextrema()[0] != 255:
        raise DataError(
            f"{where} must not have transparent pixels unless `channels` is given; they would be lost. Keep the "
            "transparency as a channel of its own (channels=4; 2 for gray images), or leave it out (channels=3; 1)."
        )


def open_pixels(encoded: Encoded, where: Callable[[], str], channels: int | None = None) -> np.ndarray:
    """Open an image as (height, width, channels) uint8.

    Images of more than four channels are files of numpy (``.npy``), or TIFFs with a gray page for each channel.

    Args:
        encoded: The file.
        where: Returns the name of the file or row, for errors.
        channels: 1 to 16; for None see `open_image`.

    Raises:
        DataError: If it cannot be decoded, or has another number of channels.
    """
    if isinstance(encoded, Path) and encoded.suffix.lower() == ARRAY_SUFFIX:
        pixels = _read_array(encoded, where())
    elif channels is not None and channels not in MODES:
        pixels = _read_pages(encoded, where(), channels)
    else:
        pixels = np.asarray(open_image(encoded, where, channels=channels))
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if channels is not None and pixels.shape[2] != channels:
        raise DataError(
            f"{where()} must have {channels} channels; got {pixels.shape[2]}. Name the number (`channels`)."
        )
    return pixels


def open_mask(path: Path) -> np.ndarray:
    """Open a file of whole numbers, one for each pixel, as (height, width); palettes give the numbers of their colors.

    Raises:
        DataError: If it cannot be decoded, or holds fractions.
    """
    try:
        with _opened(path) as image:
            image.load()
            mask = np.asarray(image)
    except Exception as error:  # Damaged files make decoders raise any exception.
        raise DataError(
            f"{path} must be a mask that PIL can decode; got {reason_of(error)}. Repair or remove it."
        ) from error
    if mask.dtype.kind not in "biu":
        raise DataError(f"{path} must hold whole numbers, the classes of pixels; got {mask.dtype}. Save 8-bit PNG.")
    return mask


def _read_array(path: Path, where: str) -> np.ndarray:
    try:
        with open_regular_file(path) as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            if dtype != np.uint8 or len(shape) not in (2, 3) or not 0 < math.prod(shape[:2]) <= MAX_PIXELS:
                raise ValueError(f"{dtype} of the shape {shape}")
            file.seek(0)
            return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise DataError(
            f"{where} must be an array of uint8, (height, width, channels); got {reason_of(error)}."
        ) from error


def _read_pages(encoded: Encoded, where: str, channels: int) -> np.ndarray:
    from PIL import ImageSequence

    try:
        with _opened(encoded) as image:
            pages = [
                np.asarray(page) for _, page in zip(range(channels + 1), ImageSequence.Iterator(image), strict=False)
            ]
    except Exception as error:  # Damaged files make decoders raise any exception.
        raise DataError(f"{where} must be an image that PIL can decode; got {reason_of(error)}.") from error
    if len(pages) != channels or any(page.ndim != 2 or page.dtype != np.uint8 for page in pages):
        raise DataError(
            f"{where} must have {channels} gray pages, one for each channel; got {len(pages)}. Save it as a TIFF of "
            f"several pages, or as an array (height, width, {channels}) of numpy."
        )
    return np.stack(pages, -1)


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
        reason = reason_of(error)
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


def reason_of(error: Exception) -> str:
    """Return why a file could not be read, in few words."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return "an unknown format" if "cannot identify" in text else text.rstrip(".") or type(error).__name__


def header_problem(path: Path) -> DataError | None:
    """Return what is wrong with a file by its header, if anything."""
    try:
        mode, _ = read_image_header(path)
        _check_mode(mode, str(path))
    except DataError as error:
        return error
    return None


def decoding_problem(path: Path, channels: int | None = None) -> DataError | None:
    """Return what is wrong with a file, which is decoded; see `open_pixels`."""
    try:
        open_pixels(path, lambda: str(path), channels)
    except DataError as error:
        return error
    return None


def end_problem(path: Path, channels: int | None = None) -> DataError | None:
    """What is wrong with a file that does not end as complete ones do; such a file is decoded to find out."""
    try:
        with open_regular_file(path) as file:
            begin = file.read(12)
            file.seek(max(os.fstat(file.fileno()).st_size - _END_BYTES, 0))
            end, size = file.read(), os.fstat(file.fileno()).st_size
    except OSError:
        return decoding_problem(path, channels)
    if begin.startswith(b"RIFF"):
        complete = int.from_bytes(begin[4:8], "little") + 8 <= size
    else:
        complete = any(begin.startswith(start) and mark in end for start, mark in _ENDS)
    return None if complete else decoding_problem(path, channels)
