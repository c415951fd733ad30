"""Reading JSON that may be damaged or hostile: every value is checked before it is used."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import cast

from secateur._text import visible
from secateur.errors import ArtifactError

MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_ITEMS = 2_000_000
MAX_DEPTH = 32
MAX_NAME = 1_000
"""Characters in the name of a module, attribute or tensor."""

_LARGEST_INTEGER = 2**63 - 1
_STRUCTURE = (b",", b":", b"[", b"{")
_SHOWN = 80


def parse(text: bytes, name: str) -> dict[str, object]:
    """Parse bytes as a JSON object: UTF-8, no NaN or infinity, no key twice, of bounded size and depth.

    Python objects can take a hundred times the memory of their JSON text. So the characters after which a value can
    begin are counted before anything is parsed.

    Raises:
        ArtifactError: If the bytes are anything else.
    """
    if sum(map(text.count, _STRUCTURE)) > MAX_ITEMS:
        raise _not_json(name, f"more than {MAX_ITEMS} values")
    try:
        data: object = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        _check_values(data)
    except (ValueError, RecursionError) as error:
        raise _not_json(name, brief(error)) from error
    if not isinstance(data, dict):
        raise ArtifactError(
            f"{name} must hold a JSON object; got {type(data).__name__}. The file is not an artifact's."
        )
    return cast(dict[str, object], data)


def _not_json(name: str, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{name} must be JSON; got something else ({reason}). The file is damaged: save the artifact again."
    )


def _check_values(data: object) -> None:
    """Refuse what other JSON readers may not hold: deep nesting, huge numbers."""
    waiting = [(data, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, float):
            if not math.isfinite(value):
                raise ValueError("a number is too large")
        elif isinstance(value, int):
            if abs(value) > _LARGEST_INTEGER:
                raise ValueError("a whole number is too large")
        elif isinstance(value, (dict, list)):
            if depth > MAX_DEPTH:
                raise ValueError(f"values within more than {MAX_DEPTH} others")
            held = cast(dict[str, object] | list[object], value)
            waiting.extend((item, depth + 1) for item in (held.values() if isinstance(held, dict) else held))


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


class Fields:
    """Checked access to the fields of one JSON object.

    Args:
        data: The object.
        where: Its name in messages, such as ``weights.tensors[3]``.
    """

    def __init__(self, data: object, where: str) -> None:
        if not isinstance(data, Mapping):
            raise wrong(where, "an object", data)
        self._data = cast(Mapping[str, object], data)
        self._where = where

    def _get(self, key: str) -> object:
        if key not in self._data:
            raise wrong(self.path(key), "present", "nothing")
        return self._data[key]

    def path(self, key: str) -> str:
        """Return the dotted name of a field."""
        return f"{self._where}.{key}" if self._where else key

    def has(self, key: str) -> bool:
        """Return whether a field that may be left out is there."""
        return key in self._data

    def mapping(self, key: str) -> dict[str, object]:
        """Return a field that is an object."""
        value = self._get(key)
        if not isinstance(value, dict):
            raise wrong(self.path(key), "an object", value)
        return cast(dict[str, object], value)

    def fields(self, key: str) -> "Fields":
        """Return a field that is an object, for checked access."""
        return Fields(self._get(key), self.path(key))

    def items(self, key: str, limit: int = MAX_ITEMS) -> list[object]:
        """Return a field that is a list of at most ``limit`` items."""
        value = self._get(key)
        if not isinstance(value, list):
            raise wrong(self.path(key), "a list", value)
        found = cast(list[object], value)
        if len(found) > limit:
            raise wrong(self.path(key), f"a list of at most {limit} items", f"{len(found)} items")
        return found

    def text(self, key: str) -> str:
        """Return a field that is a string."""
        value = self._get(key)
        if not isinstance(value, str):
            raise wrong(self.path(key), "a string", value)
        return value

    def name(self, key: str) -> str:
        """Return a field that is the name of a module, attribute or tensor."""
        value = self.text(key)
        if len(value) > MAX_NAME:
            raise wrong(self.path(key), f"a name of at most {MAX_NAME} characters", value)
        return value

    def integer(self, key: str, *, least: int | None = None) -> int:
        """Return a field that is an int (at least ``least``)."""
        value = self._get(key)
        if type(value) is not int or (least is not None and value < least):
            raise wrong(self.path(key), "an integer" if least is None else f"an integer of at least {least}", value)
        return value

    def optional_integer(self, key: str, *, least: int | None = None) -> int | None:
        """Return a field that is an int or null."""
        return None if self._get(key) is None else self.integer(key, least=least)

    def optional_place(self, key: str, *, longest: int) -> int | str | tuple[int | str, ...] | None:
        """Return a field that is null, a position, a name, or a path of 2 to ``longest`` of these."""
        value = self._get(key)
        if not isinstance(value, list):
            return self.name(key) if isinstance(value, str) else self.optional_integer(key, least=0)
        steps = cast(list[object], value)
        known = all(isinstance(step, str) or (type(step) is int and step >= 0) for step in steps)
        if not known or not 2 <= len(steps) <= longest:
            raise wrong(self.path(key), f"a list of 2 to {longest} positions and names", steps)
        return tuple(cast(list[int | str], steps))

    def integers(self, key: str, *, least: int, limit: int) -> tuple[int, ...]:
        """Return a field that is a list of ints."""
        found = self.items(key, limit)
        for value in found:
            if type(value) is not int or value < least:
                raise wrong(self.path(key), f"a list of integers of at least {least}", found)
        return tuple(cast(list[int], found))

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return a field that is a list of numbers."""
        found = self.items(key)
        if not all(type(value) in (int, float) and abs(cast(float, value)) < 1e300 for value in found):
            raise wrong(self.path(key), "a list of numbers", found)
        return tuple(float(value) for value in cast(list[float], found))

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a field that is a list of strings."""
        found = self.items(key)
        if not all(isinstance(value, str) for value in found):
            raise wrong(self.path(key), "a list of strings", found)
        return tuple(cast(list[str], found))

    def text_by_name(self, key: str) -> dict[str, str]:
        """Return a field that is an object of strings."""
        found = self.mapping(key)
        if not all(isinstance(value, str) for value in found.values()):
            raise wrong(self.path(key), "an object of strings", found)
        return cast(dict[str, str], found)


def finite(data: Mapping[str, object]) -> dict[str, object]:
    """Return findings as JSON can hold them: numbers that are NaN or infinite become None (null).

    NumPy scalars, arrays and tensors become Python numbers and lists; of any other object its text is kept. Mappings,
    lists and tuples are copied with everything inside.
    """
    return {str(key): _finite_value(value) for key, value in data.items()}


def _finite_value(value: object) -> object:
    if isinstance(value, Mapping):
        return finite(cast(Mapping[str, object], value))
    if isinstance(value, (list, tuple)):
        items = [_finite_value(item) for item in cast(Sequence[object], value)]
        return tuple(items) if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    listed = getattr(value, "tolist", None)  # NumPy's scalars and arrays have it, and so have tensors.
    return _finite_value(listed()) if callable(listed) else str(value)


def wrong(where: str, wanted: str, got: object) -> ArtifactError:
    """Return the error for a field with a wrong value."""
    return ArtifactError(
        f"`{where}` must be {wanted}; got {brief(got)} (secateur.json). The file is damaged: save the artifact again."
    )


def brief(value: object, *, most: int = _SHOWN) -> str:
    """Shorten an untrusted value to printable characters."""
    text = value if isinstance(value, str) else str(value) if isinstance(value, Exception) else repr(value)
    text = text if len(text) <= most else text[: most - 3] + "..."
    return visible(text, keep="")
