"""Channel rules of operations that only move channels; most of these operations are executed on the ids themselves."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur._arrays import IntArray, unique_rows
from secateur.graph._ledger import Call, ChannelIds, freeze_inputs, merge_operands, tensors_in
from secateur.graph.blocks import is_mutable

_SAME = frozenset({"clone", "contiguous", "alias", "detach", "_to_copy", "lift_fresh", "lift_fresh_copy", "roll"})
_RESHAPES = frozenset({"view", "_unsafe_view", "_reshape_alias", "reshape"})
_TAKES_SIZES = _RESHAPES | {"expand"}
_FLOAT_ONLY = frozenset({
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d", "pixel_shuffle",
})  # fmt: skip


def like_tensor(call: Call) -> Sequence[ChannelIds]:
    """Give a new tensor of the shape of another one (``zeros_like``) the ids of that one."""
    source = call.inputs[0]
    return [call.ids(source) if out.shape == source.shape else {} for out in call.outputs]


def fill(call: Call) -> Sequence[ChannelIds]:
    """Keep the ids of a tensor whose values are overwritten by constants (``zero_``, ``fill_``)."""
    return [call.ids(call.inputs[0]) for _ in call.outputs]


def move_channels(call: Call) -> Sequence[ChannelIds]:
    """Execute the operation on the ids themselves."""
    source = call.inputs[0]
    # Further inputs are index tensors. Removing entries of these would change what is selected.
    for other in call.inputs[1:]:
        call.ledger.freeze_all([call.ids(other)], f"channels are used as indices by {call.where}")
    # The identity needs no execution.
    if call.name in _SAME and call.outputs[0].shape == source.shape:
        return [call.ids(source) for _ in call.outputs]
    # A view with another dtype changes the number of elements, so that ids cannot follow.
    if call.name in _RESHAPES and call.outputs[0].numel() != source.numel():
        return freeze_inputs(call)
    return _move_ids(call, call.ids(source))


def _move_ids(call: Call, carried: ChannelIds) -> Sequence[ChannelIds]:
    results: list[ChannelIds] = [{} for _ in call.outputs]
    hidden = call.ledger.caller is not None and not call.ledger.caller[0]
    for dim, vector in carried.items():
        place = _find_destination(call, dim, vector)
        if hidden and (place is None or call.name in _TAKES_SIZES):
            call.ledger.freeze(vector, f"{call.where} is called by code whose sizes cannot be followed (TorchScript)")
        if place is not None:
            for result in results:
                _assign_ids(call, result, place, vector)
            continue
        moved = _execute_on_ids(call, call.inputs[0], dim, vector)
        for result, ids in zip(results, moved, strict=True):
            _assign_moved_ids(call, result, ids, vector)
    return results


def _find_destination(call: Call, dim: int, vector: IntArray) -> int | None:
    """Return the dimension to which all ids move unchanged, so that nothing need be executed; None if not certain."""
    find = _DESTINATIONS.get(call.name)
    # Equal ends may mean that all ids are equal, as after `expand`; then only execution tells where they vary.
    if find is None or call.kwargs or len(vector) < 2 or vector[0] == vector[-1] or not call.outputs[0].numel():
        return None
    return find(call, dim)


def _transpose_dim(call: Call, dim: int) -> int | None:
    rank = call.inputs[0].dim()
    first, second = (d % rank for d in call.args[1:]) if len(call.args) > 1 else (0, rank - 1)
    return {first: second, second: first}.get(dim, dim)


def _permute_dim(call: Call, dim: int) -> int | None:
    rank = call.inputs[0].dim()
    return [d % rank for d in call.args[1]].index(dim)


def _unsqueeze_dim(call: Call, dim: int) -> int | None:
    return dim + (dim >= call.args[1] % call.outputs[0].dim())


def _expand_dim(call: Call, dim: int) -> int | None:
    return dim + call.outputs[0].dim() - call.inputs[0].dim()


def _slice_dim(call: Call, dim: int) -> int | None:
    """Return the same dimension if the operation cuts along another one."""
    position = 1 if call.name == "slice" else 2
    return None if call.argument(position, 0) % call.inputs[0].dim() == dim else dim


def _reshape_dim(call: Call, dim: int) -> int | None:
    old, new = call.inputs[0].shape, call.outputs[0].shape
    first, low, second, high = _find_group(old, new, dim)
    longer = [d for d in range(second, high) if new[d] > 1]
    return longer[0] if math.prod(old[first:low]) == old[dim] and len(longer) == 1 else None


_DESTINATIONS: Mapping[str, Callable[[Call, int], int | None]] = {
    **dict.fromkeys(("t", "transpose"), _transpose_dim),
    "permute": _permute_dim,
    "unsqueeze": _unsqueeze_dim,
    "expand": _expand_dim,
    **dict.fromkeys(("slice", "split", "split_with_sizes"), _slice_dim),
    **dict.fromkeys(_RESHAPES, _reshape_dim),
}


def _execute_on_ids(call: Call, source: torch.Tensor, dim: int, vector: IntArray) -> list[torch.Tensor]:
    if call.name in _RESHAPES:
        return [_reshape_ids(source.shape, call.outputs[0].shape, dim, vector)]
    shape = [1] * source.dim()
    shape[dim] = len(vector)
    # Along the other dimensions the probe repeats by stride 0, which costs no memory.
    probe = torch.from_numpy(vector).view(shape).expand(source.shape)
    # These operations are not implemented for integers. Ids are far below 2^53, so float64 is exact.
    if call.name in _FLOAT_ONLY:
        probe = probe.double()
    args, kwargs = tree_map_only(torch.Tensor, lambda t: probe if t is source else t, (call.args, call.kwargs))
    kwargs = {key: value for key, value in kwargs.items() if key not in {"dtype", "device", "layout", "memory_format"}}
    out = call.operator(*args, **kwargs)
    return [t.long() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]


def _reshape_ids(old: Sequence[int], new: Sequence[int], dim: int, vector: IntArray) -> torch.Tensor:
    """Return the ids after a reshape, of size one along the dimensions into which they do not go.

    Both shapes are divided from the left into the shortest groups of equal product; one group contains the ids.
    """
    first, low, second, high = _find_group(old, new, dim)
    shape = [1] * (low - first)
    shape[dim - first] = len(vector)
    ids = torch.from_numpy(vector).view(shape).expand(tuple(old[first:low])).reshape(tuple(new[second:high]))
    return ids[(None,) * second + (...,) + (None,) * (len(new) - high)]


def _find_group(old: Sequence[int], new: Sequence[int], dim: int) -> tuple[int, int, int, int]:
    """Return the bounds of the group of old dimensions that contains ``dim``, and of the matching group of new ones."""
    first = second = 0
    while True:
        low, high = first + 1, second + 1
        left, right = old[first], new[second] if second < len(new) else 1
        # Grow the smaller group until both have the same number of positions.
        while left != right:
            if left < right:
                left, low = left * old[low], low + 1
            else:
                right, high = right * new[high], high + 1
        if dim < low:
            return first, low, second, high
        first, second = low, high


def _assign_moved_ids(call: Call, result: ChannelIds, ids: torch.Tensor, vector: IntArray) -> None:
    """Give moved ids to the dimension along which they vary; of several, to the one with the most distinct ids."""
    dims = [d for d in range(ids.dim()) if _varies(ids, d)]
    # Along these dimensions all ids are equal: one position is enough.
    for d in set(range(ids.dim())) - set(dims):
        ids = ids.narrow(d, 0, min(1, ids.size(d)))
    if not dims:
        if ids.numel():
            call.ledger.freeze(ids.reshape(-1)[:1].numpy(), f"{call.where} picks single channels")
        return
    if len(dims) == 1:
        free = dims[0]
    # A matrix of several projections is taken apart before its rows are divided into heads.
    elif call.ledger.packed_width == ids.size(dims[-1]):
        free = dims[-1]
    # Heads come before their dimensions, so the second to last dimension that varies counts heads.
    elif call.ledger.is_by_head(vector):
        free = dims[-2]
    else:
        written = _written_sizes(call)
        able = [d for d in dims if d not in written] or dims
        free = max(able, key=lambda d: (_count_distinct(ids, d), ids.size(d), d))
    rest = [d for d in range(ids.dim()) if d != free]
    matrix = ids.permute(*rest, free).reshape(-1, ids.size(free))
    flat = matrix.numpy()
    if len(dims) > 1:
        # Channels that lie in several rows are kept or removed together with those of the other rows.
        flat = unique_rows(flat)
        picked = call.ledger.tie_rows(flat)
    else:
        picked = np.ascontiguousarray(flat[0])
    _assign_ids(call, result, free, picked)


def _written_sizes(call: Call) -> set[int]:
    """Return the dimensions whose size is a number in the model's code, which cannot follow any channels."""
    name, given = call.ledger.caller or ("", ())
    args: tuple[Any, ...] = given[0] if given else ()
    if name in {"view", "reshape"}:
        first, sizes = 0, args[1] if len(args) == 2 else args[1:]
    elif name == "unflatten" and len(args) == 3:
        first, sizes = int(args[1]) % args[0].dim(), args[2]
    else:
        return set()
    if not isinstance(sizes, tuple | list):
        return set()
    return {dim for dim, size in enumerate(sizes, first) if type(size) is int and size != -1}


