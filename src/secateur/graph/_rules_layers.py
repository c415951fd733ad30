"""Operations with weights: convolutions, matrix products, norms, attention.

Operations that compute something over channels: norms, means, softmax.

A cut model computes them over the channels it kept. The masked original must do the same, or the two could never be
compared: zeros in place of the removed channels would take part in the mean."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from secateur._arrays import IntArray
from secateur._runtime import add_run_context_
from secateur.graph._ledger import (
    MIXING_KINDS,
    Call,
    ChannelIds,
    CountedOperation,
    Ledger,
    base_name,
    cuts_whole_groups,
    freeze_inputs,
    merge_operands,
)
from secateur.graph.graph import ChannelDim, ChannelGraph, MixingCall, Role


def batch_norm(call: Call) -> Sequence[ChannelIds]:
    """One scale, shift, mean and variance per channel.

    With statistics of the input itself (standardized weights), other dimensions that carry channels are averaged over.
    """
    source = call.inputs[0]
    ids = dict(call.ids(source))
    vectors = [t for t in call.args[1:5] if isinstance(t, torch.Tensor)]
    merged = merge_operands(call, [(ids.get(1), source.size(1)), *((call.ids(t).get(0), t.size(0)) for t in vectors)])
    if merged is not None:
        ids[1] = merged
    results = [ids, *({} for _ in call.outputs[1:])]
    own_statistics = bool(call.named("training") or call.named("use_input_stats"))
    return call.mix(results) if own_statistics and any(dim != 1 for dim in ids) else results


def layer_norm(call: Call) -> Sequence[ChannelIds]:
    """Mean and variance (or root mean square) over the last dimensions; of channels, over the kept ones."""
    source = call.inputs[0]
    first = source.dim() - len(call.args[1])
    ids = dict(call.ids(source))
    for dim in range(first, source.dim()):
        own = [(call.ids(t).get(dim - first), t.size(dim - first)) for t in call.inputs[1:]]
        merged = merge_operands(call, [(ids.get(dim), source.size(dim)), *own])
        if merged is not None:
            ids[dim] = merged
    results = [ids, *({} for _ in call.outputs[1:])]
    return call.mix(results) if max(ids, default=-1) >= first else results


def group_norm(call: Call) -> Sequence[ChannelIds]:
    """Mean and variance over the channels of a group: whole groups go, or the same positions of every group."""
    source, groups = call.inputs[0], call.args[6]
    ids = dict(call.ids(source))
    own = [(call.ids(t).get(0), t.size(0)) for t in call.inputs[1:]]
    merged = merge_operands(call, [(ids.get(1), source.size(1)), *own])
    others = {dim: vector for dim, vector in ids.items() if dim != 1}
    call.ledger.freeze_all([others], f"{call.where} normalizes over them")
    if merged is None:
        return [{} for _ in call.outputs]
    tie_groups(call.ledger, merged.reshape(groups, -1))
    return call.mix([{1: merged}, *({} for _ in call.outputs[1:])])


def tie_groups(ledger: Ledger, members: IntArray) -> None:
    """Let whole groups go, or the same positions of every group."""
    ledger.tie_rows(np.ascontiguousarray(members.T) if cuts_whole_groups(*members.shape) else members)


def convolution(call: Call) -> Sequence[ChannelIds]:
    """Convolution of any rank: ties its input channels to the weight's input dimension, gives the output dimension.

    One that slides along channels, as the gates of ECA do, slides along the kept ones in a cut model.
    """
    source, weight, bias = call.args[0], call.args[1], call.args[2]
    transposed, groups = call.args[6], call.args[8]
    out = call.outputs[0]
    along = {dim: ids for dim, ids in call.ids(source).items() if dim != 1}
    if any(dim and (groups > 1 or out.size(dim) != source.size(dim)) for dim in along):
        call.ledger.freeze_all([along], f"{call.where} slides over channels")
        along = {}
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    produced, consumed = call.ids(weight).get(out_dim), call.ids(weight).get(in_dim)
    incoming = call.ids(source).get(1)
    # Windows may be folded into the batch, so it is not always one.
    placed = {0: source.size(0), **dict(enumerate((source if transposed else out).shape[2:], 2))}
    positions = math.prod(size for dim, size in placed.items() if dim not in along)
    factor = float(positions * math.prod(weight.shape[2:]))
    if groups == 1:
        _connect_input(call, incoming, consumed)
    elif transposed and weight.size(0) == groups and weight.size(1) == 1:
        produced, consumed, out_dim = _pass_through(call, incoming, weight), None, 0
    elif transposed:
        reason = f"{call.where}: grouped transposed convolution"
        call.ledger.freeze_all([call.ids(source), call.ids(weight)], reason)
        _count_convolution(call, factor, weight, (None, None), out_dim, ())
        return [{}]
    else:
        produced = _connect_groups(call, incoming, weight, groups)
    _count_convolution(call, factor, weight, (produced, consumed), out_dim, tuple(along.values()))
    if bias is not None:
        merge_operands(call, [(produced, out.size(1)), (call.ids(bias).get(0), bias.size(0))])
        call.ledger.roles.append((call.ids(bias).get(0, np.zeros(0, np.int64)), Role.OUTPUT))
    results = [along if produced is None else {1: produced, **along}]
    return call.mix(results) if any(along) else results


def _connect_input(call: Call, incoming: IntArray | None, consumed: IntArray | None) -> None:
    """The channels that arrive are those the weight's input dimension expects."""
    if consumed is not None:
        call.ledger.roles.append((consumed, Role.INPUT))
    if incoming is not None and consumed is not None:
        call.ledger.tie(incoming, consumed)
    elif consumed is not None:
        call.ledger.freeze(consumed, f"{call.where} reads the model's input or another tensor that carries no channels")
    elif incoming is not None:
        call.ledger.freeze(incoming, f"{call.where} uses a weight without channels of its own")


