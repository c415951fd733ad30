"""What a model returns, in any nesting: every tensor and every other value by its place."""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from secateur.errors import ModelError

Leaf = Tensor | bool | int | float | complex | str | bytes | None
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
"""Values that are compared as they are."""
_NAMES = (torch.dtype, torch.device, Enum, type, slice, range)
"""Values that are compared by their text."""
_CODE = frozenset({FunctionType, MethodType, BuiltinFunctionType})
"""Attributes that are no values."""


def output_leaves(output: Any) -> dict[str, Leaf]:
    """Return every tensor and every plain value that a model returns, by its place, such as ``.boxes[0]``.

    Tuples, lists, sets, mappings, dataclasses and other objects with attributes are opened. NumPy arrays become
    tensors; a sparse tensor stands for its values and indices.

    Args:
        output: Anything that a forward pass returns.

    Raises:
        ModelError: If there is a value of which neither items nor attributes can be read, such as a generator: it
            cannot be compared, so a wrong cut might stay unseen.
    """
    leaves: dict[str, Leaf] = {}
    for place, leaf in _collected(output).items():
        leaves.update(_plain_tensors(leaf, place) if isinstance(leaf, Tensor) else {place: leaf})
    return leaves


def output_tensors(output: Any) -> list[Tensor]:
    """Return every tensor that a model returns, in any nesting and as it is; see `output_leaves`."""
    return [leaf for leaf in _collected(output).values() if isinstance(leaf, Tensor)]


def tensor_shapes(value: Any) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of all tensors in anything; none if some part of it cannot be read."""
    if isinstance(value, Tensor):
        return (tuple(value.shape),)
    # What most modules take, which need not be opened with care.
    if type(value) in {tuple, dict} and all(isinstance(part, Tensor) for part in _items(value)):
        return tuple(tuple(part.shape) for part in _items(value))
    try:
        return tuple(tuple(tensor.shape) for tensor in output_tensors(value))
    except Exception:  # A module within may take and return anything.
        return ()


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _collected(output: Any) -> dict[str, Leaf]:
    leaves: dict[str, Leaf] = {}
    _collect(output, "", leaves, set())
    return leaves


def _collect(value: Any, place: str, leaves: dict[str, Leaf], opened: set[int]) -> None:
    if isinstance(value, (Tensor, *_PLAIN)):
        leaves[place] = value
    elif isinstance(value, np.ndarray | np.generic):
        _collect(torch.from_numpy(np.asarray(value)) if _is_numeric(value) else str(value), place, leaves, opened)
    elif isinstance(value, _NAMES):
        leaves[place] = str(value)
    elif id(value) not in opened:
        # An object may refer to itself or to one that holds it.
        opened.add(id(value))
        for name, item in _parts(value, place).items():
            _collect(item, f"{place}{name}", leaves, opened)
        opened.discard(id(value))


def _plain_tensors(tensor: Tensor, place: str) -> dict[str, Tensor]:
    """Return strided tensors of real numbers that stand for a tensor."""
    if tensor.is_nested:
        return {f"{place}[{n}]": part for n, part in enumerate(tensor.unbind())}
    if tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        return {f"{place}.indices": whole.indices(), f"{place}.values": whole.values()}
    if tensor.layout != torch.strided:
        return {place: tensor.to_dense()}
    if tensor.is_quantized:
        return {place: tensor.dequantize()}
    return {place: torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor}


def _is_numeric(value: Any) -> bool:
    return np.asarray(value).dtype.kind in "biuf"


def _parts(value: Any, place: str) -> dict[str, Any]:
    """Return the parts of an object by how one writes the access to them."""
    if isinstance(value, Mapping):
        return {f"[{key!r}]": item for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        names: tuple[str, ...] = getattr(value, "_fields", ())
        return {f".{name}": item for name, item in zip(names, value, strict=True)}
    if isinstance(value, list | tuple | deque):
        return {f"[{n}]": item for n, item in enumerate(cast("list[Any]", value))}
    if isinstance(value, set | frozenset):
        return {f"[{n}]": item for n, item in enumerate(sorted(value, key=repr))}
    found: dict[str, Any] = {}
    if is_dataclass(value):
        found.update((f".{field.name}", getattr(value, field.name, None)) for field in fields(value))
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        slots = (slots,) if isinstance(slots, str) else slots
        found.update((f".{name}", getattr(value, name)) for name in slots if hasattr(value, name))
    found.update((f".{name}", item) for name, item in getattr(value, "__dict__", {}).items() if type(item) not in _CODE)
    if not found and type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
        return {}  # An object without any state, such as a marker.
    if not found:
        where = f" at {place}" if place else ""
        raise ModelError(
            f"`model` must return tensors, plain values, containers or objects with attributes; got "
            f"{type(value).__name__}{where}, which cannot be compared. Wrap the model in a module that returns tensors."
        )
    return found
