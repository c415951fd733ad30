"""Operations with weights: convolutions, matrix products, norms, attention."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from secateur.graph._call import Call, by_whole_groups, merge, unknown
from secateur.graph._channels import IntArray, Role
from secateur.graph._ledger import ChannelIds, CountedOperation, Ledger


def batch_norm(call: Call) -> Sequence[ChannelIds]:
    """One scale, shift, mean and variance per channel.

    With statistics of the input itself (standardised weights), other dimensions that carry channels are averaged over.
    """
    source = call.inputs[0]
    ids = dict(call.ids(source))
    vectors = [t for t in call.args[1:5] if isinstance(t, torch.Tensor)]
    merged = merge(call, [(ids.get(1), source.size(1)), *((call.ids(t).get(0), t.size(0)) for t in vectors)])
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
        merged = merge(call, [(ids.get(dim), source.size(dim)), *own])
        if merged is not None:
            ids[dim] = merged
    results = [ids, *({} for _ in call.outputs[1:])]
    return call.mix(results) if max(ids, default=-1) >= first else results


def group_norm(call: Call) -> Sequence[ChannelIds]:
    """Mean and variance over the channels of a group: whole groups go, or the same positions of every group."""
    source, groups = call.inputs[0], call.args[6]
    ids = dict(call.ids(source))
    own = [(call.ids(t).get(0), t.size(0)) for t in call.inputs[1:]]
    merged = merge(call, [(ids.get(1), source.size(1)), *own])
    others = {dim: vector for dim, vector in ids.items() if dim != 1}
    call.ledger.freeze_all([others], f"{call.where} normalises over them")
    if merged is None:
        return [{} for _ in call.outputs]
    tie_groups(call.ledger, merged.reshape(groups, -1))
    return call.mix([{1: merged}, *({} for _ in call.outputs[1:])])


def tie_groups(ledger: Ledger, members: IntArray) -> None:
    """Let whole groups go, or the same positions of every group."""
    ledger.tie_rows(np.ascontiguousarray(members.T) if by_whole_groups(*members.shape) else members)


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
        _connect(call, incoming, consumed)
    elif transposed and weight.size(0) == groups and weight.size(1) == 1:
        produced, consumed, out_dim = _through(call, incoming, weight), None, 0
    elif transposed:
        reason = f"{call.where}: grouped transposed convolution"
        call.ledger.freeze_all([call.ids(source), call.ids(weight)], reason)
        _count(call, factor, weight, (None, None), out_dim, ())
        return [{}]
    else:
        produced = _grouped(call, incoming, weight, groups)
    _count(call, factor, weight, (produced, consumed), out_dim, tuple(along.values()))
    if bias is not None:
        merge(call, [(produced, out.size(1)), (call.ids(bias).get(0), bias.size(0))])
        call.ledger.roles.append((call.ids(bias).get(0, np.zeros(0, np.int64)), Role.OUTPUT))
    results = [along if produced is None else {1: produced, **along}]
    return call.mix(results) if any(along) else results


def _connect(call: Call, incoming: IntArray | None, consumed: IntArray | None) -> None:
    """The channels that arrive are those the weight's input dimension expects."""
    if consumed is not None:
        call.ledger.roles.append((consumed, Role.INPUT))
    if incoming is not None and consumed is not None:
        call.ledger.tie(incoming, consumed)
    elif consumed is not None:
        call.ledger.freeze(consumed, f"{call.where} reads the model's input or another tensor that carries no channels")
    elif incoming is not None:
        call.ledger.freeze(incoming, f"{call.where} uses a weight without channels of its own")