def _assign_ids(call: Call, result: ChannelIds, dim: int, ids: IntArray) -> None:
    if dim in result:
        call.ledger.freeze(ids, f"{call.where} merges two kinds of channels into one dimension")
        return
    result[dim] = ids


def _count_distinct(ids: torch.Tensor, dim: int) -> int:
    """Return the number of distinct ids along a dimension, at position 0 of the others."""
    line = ids
    for other in range(ids.dim() - 1, -1, -1):
        if other != dim:
            line = line.select(other, 0)
    return int(line.unique().numel())


def _varies(ids: torch.Tensor, dim: int) -> bool:
    if ids.size(dim) <= 1 or ids.stride(dim) == 0:
        return False
    # Comparing the ends first avoids the full comparison in nearly all cases.
    first = ids.narrow(dim, 0, 1)
    if not torch.equal(first, ids.narrow(dim, ids.size(dim) - 1, 1)):
        return True
    return not bool((ids == first).all())


def as_strided(call: Call) -> Sequence[ChannelIds]:
    """Pass the ids if the strides change only along single positions, as in global pooling of channels-last tensors."""
    source, out = call.inputs[0], call.outputs[0]
    # In a dense layout with single positions, only the strides of dimensions of size one can differ.
    dense = out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)
    same = out.shape == source.shape and dense and all(size == 1 for size in out.shape[2:])
    return [call.ids(source)] if same else freeze_inputs(call)


