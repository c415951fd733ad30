"""Messages of the Python interface in the words of the command line, and several of them at once."""

import re
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from secateur.errors import SecateurError

Made = TypeVar("Made")

_RENAMED: Mapping[str, str] = {
    "calibration_images": "--calibration",
    "min_kept_fraction": "--min-kept",
    "max_fraction": "--remove-blocks",
    "ema_decay": "--ema",
    "warmup_fraction": "--warmup",
    "out": "--out",
    "export": "--export",
    "opset": "--onnx-opset",
    "free_size": "--onnx-free-size",
    "half": "--onnx-half",
    "outputs": "--onnx-outputs",
}
"""Flags of arguments that have another name in Python; all others are called alike."""
_INSIDE = r"(?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*"
_CODE = re.compile(rf"\b[A-Z]\w*\({_INSIDE}\)")
"""A call, such as SearchSpace(divisor=8): how something is written in Python stays as it is."""
_IN_PYTHON = re.compile(rf"; in Python: {_INSIDE}(?=\))| \(in Python: {_INSIDE}\)| \(\w+=(?:True|False|None)\)")
_TWICE = re.compile(r"; on the command line (?:--[\w-]+(?:, | and )?)+")
_REPEATED = re.compile(r"(--[\w-]+) \(\1\)")
_NOW = re.compile(r"(?<![\w./`'\"-])([a-z_]+)(?= \(now )")
_LONGEST_REASON = 200
"""Characters of what an error says, in a message about it."""
_QUOTED = re.compile(r"`(\w+)`")
_SET = re.compile(r"(?<![\w./`'\"-])([a-z]+(?:_[a-z]+)*)=([\w.]+)")
_BARE = re.compile(r"(?<![\w./`'\"-])([a-z]+(?:_[a-z]+)+)(?![\w./=('\"-])")


def in_flags(message: str, flags: Mapping[str, str]) -> str:
    """Return a message of the Python interface with the flags of a command.

    Args:
        message: Such as "`image_size` must be positive; got 0. Pass image_size=224."
        flags: The flags by the name of what they set, see `flags_of`.

    Returns:
        Such as "`--image-size` must be positive; got 0. Pass --image-size 224." Names without a flag stay.
    """
    message = _TWICE.sub("", _IN_PYTHON.sub("", message))
    found, end = list[str](), 0
    for code in _CODE.finditer(message):
        found += [_plain_in_flags(message[end : code.start()], flags), code[0]]
        end = code.end()
    return _REPEATED.sub(r"\1", "".join((*found, _plain_in_flags(message[end:], flags))))


def _plain_in_flags(text: str, flags: Mapping[str, str]) -> str:
    text = _QUOTED.sub(lambda found: f"`{flags[found[1]]}`" if found[1] in flags else found[0], text)
    text = _SET.sub(lambda found: _with_value(flags[found[1]], found[2]) if found[1] in flags else found[0], text)
    return _BARE.sub(_flag_of(flags), _NOW.sub(_flag_of(flags), text))


def _flag_of(flags: Mapping[str, str]) -> Callable[[re.Match[str]], str]:
    return lambda found: flags.get(found[1], found[0])


def _with_value(flag: str, value: str) -> str:
    dots = len(value) - len(value.rstrip("."))  # The end of a sentence.
    number = value[: len(value) - dots]
    return f"{flag}{'' if number == 'True' else f' {number}'}{value[len(value) - dots :]}"


def flags_of(command: Callable[..., Any]) -> dict[str, str]:
    """Return the flags of a command, with their dashes, by the names of what they set."""
    from cyclopts import App

    app = App()
    app.default(command)
    found: dict[str, str] = {}
    for argument in app.assemble_argument_collection():
        name = next((name for name in argument.names if name.startswith("--")), None)
        if name is not None:
            found[argument.field_info.name] = name
    known = set(found.values())
    return {**found, **{name: flag for name, flag in _RENAMED.items() if flag in known}}


class Checks:
    """Checks words that were given, one after the other, and says all that is wrong with them at once."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []

    def add(self, make: Callable[[], Made], flags: Mapping[str, str] | None = None) -> Callable[[], Made]:
        """Make something now, and return how to get it; an error that the user can cause is kept for `settle`.

        Args:
            make: Makes it.
            flags: Flags of its own by what they set, where a command has several of the kind: --teacher, --student.
        """
        try:
            made = make()
        except (SecateurError, OSError) as caught:
            error = (
                type(caught)(in_flags(str(caught), flags)) if flags and isinstance(caught, SecateurError) else caught
            )
            problem = error
            # What depends on something that is wrong itself is not said twice.
            if not any(error is known for known in self._errors):
                self._errors.append(error)

            def fail() -> Made:
                raise problem

            return fail
        return lambda: made

    @staticmethod
    def value_or(get: Callable[[], Made], default: Made) -> Made:
        """Return what was made, or a default if it was wrong: to check what depends on it all the same."""
        try:
            return get()
        except (SecateurError, OSError):
            return default

    def settle(self) -> None:
        """Refuse words that are wrong.

        Raises:
            SecateurError: If some are; with all that is wrong.
        """
        if not self._errors:
            return
        if len(self._errors) == 1:
            raise self._errors[0]
        listed = "\n".join(f"- {error}" for error in self._errors)
        raise SecateurError(f"{len(self._errors)} things cannot be used:\n{listed}") from self._errors[0]


def describe_foreign(error: BaseException) -> str | None:
    """Return what to say of an error that Secateur's own code did not raise; None if it did.

    Code that the user names (a model, a task, a strategy) may raise anything, end the process, ask for more memory than
    there is, or nest its modules more deeply than Python can follow. A package may not be importable.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [place for place, frame in enumerate(frames) if _is_ours(frame)]
    after = frames[ours[-1] + 1 :] if ours else []
    if isinstance(error, MemoryError):
        return (
            f"there must be enough memory; got too little ({_text(error)}). Use a smaller model, batch or image size."
        )
    if not after:
        return None
    if isinstance(error, RecursionError) and {_package(frame) for frame in after} & {"torch", "copy"}:
        return (
            f"`model` must not nest modules more deeply than Python can follow; got {_text(error)}. Does a module hold "
            "itself? Otherwise join containers within containers."
        )
    if after[0].f_code.co_name == "<module>" and _is_installed(after[0].f_code.co_filename):
        return (
            f"the package {_package(after[0])} must be importable; got {type(error).__name__}: {_text(error)}. "
            "Look at the environment variables that it reads, or install it again."
        )
    theirs = [frame for frame in after if not _is_installed(frame.f_code.co_filename)]
    if isinstance(error, SystemExit):
        frame, what = (theirs or after)[-1], f"ended the process with the exit code {error.code!r}"
    elif theirs:
        frame, what = theirs[-1], f"raised {type(error).__name__}: {_text(error)}"
    else:
        return None
    where = f"{frame.f_code.co_filename}, in {frame.f_code.co_name}"
    return f"code that is not Secateur's {what} ({where}). Correct that code; --debug shows the whole traceback."


def _is_ours(frame: FrameType) -> bool:
    return _package(frame) == "secateur"


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).split(".")[0]


def _is_installed(path: str) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    roots = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return path.startswith("<") or any(Path(path).is_relative_to(root) for root in roots)


def _text(error: BaseException) -> str:
    """The first line of what an error says; `str` runs code of its class, which may fail."""
    try:
        lines = str(error).strip().splitlines()
    except Exception:
        return "without a message that can be read"
    return lines[0][:_LONGEST_REASON] if lines else "without a message"