def _count_convolution(  # noqa: PLR0917
    call: Call,
    factor: float,
    weight: torch.Tensor,
    vectors: tuple[IntArray | None, IntArray | None],
    out_dim: int,
    along: tuple[IntArray, ...],
) -> None:
    """Count a convolution: factor x output channels x channels the weight reads."""
    produced, consumed = vectors
    if produced is not None and call.args[8] != weight.size(0):
        # A depthwise convolution passes its channels through; every other one produces new ones.
        call.ledger.roles.append((call.ids(weight).get(out_dim, produced), Role.OUTPUT))
    extents = (
        produced if produced is not None else weight.size(out_dim),
        consumed if consumed is not None else weight.size(1 - out_dim),
        *along,
    )
    call.ledger.operations.append(CountedOperation(call.module, call.name, factor, extents))


def _pass_through(call: Call, incoming: IntArray | None, weight: torch.Tensor) -> IntArray | None:
    """A depthwise transposed convolution passes its channels through."""
    channels = call.ids(weight).get(0)
    merge_operands(call, [(incoming, weight.size(0)), (channels, weight.size(0))])
    return channels


def _connect_groups(call: Call, incoming: IntArray | None, weight: torch.Tensor, groups: int) -> IntArray | None:
    """Grouped convolution: remove whole groups, or the same positions of every group. Depthwise is the first case."""
    produced, consumed = call.ids(weight).get(0), call.ids(weight).get(1)
    if incoming is None or produced is None:
        call.ledger.freeze_all(
            [call.ids(weight)], f"{call.where} reads the model's input or another tensor that carries no channels"
        )
        return produced
    entering, leaving = incoming.reshape(groups, -1), produced.reshape(groups, -1)
    if cuts_whole_groups(*entering.shape):
        call.ledger.tie_rows(np.ascontiguousarray(entering.T))
        call.ledger.tie_rows(np.ascontiguousarray(leaving.T))
        call.ledger.tie(entering[:, 0], leaving[:, 0])
        if consumed is not None:
            call.ledger.freeze(consumed, f"{call.where} removes whole groups only")
        return produced
    call.ledger.tie_rows(entering)
    _connect_input(call, entering[0], consumed)
    if leaving.shape[1] == 1:
        call.ledger.freeze(produced, f"{call.where} has one output channel per group")
    else:
        call.ledger.tie_rows(leaving)
    return produced


def matrix_product(call: Call) -> Sequence[ChannelIds]:
    """``mm`` and ``addmm``: (n, k) @ (k, m)."""
    left, right = call.args[-2:] if call.name == "mm" else call.args[1:3]
    result = _multiply(call, left, right, 0)
    if call.name == "addmm":
        bias = call.args[0]
        own = call.ids(bias)
        if 1 in result:
            merge_operands(call, [(result[1], right.size(1)), (own.get(bias.dim() - 1), bias.size(-1))])
            call.ledger.roles.append((own.get(bias.dim() - 1, np.zeros(0, np.int64)), Role.OUTPUT))
            own = {dim: ids for dim, ids in own.items() if dim != bias.dim() - 1}
        call.ledger.freeze_all([own], f"{call.where} adds them to something that does not follow")
    return [result]


