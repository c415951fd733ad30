"""Arguments and settings of the wrong type are refused where they are given, by the annotations that stand there.

A wrong type would otherwise fail deep in a run, after hours perhaps, with an error about something else; and any text,
also "no", would do as consent where a function asks for True or False.
"""

import inspect
import numbers
import os
import sys
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast, dataclass_transform

import numpy as np

from secateur._text import visible
from secateur.errors import KindError, SecateurError

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")
Class = TypeVar("Class", bound=type)

_LONGEST = 80
_OF_PATHS = ("Path", "<class 'pathlib.Path'>", "pathlib.Path")


def checked(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Make a function refuse arguments that are not of the kinds that it is annotated with, see `check_arguments`."""

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        check_arguments(function, args, kwargs)
        return function(*args, **kwargs)

    return call


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def settings(cls: Class) -> Class:
    """Make a frozen dataclass whose fields are checked as the arguments of `checked` functions are.

    What the class says about a value in its own ``__post_init__`` comes first. Text is accepted for a path.
    """
    made = dataclass(frozen=True)(cls)
    initialize: Any = made.__init__
    paths = {name for name, hint in inspect.get_annotations(made).items() if str(hint).startswith(_OF_PATHS)}

    @wraps(initialize)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if paths:
            args, kwargs = _with_paths(initialize, (self, *args), kwargs, paths)
        try:
            initialize(self, *args, **kwargs)
        except SecateurError:
            raise
        except Exception:
            try:
                check_arguments(initialize, (self, *args), kwargs, within=made)
            except KindError as wrong:
                raise wrong from None
            raise
        if type(self).__init__ is __init__:
            _check_fields(self)

    made.__init__ = __init__
    return cast(Class, made)


def check_arguments(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, within: type | None = None
) -> None:
    """Refuse arguments that are not of the kinds that a function is annotated with.

    Whole numbers do where numbers are asked for, text and other paths where a path is, lists where tuples are. What
    an annotation says that cannot be seen from outside, such as what a function returns, is not checked.

    Args:
        function: What is called.
        args: Positional arguments.
        kwargs: Arguments by name.
        within: The class that it is a method of.

    Raises:
        KindError: With the argument, what it must be, and what was given.
    """
    try:
        given = _signature(function).bind(*args, **kwargs).arguments
    except TypeError:  # The call itself says better what is missing or too much.
        return
    hints = _hints(function if within is None else within)
    for name, value in given.items():
        if name in hints:
            _check(name, value, hints[name])


def _check_fields(made: Any) -> None:
    hints = _hints(type(made))
    for each in fields(made):
        value = getattr(made, each.name)
        if not each.init or each.name not in hints:
            continue
        _check(each.name, value, hints[each.name])


def _with_paths(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], paths: set[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments but the first, with paths where there was text."""
    names = list(_signature(function).parameters)
    made = [
        Path(each) if name in paths and isinstance(each, str) else each for name, each in zip(names, args, strict=False)
    ]
    named = {name: Path(each) if name in paths and isinstance(each, str) else each for name, each in kwargs.items()}
    return (*made[1:], *args[len(names) :]), named


def _check(name: str, value: Any, hint: Any) -> None:
    kind = _kind(hint)
    if kind.fits(value):
        return
    if isinstance(value, type):
        got = f"got the class {value.__name__}. Call it: {value.__name__}()."
    else:
        shown = visible(" ".join(repr(value).split()), keep="")
        got = f"got {shown[:_LONGEST]} ({type(value).__name__}).{_place(hint)}"
    raise KindError(f"`{name}` must be {kind.words}; {got}")


_signature = cache(inspect.signature)


@cache
def _hints(owner: Any) -> dict[str, Any]:
    """The annotations of a function or class, without those that name what is imported for type checkers only."""
    found: dict[str, Any] = {}
    for each in reversed(owner.__mro__) if isinstance(owner, type) else (owner,):
        names = vars(sys.modules[each.__module__])
        for name, hint in inspect.get_annotations(each).items():
            alone = types.SimpleNamespace(__annotations__={name: hint})
            try:
                found[name] = typing.get_type_hints(alone, names)[name]
            except Exception:
                found.pop(name, None)
    found.pop("return", None)
    return found


@dataclass(frozen=True)
class _Kind:
    """What a hint says: which values fit, and how it is called."""

    fits: Callable[[Any], bool]
    words: str


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and value is not True and value is not False


_ANYTHING = _Kind(lambda _: True, "anything")
_FUNCTION = _Kind(callable, "a function")
_PATH = _Kind(lambda value: isinstance(value, str | os.PathLike), "a path")
_PLAIN = {
    Any: _ANYTHING,
    object: _ANYTHING,
    None: _Kind(lambda value: value is None, "None"),
    type(None): _Kind(lambda value: value is None, "None"),
    bool: _Kind(lambda value: isinstance(value, bool | np.bool_), "True or False"),
    int: _Kind(lambda value: _is_number(value, numbers.Integral), "a whole number"),
    float: _Kind(lambda value: _is_number(value, numbers.Real), "a number"),
    str: _Kind(lambda value: isinstance(value, str), "text"),
    Path: _PATH,
}


@cache
def _kind(hint: Any) -> _Kind:
    """Read a hint; one that says nothing about values allows all."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if origin in {typing.Union, types.UnionType}:
        members = [_kind(each) for each in args]
        words = " or ".join(dict.fromkeys(each.words for each in members)).replace(" or of the type ", " or ")
        return _Kind(lambda value: any(each.fits(value) for each in members), words)
    if origin is typing.Annotated:
        return _kind(args[0])
    if origin is typing.Literal:
        return _Kind(lambda value: value in args, " or ".join(map(repr, args)))
    if origin is Callable:
        return _FUNCTION
    kind = origin or hint
    # The classes of typing, such as TextIO, have no instances.
    return _of_class(kind, args) if isinstance(kind, type) and kind.__module__ != "typing" else _ANYTHING


def _is_simple(hint: Any) -> bool:
    """Whether contents are checked: numbers, text, None, and objects of Secateur. Other contents are the user's."""
    members = typing.get_args(hint) if typing.get_origin(hint) in {typing.Union, types.UnionType} else (hint,)
    return all(member in _PLAIN or getattr(member, "__module__", "").split(".")[0] == "secateur" for member in members)


def _of_class(kind: type, args: tuple[Any, ...]) -> _Kind:
    if getattr(kind, "_is_protocol", False):
        # Any object may have the methods; text, numbers and None never do.
        if "__call__" in vars(kind):
            return _FUNCTION
        return _Kind(lambda value: not isinstance(value, str | bytes | numbers.Number | None), f"a {kind.__name__}")
    held = [_kind(each) if _is_simple(each) else _ANYTHING for each in args if each is not Ellipsis]
    words = ", ".join(each.words for each in held)
    if issubclass(kind, Mapping) and len(held) == 2:
        key, entry = held
        return _Kind(
            lambda value: (
                isinstance(value, kind)
                and (type(value) is not dict or all(key.fits(k) and entry.fits(v) for k, v in cast(Any, value).items()))
            ),
            "a mapping" if entry is _ANYTHING else f"a mapping from {words.replace(', ', ' to ')}",
        )
    if kind is tuple and args[-1:] != (Ellipsis,) and args:
        return _Kind(
            lambda value: (
                isinstance(value, tuple | list)
                and len(value) == len(held)
                and all(each.fits(entry) for each, entry in zip(held, cast(Sequence[Any], value), strict=True))
            ),
            f"({words})",
        )
    if issubclass(kind, Collection) and len(held) == 1:
        inner, kinds = held[0], (tuple, list) if kind is tuple else (kind,)
        name = f"a {kind.__name__.lower()}"
        return _Kind(
            lambda value: (
                isinstance(value, kinds)
                and not isinstance(value, str | bytes)
                and (not isinstance(value, list | tuple | set | frozenset) or all(map(inner.fits, value)))
            ),
            name if inner is _ANYTHING else f"{name}, each of it {words}",
        )
    return _Kind(lambda value: isinstance(value, kind), f"of the type {kind.__name__}")


def _place(hint: Any) -> str:
    """Where the classes are that a hint names, if they are Secateur's."""
    members = typing.get_args(hint) or (hint,)
    ours = [each for each in members if isinstance(each, type) and each.__module__.split(".")[0] == "secateur"]
    return f" See {'.'.join(ours[0].__module__.split('.')[:2])}." if ours else ""
