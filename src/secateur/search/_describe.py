"""Strategies in words that are the same in every process."""

from dataclasses import fields, is_dataclass
from types import FunctionType


def describe(thing: object) -> str:
    """A strategy or any part of one as text that is the same in every process: functions by their name."""
    if is_dataclass(thing) and not isinstance(thing, type):
        inside = ", ".join(f"{part.name}={describe(getattr(thing, part.name))}" for part in fields(thing))
        return f"{type(thing).__name__}({inside})"
    return thing.__qualname__ if isinstance(thing, FunctionType) else repr(thing)