def batched_product(call: Call) -> Sequence[ChannelIds]:
    """``bmm``: (batch, n, k) @ (batch, k, m), as `matrix_product` for every item of the batch."""
    return [_multiply(call, call.args[0], call.args[1], 1)]


def added_batched_product(call: Call) -> Sequence[ChannelIds]:
    """``baddbmm``: counted, and frozen."""
    left, right = call.args[1], call.args[2]
    macs = float(left.size(0) * left.size(1) * left.size(2) * right.size(2))
    call.ledger.operations.append(CountedOperation(call.module, call.name, macs, ()))
    return freeze_inputs(call)


def _multiply(call: Call, left: torch.Tensor, right: torch.Tensor, rows: int) -> ChannelIds:
    """(..., n, k) @ (..., k, m), where n is dimension ``rows`` of the left factor."""
    left_ids, right_ids = call.ids(left), call.ids(right)
    if rows and not call.ledger.is_own(left) and not call.ledger.is_own(right):
        call.ledger.note_attention(call.module, (*left_ids.values(), *right_ids.values()))
        call.ledger.contracted.extend(right_ids[dim] for dim in (rows,) if dim in right_ids)
    leaving = {dim: ids[dim] for dim, ids in ((rows, left_ids), (rows + 1, right_ids)) if dim in ids}
    inner = right_ids.get(rows, left_ids.get(rows + 1))
    if call.ledger.is_own(right) or not call.ledger.is_own(left):
        _connect_input(call, left_ids.get(rows + 1), right_ids.get(rows))
        produced = leaving.get(rows + 1)
    else:
        # The matrix of the model stands on the left: ``W @ x``.
        _connect_input(call, right_ids.get(rows), left_ids.get(rows + 1))
        produced = leaving.get(rows)
    if produced is not None:
        call.ledger.roles.append((produced, Role.OUTPUT))
    batch: list[IntArray | int] = []
    if rows:
        both = merge_operands(call, [(left_ids.get(0), left.size(0)), (right_ids.get(0), right.size(0))])
        batch = [left.size(0) if both is None else both]
        leaving.update({} if both is None else {0: both})
    extents = (
        *batch,
        leaving.get(rows, left.size(rows)),
        left.size(rows + 1) if inner is None else inner,
        leaving.get(rows + 1, right.size(rows + 1)),
    )
    call.ledger.operations.append(CountedOperation(call.module, call.name, 1.0, extents))
    return leaving


def attention(call: Call) -> Sequence[ChannelIds]:
    """Fused attention softmax(q k^T) v over (..., heads, tokens, head dimension): two matrix products.

    The head dimension of q and k is summed over, that of v passes; heads and other leading dimensions go together.
    """
    query, key, value = (call.named(name) for name in ("query", "key", "value"))
    bias = call.named("attn_mask") if call.named("attn_mask") is not None else call.named("attn_bias")
    rank = query.dim()
    ids = [call.ids(t) for t in (query, key, value)]
    _tie_inner(call, [found.get(rank - 1) for found in ids[:2]])
    tokens = [found.get(rank - 2) for found in ids[1:]]
    _tie_inner(call, tokens)
    call.ledger.note_attention(
        call.module, (found[dim] for found in ids for dim in (rank - 2, rank - 1) if dim in found)
    )
    tensors = [query, key, value, *([] if bias is None else [bias])]
    result: ChannelIds = {}
    for dim in range(rank - 2):
        merged = merge_operands(call, [_ids_and_length(call, t, dim - rank + t.dim()) for t in tensors])
        result.update({} if merged is None else {dim: merged})
    result.update({rank - 2: ids[0][rank - 2]} if rank - 2 in ids[0] else {})
    result.update({rank - 1: ids[2][rank - 1]} if rank - 1 in ids[2] else {})
    outer: list[IntArray | int] = [result.get(dim, int(query.size(dim))) for dim in range(rank - 1)]
    inners: list[IntArray | int] = [
        found.get(rank - 1, int(t.size(-1))) for found, t in ((ids[0], query), (ids[2], value))
    ]
    for inner in inners:
        dims = (*outer, inner, key.size(-2) if tokens[0] is None else tokens[0])
        call.ledger.operations.append(CountedOperation(call.module, call.name, 1.0, dims))
    results = [result, *({} for _ in call.outputs[1:])]
    return call.mix(results) if any(found is not None for found in tokens) else results