def select(call: Call) -> Sequence[ChannelIds]:
    """``select`` and ``unbind``: pass the ids of the other dimensions, and freeze those of the selected one."""
    source = call.inputs[0]
    dim = call.argument(1, call.kwargs.get("dim", 0)) % source.dim()
    if dim in call.ids(source):
        call.ledger.freeze(call.ids(source)[dim], f"{call.where} picks single channels")
    rest = {d: ids for d, ids in call.ids(source).items() if d != dim}
    return [{d - (d > dim): ids for d, ids in rest.items()} for _ in call.outputs]


def move_positions(call: Call) -> Sequence[ChannelIds]:
    """``roll``, ``unfold``, ``diagonal``: pass the ids of the other dimensions, and freeze those that would shift."""
    named = [call.dims(name) for name in ("dims", "dim", "dimension", "dim1", "dim2")]
    dims = set[int]().union(*(found for found in named if found is not None))
    source = call.inputs[0]
    ids = call.ids(source)
    moved = {dim: vector for dim, vector in ids.items() if dim in dims or not dims}
    if not moved:
        return move_channels(call)
    call.ledger.freeze_all([moved], f"{call.where} moves channels to other positions")
    # `unfold` and `diagonal` change the number of dimensions, so that the other ids have no place.
    if call.outputs[0].shape != source.shape:
        call.ledger.freeze_all([ids], f"{call.where} moves channels to other positions")
        return [{} for _ in call.outputs]
    return [{dim: vector for dim, vector in ids.items() if dim not in moved}]


