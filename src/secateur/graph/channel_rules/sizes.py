"""Rules of calls that take sizes: bind each Python int to the channels that it counts.

They work one level above ATen, on the calls as the model wrote them (``x.view(b, self.groups, -1)``), where ints still
are `SizeInt`. The rules in `graph.rules` work on the ATen calls below.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from secateur._arrays import IntArray
from secateur.graph._ledger import Ledger, SizeComparison, cuts_whole_groups, tensors_in
from secateur.graph._size_ints import (
    Expression,
    Literal,
    ShapeOf,
    SizeFloat,
    SizeInt,
    SizeWatcher,
    expression_of,
    plain_number,
    shape_ids,
)

SizeRule = Callable[[Ledger, str, tuple[Any, ...], dict[str, Any], Any], None]


class UnhashableSizeError(TypeError):
    """A size was about to be looked up in a dict, a set or a cache."""


class RunningModel(Protocol):
    """What is known of the run that is recorded."""

    hashable: bool

    @property
    def module(self) -> str:
        """The qualified name of the innermost running module."""
        ...


class SizeNotes(SizeWatcher):
    """Writes into the ledger what happens to the sizes of one recording.

    Args:
        ledger: The record.
        running: The run. Where its sizes are not ``hashable``, a lookup raises, as those of PyTorch's own symbolic
            sizes do, so that libraries (einops) compute what they would otherwise take from a cache of earlier calls.
    """

    def __init__(self, ledger: Ledger, running: RunningModel) -> None:
        self._ledger = ledger
        self._running = running
        self._floats: dict[int, tuple[SizeFloat, str]] = {}
        self.paused = False

    @property
    def _where(self) -> str:
        return f"in {self._running.module or 'the model itself'}"

    def compare(self, symbol: str, left: Expression, right: Expression) -> None:
        """Take note that two sizes were compared."""
        if not self.paused and self.open:
            self._ledger.comparisons.append(SizeComparison(symbol, left, right, f"`{symbol}` {self._where}"))

    def use(self, expression: Expression, what: str, *, scale: bool = False) -> bool:
        """Take note that a size became a plain number."""
        if self.paused or not self.open:
            return False
        self._ledger.bind(expression, None, f"{what} {self._where}")
        if scale:
            self._ledger.scale(expression)
        return True

    def hash(self, expression: Expression) -> None:
        """Take note that a size is about to be looked up."""
        if self.paused or not self.open:
            return
        if not self._running.hashable and shape_ids(expression):
            raise UnhashableSizeError("sizes of traced tensors cannot be looked up")
        self.use(expression, "a lookup")

    def begin(self, number: SizeFloat) -> None:
        """Take note of a float that was computed from sizes."""
        if not self.paused and self.open:
            # The entry holds the float, so that no other one can get its `id`.
            self._floats[id(number)] = number, self._running.module

    def end(self, number: SizeFloat) -> None:
        """Take note that a float was used."""
        self._floats.pop(id(number), None)

    def close(self) -> None:
        """End the recording: floats of which no use was seen, as by `math.sqrt`, must stay what they are."""
        for number, module in self._floats.values():
            self._ledger.bind(number.expression, None, f"a float in {module or 'the model itself'}")
            self._ledger.scale(number.expression)
        self._floats.clear()
        self.open = False


def bind_sizes(  # noqa: PLR0917
    ledger: Ledger, name: str, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    """Bind the Python ints of one call: by its rule, or to what they are."""
    rule = SIZE_RULES.get(name)
    text = f"`{name}` in {where or 'the model itself'}"
    if rule is None:
        _keep_sizes(ledger, text, *args, *kwargs.values())
        return
    # Modules whose attention scale depends on a size are cut by whole heads; see `trace`.
    scales = len(ledger.scaled)
    rule(ledger, text, args, kwargs, out)
    if len(ledger.scaled) > scales:
        ledger.scaling.add(where)


def _keep_sizes(ledger: Ledger, where: str, *values: Any) -> None:
    """Bind every size among some arguments to what it is: nobody knows what the call does with it."""
    for value in values:
        if type(value) in _NO_SIZES:  # Nearly all arguments.
            continue
        if isinstance(value, (SizeInt, SizeFloat)):
            ledger.bind(_origin(value), None, where)
        elif isinstance(value, (tuple, list)):
            _keep_sizes(ledger, where, *value)
        elif isinstance(value, dict):
            _keep_sizes(ledger, where, *value.values())
        elif isinstance(value, slice):
            _keep_sizes(ledger, where, value.start, value.stop, value.step)


_NO_SIZES = frozenset({Tensor, torch.nn.Parameter, int, float, bool, str, type(None), torch.dtype})


def _origin(value: SizeInt | SizeFloat) -> Expression:
    if isinstance(value, SizeInt):
        return expression_of(value)
    value.watcher.end(value)
    # A float of an earlier recording can no longer be followed. A literal stands for nothing to bind.
    return value.expression if value.watcher.open else Literal(0)


def _bind_view(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``view`` and ``reshape``: bind one size per output dimension."""
    sizes = _flatten_sizes(args[1:], kwargs)
    # `view(dtype)` has no sizes.
    if len(sizes) != out.dim() or not all(isinstance(size, int | np.integer) for size in sizes):
        return
    ids = ledger.ids_of(out)
    for dim, size in enumerate(sizes):
        # A size of -1 follows by itself. A plain int along a dimension without channels stays what it is.
        if size != -1 and (dim in ids or isinstance(size, SizeInt)):
            ledger.bind(expression_of(size), ids.get(dim), where)


