"""What carries sizes while a model is recorded: shapes, int attributes, and small tensors of ints.

`SizeTracker` sees every call of PyTorch that the model makes, and gives the results that hold sizes their expressions.
Networks that were converted from ONNX, for example, keep shapes in buffers, take ``torch.tensor(x.shape)`` apart, and
put the parts together again.
"""

import copy
import dataclasses
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from secateur.graph._ledger import Ledger, tensors_in
from secateur.graph._size_ints import (
    Arithmetic,
    Attribute,
    Expression,
    NumpySize,
    ShapeOf,
    SizeInt,
    SizeTuple,
    expression_of,
    plain_number,
    steps_of,
)
from secateur.graph.channel_rules.sizes import RunningModel, SizeNotes, bind_sizes
from secateur.graph.graph import SizeItem

Numbers = np.ndarray[Any, np.dtype[np.object_]]
"""The elements of an int tensor: plain ints, and sizes with their expressions."""

_NUMBERS = "_secateur_numbers"
_MOST_NUMBERS = 64
"""Longer tensors hold no shapes."""
_SHAPE: Any = Tensor.shape.__get__  # type: ignore[attr-defined]


class SizeTracker:
    """Follows the sizes of one recording through the calls that the model makes.

    Attributes:
        notes: What the sizes report to.
        values: Every int that the modules hold, with its value; those in tensors once they are read.

    Args:
        ledger: The record.
        running: The run.
    """

    def __init__(self, ledger: Ledger, running: RunningModel) -> None:
        self._ledger = ledger
        self._running = running
        self.notes = SizeNotes(ledger, running)
        ledger.caller = "", ()
        self.values: dict[Attribute, int] = {}
        self._held: dict[int, tuple[Tensor, str, str]] = {}
        # The numbers that were read from tensors since the last call, of which `torch.Size(tensor)` makes plain ints.
        self._read: list[int] = []

    def run(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call, and return its result with the expressions of the sizes that it holds."""
        # What PyTorch does with the sizes inside of its call is no use of them by the model.
        before, self.notes.paused = self.notes.paused, True
        caller, self._ledger.caller = self._ledger.caller, (name, (args, *kwargs.values()))
        try:
            out = func(*args, **kwargs)
            if func == _SHAPE:
                return self._shape(args[0], out)
            if name == "size":
                return self._size(args, kwargs, out)
            if name in {"numel", "nelement"}:
                return math.prod(self._shape(args[0], args[0].shape))
            return self._follow(func, name, args, kwargs, out)
        finally:
            self.notes.paused, self._ledger.caller = before, caller

    def hold(self, module: str, attribute: str, tensor: Tensor) -> None:
        """Follow the elements of an int tensor that a module holds."""
        self._held[id(tensor)] = tensor, module, attribute

    def _shape(self, tensor: Tensor, shape: torch.Size) -> Any:
        ids = self._ledger.ids_of(tensor)
        if not ids:
            return shape
        return SizeTuple(self._counted(size, ids[d]) if d in ids else size for d, size in enumerate(shape))

    def _size(self, args: Any, kwargs: Any, out: Any) -> Any:
        if isinstance(out, torch.Size):
            return self._shape(args[0], out)
        dim = (args[1] if len(args) > 1 else kwargs["dim"]) % args[0].dim()
        ids = self._ledger.ids_of(args[0]).get(dim)
        return out if ids is None else self._counted(out, ids)

    def _counted(self, size: int, ids: Any) -> SizeInt:
        return SizeInt(size, ShapeOf(ids), self.notes)

    def _follow(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if name == "__len__":
            # Python makes a plain int of whatever `__len__` returns, so that nobody can follow this size.
            ids = self._ledger.ids_of(args[0]).get(0)
            if ids is not None:
                self._ledger.bind(ShapeOf(ids), None, self._text(name))
            return out
        if name == "__index__":
            numbers = self.numbers(args[0])
            self._read.append(out if numbers is None else numbers.item())
            return out
        ints = _ints_in_call(args, kwargs)
        if (ints and name not in _HARMLESS) or name in _CREATING:
            # The calls made here to follow the numbers are not the model's, and must not be recorded.
            with _disable_current_modes():
                known = {id(t): numbers for t in ints if (numbers := self.numbers(t)) is not None}
                if known or name in _CREATING:
                    followed, out = self._follow_numbers(func, name, args, kwargs, out, known)
                    if followed:
                        return out
                    args, kwargs = (_with_sizes(given, known) for given in (args, kwargs))
                    if isinstance(out, Tensor) and out.is_floating_point():
                        self._note_scale(known)
        if self._read:
            args = self._recognize(args)
        bind_sizes(self._ledger, name, self._running.module, args, kwargs, out)
        return out

    def _note_scale(self, known: Mapping[int, Numbers]) -> None:
        """Take note of sizes that become floats, as for a scale of attention."""
        for numbers in known.values():
            for size in numbers.reshape(-1):
                self._ledger.scale(expression_of(size))

    def numbers(self, tensor: Tensor) -> Numbers | None:
        """Return the elements of an int tensor that may hold sizes; None for any other tensor."""
        marked = getattr(tensor, _NUMBERS, None)
        if marked is not None or id(tensor) not in self._held:
            return marked
        _, module, attribute = self._held[id(tensor)]
        found = _plain_numbers(tensor)
        if found is not None:
            for item, value in enumerate(found.reshape(-1).tolist()):
                place = Attribute(module, attribute, item)
                self.values[place] = value
                found.reshape(-1)[item] = SizeInt(value, place, self.notes)
        return found

    def _follow_numbers(  # noqa: PLR0917
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        known: Mapping[int, Numbers],
    ) -> tuple[bool, Any]:
        """Return whether a call on int tensors was followed, and its result."""
        if name in _CREATING:
            data = args[1] if name == "new_tensor" else (args or tuple(kwargs.values()))[0]
            _mark(out, [] if isinstance(data, Tensor) else [data])
            return not isinstance(data, Tensor), out
        if name in _READING:
            return True, self._read_numbers(name, known[id(args[0])], out) if id(args[0]) in known else out
        if name == "__setitem__":
            return self._write_numbers(args, known), out
        if name in _MOVING:
            return self._move(func, args, kwargs, out, known)
        # The quotient of two sizes is not negative, so that rounding down and toward zero are the same.
        whole = name in _DIVIDING and kwargs in ({"rounding_mode": "floor"}, {"rounding_mode": "trunc"})
        act = operator.floordiv if whole else None if kwargs else _COMPUTING.get(name)
        return act is not None and self._compute(act, args, out, known), out

    def _compute(self, act: Callable[..., Any], args: tuple[Any, ...], out: Any, known: Mapping[int, Numbers]) -> bool:
        """Do arithmetic on the elements, or compare them; return whether that is possible."""
        values = [_values_of(value, known) for value in args]
        if any(value is None for value in values) or not isinstance(out, Tensor) or out.is_floating_point():
            return False
        if out.dtype == torch.bool:
            self._compare(act, values)
        else:
            # Arrays of objects apply the operators of their elements, which extends the expressions.
            _mark(out, act(*values))
        return True

    def _compare(self, act: Callable[..., Any], values: Sequence[Any]) -> None:
        self.notes.paused = False
        try:
            act(*values)
        finally:
            self.notes.paused = True

    def _read_numbers(self, name: str, numbers: Numbers, out: Any) -> Any:
        """Return the elements of an int tensor as the Python ints that a method returns."""
        if name == "tolist":
            return numbers.tolist()
        if name == "item":
            return numbers.reshape(-1)[0]
        if name == "__iter__":
            parts = list(out)
            for part, row in zip(parts, numbers, strict=True):
                _mark(part, row)
            return iter(parts)
        # Python makes plain ints of what these methods return.
        for size in numbers.reshape(-1):
            if isinstance(size, SizeInt):
                self._ledger.bind(size.expression, None, self._text(name))
        return out

    def _write_numbers(self, args: tuple[Any, ...], known: Mapping[int, Numbers]) -> bool:
        numbers = known.get(id(args[0]))
        # The numbers of a held tensor are made anew at every read, so what is written into them would be lost.
        if numbers is None or not hasattr(args[0], _NUMBERS):
            return False
        places = torch.arange(numbers.size).view(args[0].shape)[args[1]].reshape(-1).tolist()
        values = _values_of(args[2], known)
        if values is None:
            return False
        numbers.reshape(-1)[places] = np.broadcast_to(np.asarray(values, dtype=object).reshape(-1), len(places))
        return True

    def _move(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, known: Mapping[int, Numbers]
    ) -> tuple[bool, Any]:
        """Execute a call on the positions of elements; return whether it only moves elements, and its result."""
        results = tensors_in(out)
        given: list[Any] = []
        positions: dict[int, Tensor] = {}
        for tensor in tensors_in(args[:1]):
            found = known.get(id(tensor), _plain_numbers(tensor))
            if found is None:
                return False, out
            positions[id(tensor)] = torch.arange(len(given), len(given) + found.size).view(tensor.shape)
            given += found.reshape(-1).tolist()
        if not positions or any(t.is_floating_point() for t in results):
            return False, out
        first = args[0]
        probe = (
            type(first)(positions[id(t)] for t in first) if isinstance(first, list | tuple) else positions[id(first)]
        )
        values = np.empty(len(given), dtype=object)
        values[:] = given
        for result, moved in zip(results, tensors_in(func(probe, *args[1:], **kwargs)), strict=True):
            _mark(result, values[moved.numpy()])
        return True, out

    def _recognize(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with the sizes of ``torch.Size(tensor)``; the sizes read for anything else are bound."""
        read, self._read = self._read, []

        def recognized(value: Any) -> Any:
            # The numbers read since the last call are matched in order. If any differs, they were read for something
            # else.
            if type(value) is not torch.Size:
                return value
            queue = iter(read)
            sizes = [size if isinstance(size, SizeInt) else next(queue, size) for size in value]
            same = [plain_number(size) for size in sizes] == [plain_number(size) for size in value]
            if not same or next(queue, None) is not None:
                return value
            read.clear()
            return SizeTuple(sizes)

        args = tuple(map(recognized, args))
        for size in read:
            self._ledger.bind(expression_of(size), None, self._text("__index__"))
        return args

    def _text(self, name: str) -> str:
        return f"`{name}` in {self._running.module or 'the model itself'}"


def _ints_in_call(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors without floats among the arguments of a call, also those in sequences and bounds of slices."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if type(value) in _NO_INT_TENSORS:  # Nearly all arguments.
            continue
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                found.append(value)
        elif isinstance(value, (tuple, list)):
            if value and type(value[0]) is not int:
                found += _ints_in_call(value, {})
        elif isinstance(value, slice):
            found += _ints_in_call((value.start, value.stop), {})
    return found


_NO_INT_TENSORS = frozenset({nn.Parameter, int, SizeInt, float, bool, str, type(None), torch.Size, SizeTuple})


def _mark(tensor: Any, numbers: Any) -> None:
    """Attach its elements to a tensor, if any is a size."""
    flat = list(_leaves(numbers))
    if isinstance(tensor, Tensor) and len(flat) == tensor.numel() and any(isinstance(n, SizeInt) for n in flat):
        found = np.empty(len(flat), dtype=object)
        found[:] = flat
        setattr(tensor, _NUMBERS, found.reshape(tensor.shape))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple | np.ndarray):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _plain_numbers(tensor: Tensor) -> Numbers | None:
    """Return the elements of a small int tensor."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        return None
    if tensor.numel() > _MOST_NUMBERS or tensor.device.type != "cpu":
        return None
    return np.array(tensor.tolist(), dtype=object)


def _values_of(value: Any, known: Mapping[int, Numbers]) -> Any:
    """Return an operand in arithmetic of sizes; None if it is not an int."""
    if isinstance(value, Tensor):
        return known.get(id(value), _plain_numbers(value))
    return value if isinstance(value, int | np.integer) else None


def _with_sizes(value: Any, known: Mapping[int, Numbers]) -> Any:
    """Return arguments in which tensors that hold sizes are replaced by these."""
    if isinstance(value, Tensor):
        numbers = known.get(id(value))
        if numbers is None:
            return value
        return numbers.item() if numbers.ndim == 0 else numbers.reshape(-1).tolist()
    if type(value) in {list, tuple}:
        return type(value)(_with_sizes(item, known) for item in value)
    if isinstance(value, dict):
        return {key: _with_sizes(item, known) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(_with_sizes(bound, known) for bound in (value.start, value.stop, value.step)))
    return value


_HARMLESS = frozenset({
    "dim", "ndimension", "__get__", "__hash__", "__repr__", "__format__", "is_floating_point", "is_complex",
    "get_device", "is_contiguous", "element_size", "stride",
})  # fmt: skip
_CREATING = frozenset({"tensor", "as_tensor", "new_tensor", "scalar_tensor"})
_READING = frozenset({"tolist", "item", "__iter__", "__int__", "__float__", "__bool__", "numpy", "__array__"})
_MOVING = frozenset({
    "__getitem__", "reshape", "view", "flatten", "squeeze", "unsqueeze", "select", "index_select", "narrow", "flip",
    "split", "chunk", "unbind", "clone", "detach", "contiguous", "to", "type", "long", "int", "cpu", "cat", "concat",
    "concatenate", "stack", "hstack", "expand", "repeat", "take", "t", "transpose", "permute",
})  # fmt: skip
_DIVIDING = frozenset({"div", "divide"})
_COMPUTING: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(("add", "__add__", "__radd__"), operator.add),
    **dict.fromkeys(("sub", "__sub__"), operator.sub),
    **dict.fromkeys(("rsub", "__rsub__"), lambda left, right: right - left),
    **dict.fromkeys(("mul", "__mul__", "__rmul__"), operator.mul),
    **dict.fromkeys(("floor_divide", "__floordiv__"), operator.floordiv),
    "__rfloordiv__": lambda left, right: right // left,
    **dict.fromkeys(("remainder", "__mod__"), operator.mod),
    **dict.fromkeys(("neg", "__neg__"), operator.neg),
    "prod": np.prod,
    "sum": np.sum,
    **{key: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge") for key in (name, f"__{name}__")},
}


def wrap_sizes(
    modules: Mapping[str, nn.Module], originals: Mapping[str, nn.Module], ledger: Ledger, tracker: SizeTracker
) -> dict[Attribute, int]:
    """Replace the ints that the modules of a shadow copy hold by ints that remember where they are held.

    These are int attributes, also in tuples, lists, dicts and objects that only hold values (dataclasses,
    configurations), and integers of numpy; int tensors are followed by the tracker. The sizes that PyTorch's own layers
    declare (``out_channels``) count the channels of their weights.

    Args:
        modules: The modules of the shadow copy by name; changed in place.
        originals: Those of the model, by name.
        ledger: The record, which knows the channels of the weights.
        tracker: The tracker of the recording.

    Returns:
        Every int with its value; see `SizeTracker.values`.
    """
    wrapper = _Wrapper(tracker)
    for name, module in modules.items():
        held = vars(module)
        original = vars(originals[name]) if name in originals else {}
        declared = _declared_sizes(module, ledger)
        for key, value in held.items():
            if key in _OWN_ATTRIBUTES or type(value) in _NEVER_SIZES:
                continue
            # Such a size follows the weight, so that no edit of the attribute is needed.
            if key in declared:
                held[key] = SizeInt(value, declared[key], tracker.notes)
            elif isinstance(value, Tensor):
                tracker.hold(name, key, value)
            else:
                held[key] = wrapper.wrap(value, Attribute(name, key), original.get(key))
        for key, value in held["_buffers"].items():
            if value is not None:
                tracker.hold(name, key, value)
    return tracker.values


_NEVER_SIZES = frozenset({str, bool, float, type(None), torch.dtype, torch.device, set, frozenset, bytes})
_OWN_ATTRIBUTES = frozenset({*vars(nn.Module()), "_reversed_padding_repeated_twice"})
# What is longer or nested more deeply holds data, not the sizes of layers.
_MOST_ITEMS = 256
_DEEPEST = 2


class _Wrapper:
    """Wraps the ints of one model; what several modules share stays shared."""

    def __init__(self, tracker: SizeTracker) -> None:
        self.values = tracker.values
        self._tracker = tracker
        self._done: dict[int, tuple[Any, Any]] = {}

    def wrap(self, value: Any, place: Attribute, original: Any) -> Any:
        """Return a value in which all ints remember their place."""
        kind = type(value)
        if kind is int or isinstance(value, np.integer):
            self.values[place] = int(value)
            return (SizeInt if kind is int else NumpySize)(int(value), place, self._tracker.notes)
        if (kind is tuple or kind is list) and place.item is None and all(type(item) is int for item in value):
            # The sizes of PyTorch's own layers: nearly all that there is.
            places = [Attribute(place.module, place.attribute, step) for step in range(len(value))]
            self.values.update(zip(places, value, strict=True))
            items = [SizeInt(item, one, self._tracker.notes) for item, one in zip(value, places, strict=True)]
            return items if kind is list else tuple(items)
        if isinstance(value, tuple):  # Equal tuples may be one object without meaning the same.
            return self._wrap_items(value, place, original, len(steps_of(place.item)))
        if id(value) not in self._done:
            self._done[id(value)] = value, self._wrap_items(value, place, original, len(steps_of(place.item)))
        return self._done[id(value)][1]

    def _wrap_items(self, value: Any, place: Attribute, original: Any, depth: int) -> Any:
        kind = type(value)
        if kind is list or isinstance(value, tuple):
            # Long lists of anything else are no sizes.
            if depth > _DEEPEST or not any(
                type(item) in _MAY_HOLD or isinstance(item, np.integer) for item in value[:_MOST_ITEMS]
            ):
                return value
            items = [
                self.wrap(item, _inside(place, step), _part(original, step)) if type(item) not in _NEVER_SIZES else item
                for step, item in enumerate(value)
            ]
            return items if kind is list else getattr(kind, "_make", kind)(items)
        if kind in {dict, OrderedDict}:
            if depth > _DEEPEST or len(value) > _MOST_ITEMS:
                return value
            return kind(
                (key, self.wrap(item, _inside(place, key), _part(original, key)) if type(key) is str else item)
                for key, item in value.items()
            )
        # What is shared with the original, because it cannot be copied, could not be edited without changing that.
        if depth > _DEEPEST or value is original or not _holds_only_values(value):
            return value
        twin = copy.copy(value)
        for key, item in vars(value).items():
            if type(item) not in _NEVER_SIZES:
                object.__setattr__(twin, key, self.wrap(item, _inside(place, key), _part(original, key)))
        return twin


_MAY_HOLD = frozenset({int, list, tuple, dict, OrderedDict})


def _inside(place: Attribute, step: int | str) -> Attribute:
    steps = steps_of(place.item)
    item: SizeItem = step if not steps else (*steps, step)
    return Attribute(place.module, place.attribute, item)


def _part(holder: Any, step: int | str) -> Any:
    """Return what an object of the original holds at a place; None if it has no such place."""
    try:
        return holder[step] if isinstance(step, int) or isinstance(holder, dict) else getattr(holder, step)
    except (TypeError, LookupError, AttributeError):
        return None


def _holds_only_values(value: Any) -> bool:
    """Return whether an object is a configuration: it has attributes, and is no module, tensor, class or function."""
    kind = type(value)
    if kind.__module__ in {"builtins", "enum", "weakref"} or kind.__module__.startswith(("torch.", "numpy")):
        return False
    plain = not callable(value) and hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type)
    return plain and (dataclasses.is_dataclass(value) or len(vars(value)) <= _MOST_ITEMS)


def _declared_sizes(module: nn.Module, ledger: Ledger) -> dict[str, Expression]:
    """Return the attributes of PyTorch's layers that `update_declared_sizes_` sets to the shapes of their weights."""
    if not isinstance(module, _DECLARING):
        return {}
    weight = vars(module)["_parameters"].get("weight")
    if weight is None:
        return {}
    sizes: list[Expression] = [
        ShapeOf(ids) if (ids := ledger.ids_of(weight).get(dim)) is not None else expression_of(size)
        for dim, size in enumerate(weight.shape)
    ]
    match module:
        case nn.modules.conv._ConvNd():  # pyright: ignore[reportPrivateUsage]
            first, second = sizes[:2]
            if module.groups > 1:
                second = Arithmetic("*", second, expression_of(vars(module)["groups"]))
            entering, leaving = (first, second) if module.transposed else (second, first)
            return {"in_channels": entering, "out_channels": leaving}
        case nn.Linear():
            return {"out_features": sizes[0], "in_features": sizes[1]}
        case nn.GroupNorm():
            return {"num_channels": sizes[0]}
        case _:
            return {"num_features": sizes[0]}


_DECLARING = (
    nn.modules.conv._ConvNd,  # pyright: ignore[reportPrivateUsage]
    nn.Linear,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # pyright: ignore[reportPrivateUsage]
)


def set_number(holder: Any, attribute: str, item: SizeItem, value: int) -> None:
    """Set one int that an object holds, wherever `Attribute` says it is. It keeps its type (an integer of numpy)."""
    steps = (attribute, *steps_of(item))
    holders = [holder]
    for step in steps:
        holders.append(_step_into(holders[-1], step))
    new: Any = value if isinstance(holders[-1], int | Tensor) else type(holders[-1])(value)
    # From the inside out: what cannot be changed is made anew, and set in what holds it.
    for place, step in zip(reversed(holders[:-1]), reversed(steps), strict=True):
        if not isinstance(place, tuple):
            _set_step(place, step, new)
            return
        items = [*place[: int(step)], new, *place[int(step) + 1 :]]
        make: Any = getattr(type(place), "_make", type(place))
        new = make(items)


def number_at(holder: Any, attribute: str, item: SizeItem) -> int:
    """Return one int that an object holds; see `set_number`."""
    for step in (attribute, *steps_of(item)):
        holder = _step_into(holder, step)
    return int(holder)


def _step_into(holder: Any, step: int | str) -> Any:
    if isinstance(holder, Tensor):
        return holder.reshape(-1)[int(step)]
    return holder[step] if isinstance(step, int) or isinstance(holder, dict) else getattr(holder, step)


def _set_step(holder: Any, step: int | str, value: Any) -> None:
    if isinstance(holder, Tensor):
        with torch.no_grad():
            holder.view(-1)[int(step)] = value
    elif isinstance(step, int) or isinstance(holder, dict):
        holder[step] = value
    elif isinstance(holder, nn.Module):
        setattr(holder, step, value)
    else:
        object.__setattr__(holder, step, value)  # Frozen dataclasses refuse `setattr`.


def held_numbers(holder: nn.Module) -> Iterator[tuple[str, SizeItem, int]]:
    """Yield every int that a module holds and that is not in its state dict, as (attribute, item, value)."""
    hidden = vars(holder).get("_non_persistent_buffers_set", ())
    for key, value in (*vars(holder).items(), *((key, getattr(holder, key)) for key in hidden)):
        if key not in _OWN_ATTRIBUTES and type(value) not in _NEVER_SIZES:
            yield from ((key, item, number) for item, number in _numbers_in(value, ()))


def _numbers_in(value: Any, steps: tuple[int | str, ...]) -> Iterator[tuple[SizeItem, int]]:
    kind = type(value)
    if kind is int or isinstance(value, np.integer):
        yield (None if not steps else steps[0] if len(steps) == 1 else steps), int(value)
        return
    inside: Iterable[tuple[int | str, Any]] = ()
    if isinstance(value, Tensor):
        found = _plain_numbers(value)
        inside = enumerate(() if found is None else found.reshape(-1).tolist())
    elif len(steps) <= _DEEPEST and (kind is list or isinstance(value, tuple)):
        inside = enumerate(value)
    elif len(steps) <= _DEEPEST and kind in {dict, OrderedDict}:
        inside = ((key, item) for key, item in value.items() if type(key) is str)
    elif len(steps) <= _DEEPEST and _holds_only_values(value):
        inside = vars(value).items()
    for step, item in inside:
        if type(item) not in _NEVER_SIZES:
            yield from _numbers_in(item, (*steps, step))