def channel_shuffle(call: Call) -> Sequence[ChannelIds]:
    """Transpose (groups, n) channels to (n, groups), and tie equal positions of the groups."""
    ids = dict(call.ids(call.inputs[0]))
    if 1 in ids:
        matrix = ids[1].reshape(call.named("groups"), -1)
        # Every group must keep equally many channels for the shuffle to remain a transposition.
        call.ledger.tie_rows(matrix)
        ids[1] = np.ascontiguousarray(matrix.T).reshape(-1)
    return [ids]


def im2col(call: Call) -> Sequence[ChannelIds]:
    """Repeat every channel as often as the kernel has positions."""
    ids = dict(call.ids(call.inputs[0]))
    channels = ids.pop(1, None)
    call.ledger.freeze_all([ids], f"{call.where} slides over channels")
    return [{} if channels is None else {1: np.repeat(channels, call.outputs[0].size(1) // len(channels))}]


def col2im(call: Call) -> Sequence[ChannelIds]:
    """``fold``: sum the positions of the kernel, (batch, channels x positions, windows) -> (batch, channels, ...)."""
    source = call.inputs[0]
    ids = dict(call.ids(source))
    dim = source.dim() - 2
    channels = ids.pop(dim, None)
    call.ledger.freeze_all([ids], f"{call.where} slides over channels")
    if channels is None:
        return [{}]
    rows = channels.reshape(call.outputs[0].size(dim), -1)
    # All positions of one channel go together; the first stands for it.
    return [{dim: call.ledger.tie_rows(np.ascontiguousarray(rows.T))}]


def position_sensitive(call: Call) -> Sequence[ChannelIds]:
    """``ps_roi_align``: every bin of an output channel reads an input channel of its own; they go together.

    (batch, channels x rows x columns, ...) -> (regions, channels, rows, columns).
    """
    ids = call.ids(call.inputs[0])
    of_places = [{dim: vector for dim, vector in ids.items() if dim != 1}, *map(call.ids, call.inputs[1:])]
    call.ledger.freeze_all(of_places, f"channels are used as places by {call.where}")
    if 1 not in ids:
        return [{} for _ in call.outputs]
    rows = ids[1].reshape(call.outputs[0].size(1), -1)
    result: ChannelIds = {1: call.ledger.tie_rows(np.ascontiguousarray(rows.T))}
    return [result, *({} for _ in call.outputs[1:])]


def gated(call: Call) -> Sequence[ChannelIds]:
    """``glu``: the second half of a dimension gates the first one; equal positions of both go together."""
    source = call.inputs[0]
    ids = dict(call.ids(source))
    dim = int(call.named("dim")) % source.dim()
    if dim in ids:
        ids[dim] = call.ledger.tie_rows(ids[dim].reshape(2, -1))
    return [ids]


def pick_along(call: Call) -> Sequence[ChannelIds]:
    """Pick along one dimension; along the others, position i of the indices picks from position i."""
    return [_match_positions(call, call.inputs[:2], f"{call.where} picks channels by an index")]


def scatter(call: Call) -> Sequence[ChannelIds]:
    """Write along one dimension; along the others, position i of the source goes to position i."""
    target = call.inputs[0]
    # The indices of `index_add` and `index_copy` are one vector, those of the others have as many dimensions as x.
    tensors = [t for t in call.inputs if t.dim() == target.dim()]
    reason = f"{call.where} writes channels to places given by an index"
    result = _match_positions(call, tensors, reason)
    if is_mutable(call.operator) and target._base is not None and result.keys() - call.ids(target).keys():
        call.ledger.freeze_all([result], f"{call.where} writes into a part of a tensor")
        return [{} for _ in call.outputs]
    return [result]


def write_at(call: Call) -> Sequence[ChannelIds]:
    """``x[indices] = values``: the indexed dimensions of x become those of the indices, and the others stay."""
    target, indices, values = call.args[:3]
    places = [dim for dim, one in enumerate(indices) if one is not None]
    given = [one for one in indices if one is not None]
    # A mask of several dimensions stands for all of them, and makes one.
    lengths = [one.dim() if one.dtype in {torch.bool, torch.uint8} else 1 for one in given]
    made = max((1 if one.dtype in {torch.bool, torch.uint8} else one.dim() for one in given), default=0)
    reason = f"{call.where} writes channels to places given by an index"
    if len(given) == 1 and given[0].dtype == torch.bool and given[0].shape == target.shape and values.numel() == 1:
        # A number where a mask of the same shape says so is written element by element.
        return [_write(call, target, given[0], {dim: dim for dim in range(target.dim())})]
    simple = len(given) == 1 or (
        not any(length > 1 for length in lengths) and places == [*range(places[0], places[-1] + 1)]
    )
    call.ledger.freeze_all([call.ids(one) for one in given], reason)
    if not simple or (target._base is not None and is_mutable(call.operator)):
        call.ledger.freeze_all([call.ids(target), call.ids(values)], reason)
        return [{} for _ in call.outputs]
    first, end = places[0], places[0] + sum(lengths)
    rank = target.dim() - (end - first) + made
    result: ChannelIds = {}
    for dim in range(target.dim()):
        own = call.ids(target).get(dim)
        if first <= dim < end:
            call.ledger.freeze_all([] if own is None else [{dim: own}], reason)
            continue
        # Values are aligned at the last dimension, and may be broadcast.
        place = (dim if dim < first else dim - (end - first) + made) - rank + values.dim()
        broadcast = place < 0 or values.size(place) == 1
        theirs = (None, 1) if broadcast else (call.ids(values).get(place), values.size(place))
        merged = merge_operands(call, [(own, target.size(dim)), theirs])
        result.update({} if merged is None else {dim: merged})
    return [result]


def overwrite(call: Call) -> Sequence[ChannelIds]:
    """``copy_``, also into a view (``z[:, :, 1:] = x``): what is written at a channel's position is that channel."""
    target, source = call.inputs[0], call.inputs[-1]
    return [_write(call, target, source, {dim: dim for dim in range(target.dim())})]


def scatter_part(call: Call) -> Sequence[ChannelIds]:
    """``slice_scatter``, ``select_scatter``: as a copy of a tensor into a part of which another one is written."""
    target, source = call.inputs[:2]
    dim = int(call.named("dim")) % target.dim()
    own = call.ids(target).get(dim)
    if own is not None:
        call.ledger.freeze(own, f"{call.where} writes to a part of the channels")
    kept = source.dim() == target.dim()
    places = {d - (not kept and d > dim): d for d in range(target.dim()) if d != dim}
    return [_write(call, target, source, places, skipped=dim)]


def _write(
    call: Call, target: torch.Tensor, source: torch.Tensor, places: Mapping[int, int], skipped: int | None = None
) -> ChannelIds:
    """Tie the channels of a tensor to those that are written into it.

    Args:
        call: The call.
        target: What is written to.
        source: What is written; it may be broadcast.
        places: The dimension of the target by dimension of the part that the source is broadcast to.
        skipped: A dimension of the target along which nothing is tied.
    """
    rank = len(places) + (skipped is not None and source.dim() == target.dim())
    result = {dim: ids for dim, ids in call.ids(target).items() if dim == skipped}
    for place, dim in places.items():
        own, behind = call.ids(target).get(dim), place - rank + source.dim()
        theirs = call.ids(source).get(behind) if behind >= 0 else None
        if own is None and theirs is not None:
            own = _adopt(call, target, dim, theirs)
        broadcast = behind < 0 or source.size(behind) == 1 or source.stride(behind) == 0
        merged = merge_operands(call, [(own, target.size(dim)), (theirs, 1 if broadcast else source.size(behind))])
        if merged is not None:
            result[dim] = merged
    return result


def _adopt(call: Call, target: torch.Tensor, dim: int, ids: IntArray) -> IntArray | None:
    """Give a tensor that an operation of PyTorch made for its own result (as circular padding) the ids written into it.

    The size of any other tensor without ids is written in the model, and does not follow the channels.
    """
    whole = target if target._base is None else target._base
    name, arguments = call.ledger.caller or ("", ())
    if name in {"", "copy_", "__setitem__"} or any(whole is t or whole is t._base for t in tensors_in(*arguments)):
        return None
    same = [d for d in range(whole.dim()) if (whole.size(d), whole.stride(d)) == (target.size(dim), target.stride(dim))]
    if len(same) != 1:
        return None
    call.ledger.mark(whole, {**call.ids(whole), same[0]: ids})
    return ids


def _match_positions(call: Call, tensors: Sequence[torch.Tensor], reason: str) -> ChannelIds:
    """Tie equal positions along all dimensions but ``dim`` of the call, whose channels are frozen."""
    along = call.dims() or {0}
    result: ChannelIds = {}
    for dim in range(tensors[0].dim()):
        operands = [(call.ids(t).get(dim), t.size(dim)) for t in tensors]
        if dim in along or len({length for _, length in operands}) > 1:
            call.ledger.freeze_all([{dim: ids} for ids, _ in operands if ids is not None], reason)
        elif (merged := merge_operands(call, operands)) is not None:
            result[dim] = merged
    return result


def stack(call: Call) -> Sequence[ChannelIds]:
    """Insert a dimension without channels, and tie the other dimensions of the tensors."""
    tensors: Sequence[torch.Tensor] = call.args[0]
    new = int(call.named("dim")) % call.outputs[0].dim()
    result: ChannelIds = {}
    for dim in range(tensors[0].dim()):
        merged = merge_operands(call, [(call.ids(t).get(dim), t.size(dim)) for t in tensors])
        if merged is not None:
            result[dim + (dim >= new)] = merged
    return [result]


def index(call: Call) -> Sequence[ChannelIds]:
    """Indexing with tensors: pass the ids of the other dimensions, and freeze those that are indexed."""
    source = call.inputs[0]
    for other in call.inputs[1:]:
        call.ledger.freeze_all([call.ids(other)], f"channels are used as indices by {call.where}")
    named = call.dims()
    if named is None:
        named = {dim for dim, indices in enumerate(call.args[1]) if indices is not None}
    picked = {dim: ids for dim, ids in call.ids(source).items() if dim in named}
    call.ledger.freeze_all([picked], f"{call.where} picks channels by a fixed index")
    return _move_ids(call, {dim: ids for dim, ids in call.ids(source).items() if dim not in named})


def new_tensor(call: Call) -> Sequence[ChannelIds]:
    """Give ``x.new_zeros(...)`` no ids: it takes only the dtype and device of x."""
    return [{} for _ in call.outputs]


def pad(call: Call) -> Sequence[ChannelIds]:
    """Constant padding: give the padding new ids, which no parameter produces (option-A shortcuts of ResNets)."""
    source, amounts = call.inputs[0], call.args[1]
    result: ChannelIds = {}
    for dim, vector in call.ids(source).items():
        # Amounts are listed from the last dimension to the first, two for each.
        place = 2 * (source.dim() - 1 - dim)
        low, high = (amounts[place], amounts[place + 1]) if place + 1 < len(amounts) else (0, 0)
        if low < 0 or high < 0:
            call.ledger.freeze(vector, f"{call.where} crops channels")
            continue
        parts = [call.ledger.new(low), vector, call.ledger.new(high)]
        result[dim] = np.concatenate(parts) if low or high else vector
    return [result]


def concatenate(call: Call) -> Sequence[ChannelIds]:
    """Concatenate the ids, and tie the other dimensions of the tensors."""
    tensors: Sequence[torch.Tensor] = call.args[0]
    rank = tensors[0].dim()
    dim = call.argument(1, call.kwargs.get("dim", 0)) % rank
    result: ChannelIds = {}
    if any(dim in call.ids(t) for t in tensors):
        parts = [call.ids(t).get(dim) for t in tensors]
        # A part without ids, such as constants, gets new ids that are frozen.
        result[dim] = np.concatenate(
            [
                part if part is not None else _new_frozen_ids(call, t.size(dim))
                for part, t in zip(parts, tensors, strict=True)
            ]
        )
    for other in range(rank):
        if other != dim:
            merged = merge_operands(call, [(call.ids(t).get(other), t.size(other)) for t in tensors])
            if merged is not None:
                result[other] = merged
    return [result]


def _new_frozen_ids(call: Call, size: int) -> IntArray:
    ids = call.ledger.new(size)
    call.ledger.freeze(ids, f"{call.where} adds channels that no parameter produces")
    return ids