def _ids_and_length(call: Call, tensor: torch.Tensor, dim: int) -> tuple[IntArray | None, int]:
    """Ids and length along a dimension that may be missing, of size one or broadcast."""
    if dim < 0 or tensor.size(dim) == 1 or tensor.stride(dim) == 0:
        return None, 1
    return call.ids(tensor).get(dim), tensor.size(dim)


def _tie_inner(call: Call, inner: Sequence[IntArray | None]) -> None:
    """The head dimension of the query meets that of the key."""
    first, second = inner
    if first is not None and second is not None:
        call.ledger.contracted.append(call.ledger.tie(first, second))
        return
    for ids in inner:
        if ids is not None:
            call.ledger.freeze(ids, f"{call.where} multiplies them with a tensor that carries no channels")


class KeptChannelsMode(TorchDispatchMode):
    """While active, one run of a full model computes norms, means and softmaxes over the kept channels only.

    Removed positions of the results are zero.

    Args:
        graph: Of the model that runs.
        kept: Kept channels by axis name; an axis that is not named is whole.
    """

    def __init__(self, graph: ChannelGraph, kept: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self._alive = graph.alive(kept)
        self._expected = {mixing.number: mixing for mixing in graph.mixings}
        self._number = 0
        self._positions: dict[tuple[int, int], IntArray] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = base_name(func)
        if name not in MIXING_KINDS:
            return func(*args, **kwargs)
        mixing = self._expected.get(self._number)
        self._number += 1
        if mixing is None or not self._is_same(mixing, name, args, kwargs):
            return func(*args, **kwargs)
        read = [(lane, self._kept(lane)) for lane in mixing.read]
        if all(len(positions) == len(lane.axis) for lane, positions in read):
            return func(*args, **kwargs)
        args, kwargs = _gather_kept(name, args, kwargs, read)
        return _scatter_kept(func(*args, **kwargs), [(lane, self._kept(lane)) for lane in mixing.written])

    def _kept(self, lane: ChannelDim) -> IntArray:
        """Positions that remain along a lane; calls on the same stream share theirs."""
        key = id(lane.axis), id(lane.channel)
        if key not in self._positions:
            self._positions[key] = lane.kept(self._alive)
        return self._positions[key]

    def _is_same(self, mixing: MixingCall, name: str, args: Any, kwargs: Any) -> bool:
        """Whether the model still runs what it ran when traced; where data decide, it may not, and all bets are off."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        same = mixing.kind == name and all(
            lane.tensor < len(tensors)
            and lane.dim < tensors[lane.tensor].dim()
            and tensors[lane.tensor].size(lane.dim) == len(lane.axis)
            for lane in mixing.read
        )
        if not same:
            self._expected = {}
        return same


def compute_over_kept_channels_(
    model: nn.Module, graph: ChannelGraph, kept: Mapping[str, tuple[int, ...]]
) -> nn.Module:
    """Make a full model compute norms, means and softmaxes over the kept channels whenever it runs; returns it."""
    return add_run_context_(model, lambda _: KeptChannelsMode(graph, kept)) if graph.mixings else model


def _gather_kept(
    name: str, args: Any, kwargs: Any, read: Sequence[tuple[ChannelDim, IntArray]]
) -> tuple[tuple[Any, ...], Any]:
    leaves, spec = tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for lane, positions in read:
        tensor = leaves[places[lane.tensor]]
        leaves[places[lane.tensor]] = tensor.index_select(lane.dim, torch.from_numpy(positions).to(tensor.device))
    args, kwargs = tree_unflatten(leaves, spec)
    args = list(args)
    if name in {"native_layer_norm", "_fused_rms_norm"}:
        args[1] = list(args[0].shape[-len(args[1]) :])
    elif name == "native_group_norm":
        positions = next(p for lane, p in read if lane.tensor == 0 and lane.dim == 1)
        args[6] = len({int(p) // (args[4] // args[6]) for p in positions})
        args[4] = len(positions)
    return tuple(args), kwargs


def _scatter_kept(out: Any, written: Sequence[tuple[ChannelDim, IntArray]]) -> Any:
    leaves, spec = tree_flatten(out)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for lane, positions in written:
        tensor = leaves[places[lane.tensor]]
        shape = list(tensor.shape)
        shape[lane.dim] = len(lane.axis)
        full = tensor.new_zeros(shape)
        leaves[places[lane.tensor]] = full.index_copy_(lane.dim, torch.from_numpy(positions).to(tensor.device), tensor)
    return tree_unflatten(leaves, spec)