def _bind_expand(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``expand``: a dimension that is broadcast to a number of channels gets their ids."""
    _assign_counted_ids(ledger, out, _flatten_sizes(args[1:], kwargs))
    _bind_view(ledger, where, args, kwargs, out)


def _bind_new_tensor(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``torch.zeros``, ``x.new_ones``: a dimension as long as a number of channels gets their ids."""
    # The tensor of `x.new_ones(2, 3)` is no size, but that of `torch.zeros(n, 3)` is one: a number in a tensor.
    has_source = bool(args) and isinstance(args[0], Tensor) and len(_flatten_sizes(args[1:], kwargs)) >= out.dim()
    given = _flatten_sizes(args[1:] if has_source else args, kwargs)
    _keep_sizes(ledger, where, *given[out.dim() :], kwargs.get("fill_value"))
    _bind_new_sizes(ledger, where, given[: out.dim()], out)


def _bind_legacy_new(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``x.new(2, 3)``: as ``x.new_empty(2, 3)``, unless it is given numbers to hold."""
    if all(isinstance(size, int) for size in args[1:]):
        _bind_new_tensor(ledger, where, args, kwargs, out)


def _assign_counted_ids(ledger: Ledger, out: Tensor, sizes: Sequence[Any]) -> None:
    """Give dimensions of equal values the ids of the channels that determined their length."""
    if len(sizes) != out.dim():
        return
    ids = dict(ledger.ids_of(out))
    for dim, size in enumerate(sizes):
        if dim not in ids and isinstance(size, SizeInt) and size > 1:
            counted = expression_of(size)
            ids[dim] = counted.ids if isinstance(counted, ShapeOf) else ledger.new(int(size))
    ledger.mark(out, ids, own=ledger.is_own(out))


def _flatten_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the sizes, which may be passed one by one or as one sequence, by position or by name."""
    given = args or tuple(v for k, v in kwargs.items() if k in {"shape", "size"})
    return [size for item in given for size in (item if isinstance(item, tuple | list) else (item,))]


def _bind_grid(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``affine_grid``: of the sizes (batch, channels, ...), the channels do not matter."""
    batch, _, *space = _argument(args, kwargs, 1, "size")
    _keep_sizes(ledger, where, batch, space)


def _bind_unflatten(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``unflatten``: bind the sizes of the dimensions that one dimension becomes."""
    sizes = _argument(args, kwargs, 2, "sizes")
    first = _dim_argument(args, kwargs, 1) % args[0].dim()
    ids = ledger.ids_of(out)
    for dim, size in enumerate(sizes, first):
        if size != -1 and (dim in ids or isinstance(size, SizeInt)):
            ledger.bind(expression_of(size), ids.get(dim), where)


def _bind_chunk(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``chunk``: tie equal positions of the pieces, which must stay equally long."""
    dim = _dim_argument(args, kwargs, 2)
    asked = _argument(args, kwargs, 1, "chunks")
    _tie_pieces(ledger, where, out, dim, complete=len(out) == asked)


def _bind_split(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``split``: tie the pieces of one size, or bind each of a list of sizes."""
    sizes = _argument(args, kwargs, 1, "split_size_or_sections", kwargs.get("split_size"))
    dim = _dim_argument(args, kwargs, 2)
    # With one size for all pieces, it must equal the length of the first piece.
    if isinstance(sizes, int):
        _tie_pieces(ledger, where, out, dim)
        ledger.bind(expression_of(sizes), _ids_along(ledger, out[0], dim), where)
        return
    pieces: list[tuple[Any, Tensor]] = list(zip(sizes or (), out, strict=False))
    for size, piece in pieces:
        ids = _ids_along(ledger, piece, dim)
        if ids is not None or isinstance(size, SizeInt):
            ledger.bind(expression_of(size), ids, where)


def _tie_pieces(ledger: Ledger, where: str, pieces: Any, dim: int, *, complete: bool = True) -> None:
    carried = [_ids_along(ledger, piece, dim) for piece in pieces]
    known = [ids for ids in carried if ids is not None]
    # Unequal pieces would become unequal in another way after a cut: `chunk` rounds their length up.
    if not complete or len(known) < len(carried) or len({len(ids) for ids in known}) > 1:
        for ids in known:
            ledger.freeze(ids, f"{where} splits channels into unequal pieces")
        return
    for ids in known[1:]:
        ledger.tie(known[0], ids)


def _bind_pad(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``pad``: bind the amounts before and after the channels to the ids of the padding."""
    amounts = _argument(args, kwargs, 1, "pad")
    rank = out.dim()
    for dim in range(rank):
        # Amounts are listed from the last dimension to the first, two for each.
        place = 2 * (rank - 1 - dim)
        if place + 1 >= len(amounts):
            continue
        low, high = amounts[place], amounts[place + 1]
        ids = ledger.ids_of(out).get(dim)
        for amount, part in ((low, slice(0, low)), (high, slice(out.size(dim) - high, None))):
            if amount or isinstance(amount, SizeInt):
                ledger.bind(expression_of(amount), ids[part] if ids is not None and amount else None, where)


def _bind_index(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``x[:, a:b]``: bind the bounds to the channels before them."""
    source, item = args[0], args[1]
    items = item if isinstance(item, tuple) else (item,)
    # PyTorch takes a list for a tuple unless all of its items are numbers.
    if isinstance(item, list) and not all(isinstance(one, int | np.integer) for one in item):
        items = tuple(item)
    consumed = sum(1 for i in items if i is not None and i is not Ellipsis)
    dim = 0
    for part in items:
        if part is None:
            continue
        if part is Ellipsis:
            # An ellipsis stands for all dimensions that the other items do not index.
            dim += source.dim() - consumed
            continue
        ids = ledger.ids_of(source).get(dim)
        if isinstance(part, slice):
            _bind_slice(ledger, where, part, ids)
        else:
            _keep_sizes(ledger, where, part)
        # A mask replaces as many dimensions as it has.
        dim += part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def _bind_slice(ledger: Ledger, where: str, part: slice, ids: np.ndarray[Any, Any] | None) -> None:
    if ids is None:
        _keep_sizes(ledger, where, part)
        return
    if part.step not in (None, 1):
        ledger.freeze(ids, f"{where} skips channels by a step")
    part = slice(*(_as_size(bound) for bound in (part.start, part.stop)))
    if part.start:
        # A negative bound counts channels from the end.
        before = ids[: part.start] if part.start > 0 else ids[part.start :]
        ledger.bind(expression_of(-part.start if part.start < 0 else part.start), before, where)
    if part.stop is not None:
        counted = ids[: part.stop] if part.stop >= 0 else ids[part.stop :]
        # A bound at or beyond the end is no limit, whatever the width.
        if 0 < len(counted) < len(ids) or isinstance(part.stop, SizeInt):
            ledger.bind(expression_of(-part.stop if part.stop < 0 else part.stop), counted, where)


def _bind_narrow(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``narrow``: bind the start and the length to the channels that they count."""
    source, dim, start, length = (
        _argument(args, kwargs, position, name) for position, name in enumerate(("input", "dim", "start", "length"))
    )
    ids = ledger.ids_of(source).get(dim % source.dim())
    if ids is not None and isinstance(start, int):
        ledger.bind(expression_of(start), ids[:start], where)
        ledger.bind(expression_of(length), ids[start : start + length], where)


def _bind_aten_slice(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``aten::slice``, as exported and scripted code calls it: bind the bounds to the channels before them."""
    source, dim, start, end, step = (
        _argument(args, kwargs, position, name, default)
        for position, (name, default) in enumerate(
            {"input": None, "dim": 0, "start": None, "end": None, "step": 1}.items()
        )
    )
    _bind_slice(ledger, where, slice(start, end, step), ledger.ids_of(source).get(dim % source.dim()))


def _bind_aten_convolution(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``aten::convolution``: as a grouped convolution."""
    _bind_convolution(ledger, where, args, {**kwargs, "groups": _argument(args, kwargs, 8, "groups", 1)}, out)


def _bind_convolution(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Grouped convolution: bind the number of groups, if whole groups are removed."""
    groups = kwargs["groups"] if "groups" in kwargs else _argument(args, kwargs, 6, "groups", 1)
    if groups != 1:
        _bind_groups(ledger, where, groups, ledger.ids_of(args[0]).get(1))


def _bind_deformable(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``deform_conv2d``: of its sizes, the groups of weights (argument 11) and those of offsets (12) count channels."""
    _keep_sizes(ledger, where, args[5:11], args[12:])
    if args[11] != 1:
        _bind_groups(ledger, where, args[11], ledger.ids_of(args[0]).get(1))


def _bind_groups(ledger: Ledger, where: str, groups: int, ids: IntArray | None) -> None:
    """Bind the number of groups to one channel of each, if whole groups are removed."""
    # If positions of groups are removed instead, the number of groups does not change.
    members = None if ids is None else ids.reshape(int(groups), -1)
    counted = members[:, 0] if members is not None and cuts_whole_groups(*members.shape) else None
    if counted is not None or isinstance(groups, SizeInt):
        ledger.bind(expression_of(groups), counted, where)


def _bind_layer_norm(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``layer_norm`` and ``rms_norm``: bind the sizes of the last dimensions."""
    sizes = _argument(args, kwargs, 1, "normalized_shape")
    ids = ledger.ids_of(args[0])
    for dim, size in enumerate(sizes, args[0].dim() - len(sizes)):
        if dim in ids or isinstance(size, SizeInt):
            ledger.bind(expression_of(size), ids.get(dim), where)


def _bind_group_norm(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``group_norm``: bind the number of groups, if whole groups are removed."""
    groups = _argument(args, kwargs, 1, "num_groups")
    _bind_groups(ledger, where, groups, ledger.ids_of(args[0]).get(1))


def _bind_attention(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``scaled_dot_product_attention``: its default scale, (head dimension) ** -0.5, must stay what it is."""
    # With an explicit scale, the number of dimensions does not matter.
    if _argument(args, kwargs, 6, "scale") is None:
        for tensor in args[:2]:
            ids = _ids_along(ledger, tensor, -1)
            if ids is not None:
                ledger.bind(ShapeOf(ids), None, where)
                ledger.scaled.append(ids)


def _bind_packed_attention(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``multi_head_attention_forward``: one int is the width of the query and of all heads together.

    So the channels of the query are tied to those of the heads, position by position, and whole heads are removed: the
    width of one head, and with it the scale of the attention, stays.
    """
    query, width, heads, out_weight = args[0], args[3], args[4], args[11]
    read, inner = ledger.ids_of(query).get(query.dim() - 1), ledger.ids_of(out_weight).get(1)
    if read is None or inner is None:
        reason = f"{where} (torch.nn.MultiheadAttention) has one width for its input and for all its heads"
        for tensor in tensors_in(*args, *kwargs.values()):
            ledger.freeze_all([ledger.ids_of(tensor)], reason)
        return
    rows = ledger.tie(inner, read).reshape(plain_number(heads), -1)
    ledger.tie_rows(np.ascontiguousarray(rows.T))
    ledger.bind(expression_of(heads), np.ascontiguousarray(rows[:, 0]), where)
    ledger.bind(expression_of(width), inner, where)
    ledger.scaled.append(inner)


def _bind_scale(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A product with a number that was computed from sizes: the number must stay what it is."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, SizeInt | SizeFloat):
            expression = _origin(value)
            ledger.bind(expression, None, where)
            ledger.scale(expression)


def _bind_repeat(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``repeat`` and ``tile``: a dimension of length one becomes as long as it is repeated; others repeat as often."""
    times = _flatten_sizes(args[1:], {"size": kwargs.get("repeats", kwargs.get("dims", ()))})
    if len(times) != out.dim():
        _keep_sizes(ledger, where, times)
        return
    source = args[0]
    lengths = (*[1] * (out.dim() - source.dim()), *source.shape)
    sizes = [time if length == 1 else 1 for time, length in zip(times, lengths, strict=True)]
    _keep_sizes(ledger, where, [time for time, length in zip(times, lengths, strict=True) if length > 1])
    _bind_new_sizes(ledger, where, sizes, out)


def _bind_like(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``expand_as``, ``view_as``: the sizes are those of another tensor."""
    other = _argument(args, kwargs, 1, "other")
    known = ledger.ids_of(other)
    sizes = [SizeInt(size, ShapeOf(known[d])) if d in known else size for d, size in enumerate(other.shape)]
    _bind_new_sizes(ledger, where, sizes, out)


def _bind_new_sizes(ledger: Ledger, where: str, sizes: Sequence[Any], out: Any) -> None:
    _assign_counted_ids(ledger, out, sizes)
    for dim, size in enumerate(sizes):
        if isinstance(size, SizeInt):
            ledger.bind(expression_of(size), ledger.ids_of(out).get(dim), where)


def _bind_tensor_split(ledger: Ledger, where: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """``tensor_split``: tie pieces of a number of pieces, or bind the bounds of a list of them."""
    pieces = _argument(args, kwargs, 1, "indices_or_sections", kwargs.get("sections", kwargs.get("indices")))
    dim = _dim_argument(args, kwargs, 2)
    if isinstance(pieces, tuple | list):
        ids = _ids_along(ledger, args[0], dim)
        for bound in pieces:
            _bind_slice(ledger, where, slice(None, bound), ids)
        return
    _keep_sizes(ledger, where, pieces)
    _tie_pieces(ledger, where, out, dim)


def _as_size(value: Any) -> Any:
    """Return an int, also for an integer of numpy or a tensor with one number; None for None."""
    return value if value is None or isinstance(value, int) else int(value)


def _argument(args: Sequence[Any], kwargs: dict[str, Any], position: int, name: str, default: Any = None) -> Any:
    """Return an argument, which may be passed by position or by name."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def _dim_argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> int:
    return int(_argument(args, kwargs, position, "dim", 0))


def _ids_along(ledger: Ledger, tensor: Tensor, dim: int) -> Any:
    return ledger.ids_of(tensor).get(dim % tensor.dim())


_PRODUCTS = (
    "mul", "__mul__", "__rmul__", "__imul__", "mul_", "div", "div_", "__truediv__", "__rtruediv__", "__itruediv__",
    "true_divide", "__pow__", "pow",
)  # fmt: skip
_NEW_TENSOR = (
    "zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full", "rand", "randn",
)  # fmt: skip
SIZE_RULES: dict[str, SizeRule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view"), _bind_view),
    **dict.fromkeys(("expand", "broadcast_to"), _bind_expand),
    **dict.fromkeys(_NEW_TENSOR, _bind_new_tensor),
    "new": _bind_legacy_new,
    **dict.fromkeys(("repeat", "tile"), _bind_repeat),
    **dict.fromkeys(("expand_as", "view_as", "reshape_as"), _bind_like),
    **dict.fromkeys(("tensor_split", "unsafe_tensor_split"), _bind_tensor_split),
    "unflatten": _bind_unflatten,
    "affine_grid": _bind_grid,
    **dict.fromkeys(("chunk", "unsafe_chunk"), _bind_chunk),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"), _bind_split),
    **dict.fromkeys(("pad", "constant_pad_nd"), _bind_pad),
    **dict.fromkeys(("__getitem__", "__setitem__"), _bind_index),
    "narrow": _bind_narrow,
    "slice": _bind_aten_slice,
    "convolution": _bind_aten_convolution,
    **dict.fromkeys(("layer_norm", "rms_norm", "native_layer_norm"), _bind_layer_norm),
    "group_norm": _bind_group_norm,
    **dict.fromkeys(_PRODUCTS, _bind_scale),
    "scaled_dot_product_attention": _bind_attention,
    "multi_head_attention_forward": _bind_packed_attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _bind_convolution),
    "deform_conv2d": _bind_deformable,
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _bind_convolution),
}
