"""Words of single flags: numbers, sizes, ways of resizing, and what ``python:`` names."""

from typing import TYPE_CHECKING, TypeVar

from secateur.errors import DataError

if TYPE_CHECKING:
    from secateur.data.preprocessing import Resizing

_Kind = TypeVar("_Kind")

MAX_CHANNELS = 2**20
"""The largest width that has a meaning; no tensor can hold what lies above it."""
MAX_SIDE = 2**13
"""The largest side of an image, in pixels."""


def numbers(text: str | None, flag: str) -> tuple[float, ...] | None:
    """Read numbers such as "0.485,0.456,0.406".

    Raises:
        DataError: If they are not numbers.
    """
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise DataError(f"`{flag}` must be numbers separated by commas, such as 0.5,0.5,0.5; got {text!r}.") from error


def image_size(text: "str | int | None") -> tuple[int, int] | None:
    """Read a size such as "240x320" (height x width) or "224".

    Raises:
        DataError: If it is none.
    """
    if text is None:
        return None
    words = str(text).lower().replace("*", "x").split("x")
    try:
        sides = [int(word) for word in words]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or not all(1 <= side <= MAX_SIDE for side in sides):
        raise DataError(
            f"`--image-size` must be a height and a width in pixels from 1 to {MAX_SIDE}, such as 240x320, or one "
            f"number for squares; got {str(text)[:80]!r}."
        )
    return sides[0], sides[-1]


def channels_of(text: str | None) -> tuple[int | None, bool]:
    """Read the number of channels, and whether blue comes first.

    Raises:
        DataError: If it is neither a number from 1 to 16 nor ``bgr``.
    """
    from secateur.data.preprocessing import MAX_CHANNELS_OF_IMAGES

    if text is None or text == "bgr":
        return (None, False) if text is None else (3, True)
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MAX_CHANNELS_OF_IMAGES:
        raise DataError(
            f"`--channels` must be from 1 to {MAX_CHANNELS_OF_IMAGES}, or bgr for blue first; got {text[:80]!r}."
        )
    return int(text), False


def resizing_of(text: str | None, own: "Resizing | None") -> "Resizing | None":
    """Read how images get their size, such as "squash" or "crop:0.95,bicubic".

    Args:
        text: A way of resizing, an interpolation, or both; None takes ``own``.
        own: What the model was made with, for what the text does not say.

    Raises:
        DataError: If it is not of this form.
    """
    from secateur.data.preprocessing import Interpolation, ResizeMode, Resizing

    if text is None:
        return own
    found = own or Resizing()
    modes, hows = {each.value: each for each in ResizeMode}, {each.value: each for each in Interpolation}
    for word in text.split(","):
        name, colon, fraction = word.strip().partition(":")
        try:
            if name in modes and (not colon or name == ResizeMode.CROP.value):
                part = float(fraction) if colon else found.crop_fraction
                found = Resizing(modes[name], part, found.interpolation)
                continue
        except ValueError:
            name = ""
        if name not in hows or colon:
            raise DataError(
                f"`--resize` must be {', '.join(modes)} or crop:FRACTION, and {' or '.join(hows)} after a comma if "
                f"wanted, such as crop:0.95,bicubic; got {text[:80]!r}."
            )
        found = Resizing(found.mode, found.crop_fraction, hows[name])
    return found


def made_by(spec: str, kind: type[_Kind], flag: str, trust_source: bool) -> _Kind:
    """Call the function or class that ``python:PACKAGE.MODULE:NAME`` names, without arguments.

    Args:
        spec: The words of the user.
        kind: What it must make.
        flag: That the words were given with, for messages.
        trust_source: Whether the code may run.

    Raises:
        ModelError: If the code is not trusted, cannot be imported, fails, or makes something else.
    """
    from secateur.errors import ModelError
    from secateur.models.source import load_factory

    factory = load_factory(spec, makes=flag.strip("-"), trust_source=trust_source)
    try:
        made = factory()
    except Exception as error:
        raise ModelError(f"`{flag}` must name a factory that needs no arguments; {spec} failed: {error!r}.") from error
    if not isinstance(made, kind):
        raise ModelError(
            f"`{flag}` must name a factory that returns a {kind.__module__}.{kind.__name__}; {spec} returned a "
            f"{type(made).__name__}."
        )
    return made