def _count(  # noqa: PLR0917
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


def _through(call: Call, incoming: IntArray | None, weight: torch.Tensor) -> IntArray | None:
    """A depthwise transposed convolution passes its channels through."""
    channels = call.ids(weight).get(0)
    merge(call, [(incoming, weight.size(0)), (channels, weight.size(0))])
    return channels


def _grouped(call: Call, incoming: IntArray | None, weight: torch.Tensor, groups: int) -> IntArray | None:
    """Grouped convolution: remove whole groups, or the same positions of every group. Depthwise is the first case."""
    produced, consumed = call.ids(weight).get(0), call.ids(weight).get(1)
    if incoming is None or produced is None:
        call.ledger.freeze_all(
            [call.ids(weight)], f"{call.where} reads the model's input or another tensor that carries no channels"
        )
        return produced
    entering, leaving = incoming.reshape(groups, -1), produced.reshape(groups, -1)
    if by_whole_groups(*entering.shape):
        call.ledger.tie_rows(np.ascontiguousarray(entering.T))
        call.ledger.tie_rows(np.ascontiguousarray(leaving.T))
        call.ledger.tie(entering[:, 0], leaving[:, 0])
        if consumed is not None:
            call.ledger.freeze(consumed, f"{call.where} removes whole groups only")
        return produced
    call.ledger.tie_rows(entering)
    _connect(call, entering[0], consumed)
    if leaving.shape[1] == 1:
        call.ledger.freeze(produced, f"{call.where} has one output channel per group")
    else:
        call.ledger.tie_rows(leaving)
    return produced


def matrix_product(call: Call) -> Sequence[ChannelIds]:
    """``mm`` and ``addmm``: (n, k) @ (k, m)."""
    left, right = call.args[-2:] if call.name == "mm" else call.args[1:3]
    result = _product(call, left, right, 0)
    if call.name == "addmm":
        bias = call.args[0]
        own = call.ids(bias)
        if 1 in result:
            merge(call, [(result[1], right.size(1)), (own.get(bias.dim() - 1), bias.size(-1))])
            call.ledger.roles.append((own.get(bias.dim() - 1, np.zeros(0, np.int64)), Role.OUTPUT))
            own = {dim: ids for dim, ids in own.items() if dim != bias.dim() - 1}
        call.ledger.freeze_all([own], f"{call.where} adds them to something that does not follow")
    return [result]


def batched_product(call: Call) -> Sequence[ChannelIds]:
    """``bmm``: (batch, n, k) @ (batch, k, m), as `matrix_product` for every item of the batch."""
    return [_product(call, call.args[0], call.args[1], 1)]


def whole_product(call: Call) -> Sequence[ChannelIds]:
    """Products that no channel is followed through: counted, and frozen."""
    macs = float(_WHOLE_PRODUCTS[call.name](*call.args))
    call.ledger.operations.append(CountedOperation(call.module, call.name, macs, ()))
    return unknown(call)


def _inner(left: torch.Tensor, right: torch.Tensor) -> int:
    """(n, k) @ (k, m), (n, k) @ (k) or (k) . (k), or a batch of them."""
    return left.numel() * (right.size(-1) if right.dim() > 1 else 1)


_WHOLE_PRODUCTS: Mapping[str, Callable[..., int]] = {
    "dot": _inner,
    "vdot": _inner,
    "mv": _inner,
    "addmv": lambda _added, left, right: _inner(left, right),
    "addbmm": lambda _added, left, right: _inner(left, right),
    "baddbmm": lambda _added, left, right: _inner(left, right),
    # nn.Bilinear: (n, i), (o, i, j), (n, j).
    "_trilinear": lambda left, weight, _right, *_: left.size(0) * weight.numel(),
    # One direction of one layer: (steps, batch, features), a matrix for the input, another for the hidden state.
    "mkldnn_rnn_layer": lambda x, w, u, *_: x.size(0) * x.size(1) * (w.numel() + u.numel()),
    "_cudnn_rnn": lambda x, weights, *_: x.size(0) * x.size(1) * sum(w.numel() for w in weights if w.dim() == 2),
}
WHOLE_PRODUCT_KINDS = tuple(_WHOLE_PRODUCTS)


def _product(call: Call, left: torch.Tensor, right: torch.Tensor, rows: int) -> ChannelIds:
    """(..., n, k) @ (..., k, m), where n is dimension ``rows`` of the left factor."""
    left_ids, right_ids = call.ids(left), call.ids(right)
    if rows and not call.ledger.is_own(left) and not call.ledger.is_own(right):
        call.ledger.note_attention(call.module, (*left_ids.values(), *right_ids.values()))
        call.ledger.contracted.extend(right_ids[dim] for dim in (rows,) if dim in right_ids)
    leaving = {dim: ids[dim] for dim, ids in ((rows, left_ids), (rows + 1, right_ids)) if dim in ids}
    inner = right_ids.get(rows, left_ids.get(rows + 1))
    if call.ledger.is_own(right) or not call.ledger.is_own(left):
        _connect(call, left_ids.get(rows + 1), right_ids.get(rows))
        produced = leaving.get(rows + 1)
    else:
        # The matrix of the model stands on the left: ``W @ x``.
        _connect(call, right_ids.get(rows), left_ids.get(rows + 1))
        produced = leaving.get(rows)
    if produced is not None:
        call.ledger.roles.append((produced, Role.OUTPUT))
    batch: list[IntArray | int] = []
    if rows:
        both = merge(call, [(left_ids.get(0), left.size(0)), (right_ids.get(0), right.size(0))])
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
    _connect_heads(call, [found.get(rank - 1) for found in ids[:2]])
    tokens = [found.get(rank - 2) for found in ids[1:]]
    _connect_heads(call, tokens)
    call.ledger.note_attention(
        call.module, (found[dim] for found in ids for dim in (rank - 2, rank - 1) if dim in found)
    )
    tensors = [query, key, value, *([] if bias is None else [bias])]
    result: ChannelIds = {}
    for dim in range(rank - 2):
        merged = merge(call, [_aligned(call, t, dim - rank + t.dim()) for t in tensors])
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


def _aligned(call: Call, tensor: torch.Tensor, dim: int) -> tuple[IntArray | None, int]:
    """Ids and length along a dimension that may be missing, of size one or broadcast."""
    if dim < 0 or tensor.size(dim) == 1 or tensor.stride(dim) == 0:
        return None, 1
    return call.ids(tensor).get(dim), tensor.size(dim)


def _connect_heads(call: Call, inner: Sequence[IntArray | None]) -> None:
    """The head dimension of the query meets that of the key."""
    first, second = inner
    if first is not None and second is not None:
        call.ledger.contracted.append(call.ledger.tie(first, second))
        return
    for ids in inner:
        if ids is not None:
            call.ledger.freeze(ids, f"{call.where} multiplies them with a tensor that carries no channels")
