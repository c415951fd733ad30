"""Channel rules of operations with weights: convolutions, matrix products, norms and attention.

`compute_over_kept_channels_` belongs to them: a cut model computes norms, means and softmaxes over the channels that it
kept. The masked original must do the same to be comparable, because the zeros of removed channels would enter a mean.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
    """Tie the input channels to the scale, shift, mean and variance of each channel.

    If the statistics are those of the input itself (standardized weights), the call averages over the other dimensions,
    which may carry channels too.
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
    """Tie the input channels to the weights; the mean and variance over channels are those of the kept ones."""
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
    """Normalize groups of channels: whole groups can be removed, or else the same positions of every group."""
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
    """Tie (groups, channels of a group) so that whole groups are removed, or else the same positions of every group."""
    ledger.tie_rows(np.ascontiguousarray(members.T) if cuts_whole_groups(*members.shape) else members)


def convolution(call: Call) -> Sequence[ChannelIds]:
    """Tie the input channels of a convolution of any rank to the weight's input dimension.

    A convolution that slides along channels, as in the gates of ECA, slides along the kept ones in a cut model.
    """
    source, weight, bias = call.args[0], call.args[1], call.args[2]
    transposed, groups = call.args[6], call.args[8]
    out = call.outputs[0]
    along = {dim: ids for dim, ids in call.ids(source).items() if dim != 1}
    # Only where the size stays does every channel along such a dimension have an output of its own. Dimension 0 is the
    # batch.
    if any(dim and (groups > 1 or out.size(dim) != source.size(dim)) for dim in along):
        call.ledger.freeze_all([along], f"{call.where} slides over channels")
        along = {}
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    produced, consumed = call.ids(weight).get(out_dim), call.ids(weight).get(in_dim)
    incoming = call.ids(source).get(1)
    # Windows may be folded into the batch dimension, so its size is not always one.
    # A transposed convolution multiplies the kernel at every position of its input.
    placed = {0: source.size(0), **dict(enumerate((source if transposed else out).shape[2:], 2))}
    # Dimensions that carry channels are counted by their ids, as factors that follow a cut.
    positions = math.prod(size for dim, size in placed.items() if dim not in along)
    factor = float(positions * math.prod(weight.shape[2:]))
    if groups == 1:
        connect_input(call, incoming, consumed)
    elif transposed and weight.size(0) == groups and weight.size(1) == 1:
        produced, consumed, out_dim = _pass_through(call, incoming, weight), None, 0
    elif transposed:
        reason = f"{call.where}: grouped transposed convolution"
        call.ledger.freeze_all([call.ids(source), call.ids(weight)], reason)
        _count_convolution(call, factor, weight, (None, None), out_dim, groups)
        return [{}]
    else:
        produced = _connect_groups(call, incoming, weight, groups)
    _count_convolution(call, factor, weight, (produced, consumed), out_dim, groups, tuple(along.values()))
    if bias is not None:
        merge_operands(call, [(produced, out.size(1)), (call.ids(bias).get(0), bias.size(0))])
        call.ledger.roles.append((call.ids(bias).get(0, np.zeros(0, np.int64)), Role.OUTPUT))
    results = [along if produced is None else {1: produced, **along}]
    return call.mix(results) if any(along) else results


def connect_input(call: Call, incoming: IntArray | None, consumed: IntArray | None) -> None:
    """Tie the incoming channels to the input dimension of the weight."""
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
    groups: int,
    along: tuple[IntArray, ...] = (),
) -> None:
    """Record the MACs of a convolution: factor x output channels x input channels of the weight."""
    produced, consumed = vectors
    if produced is not None and groups != weight.size(0):
        # A depthwise convolution passes its channels through; every other one produces new ones.
        call.ledger.roles.append((call.ids(weight).get(out_dim, produced), Role.OUTPUT))
    extents = (
        produced if produced is not None else weight.size(out_dim),
        consumed if consumed is not None else weight.size(1 - out_dim),
        *along,
    )
    call.ledger.operations.append(CountedOperation(call.module, call.name, factor, extents))


def _pass_through(call: Call, incoming: IntArray | None, weight: torch.Tensor) -> IntArray | None:
    """Tie the channels of a depthwise transposed convolution to those of its weight, and return these."""
    channels = call.ids(weight).get(0)
    merge_operands(call, [(incoming, weight.size(0)), (channels, weight.size(0))])
    return channels


def _connect_groups(call: Call, incoming: IntArray | None, weight: torch.Tensor, groups: int) -> IntArray | None:
    """Tie the channels of a grouped convolution: by whole groups, as in a depthwise one, or equal positions of them."""
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
        # This dimension of the weight counts the channels of one group, which stay.
        if consumed is not None:
            call.ledger.freeze(consumed, f"{call.where} removes whole groups only")
        return produced
    call.ledger.tie_rows(entering)
    connect_input(call, entering[0], consumed)
    if leaving.shape[1] == 1:
        call.ledger.freeze(produced, f"{call.where} has one output channel per group")
    else:
        call.ledger.tie_rows(leaving)
    return produced


def deformable_convolution(call: Call) -> Sequence[ChannelIds]:
    """``torchvision.ops.deform_conv2d``: a convolution whose positions another layer computes.

    The channels of the offsets and of the mask count positions of the kernel, so they stay. With several groups of
    offsets, equal positions of all of them go together.
    """
    source, weight, offset, mask, bias = call.args[:5]
    groups, offset_groups, out = call.named("groups"), call.named("offset_groups"), call.outputs[0]
    call.ledger.freeze_all([call.ids(offset), call.ids(mask)], f"channels are used as places by {call.where}")
    others = {dim: ids for dim, ids in call.ids(source).items() if dim != 1}
    call.ledger.freeze_all([others], f"{call.where} slides over channels")
    incoming, produced, consumed = call.ids(source).get(1), call.ids(weight).get(0), call.ids(weight).get(1)
    if incoming is not None and offset_groups > 1:
        call.ledger.tie_rows(incoming.reshape(offset_groups, -1))
    if groups == 1:
        connect_input(call, incoming, consumed)
    else:
        produced = _connect_groups(call, incoming, weight, groups)
    factor = float(out.size(0) * math.prod(out.shape[2:]) * math.prod(weight.shape[2:]))
    _count_convolution(call, factor, weight, (produced, consumed), 0, groups)
    merge_operands(call, [(produced, out.size(1)), (call.ids(bias).get(0), bias.size(0))])
    call.ledger.roles.append((call.ids(bias).get(0, np.zeros(0, np.int64)), Role.OUTPUT))
    return [{} if produced is None else {1: produced}]


def convolution_over_time(call: Call) -> Sequence[ChannelIds]:
    """``conv_tbc``: (time, batch, in) by (kernel, in, out)."""
    source, weight, bias = call.args[:3]
    others = {dim: ids for dim, ids in call.ids(source).items() if dim == 0}
    call.ledger.freeze_all(
        [others, {0: call.ids(weight).get(0, np.zeros(0, np.int64))}], f"{call.where} slides over channels"
    )
    produced, consumed = call.ids(weight).get(2), call.ids(weight).get(1)
    connect_input(call, call.ids(source).get(2), consumed)
    out = call.outputs[0]
    merge_operands(call, [(produced, out.size(2)), (call.ids(bias).get(0), bias.size(0))])
    call.ledger.roles.append((call.ids(bias).get(0, np.zeros(0, np.int64)), Role.OUTPUT))
    if produced is not None:
        call.ledger.roles.append((produced, Role.OUTPUT))
    factor = float(out.size(0) * out.size(1) * weight.size(0))
    dims = (weight.size(2) if produced is None else produced, weight.size(1) if consumed is None else consumed)
    call.ledger.operations.append(CountedOperation(call.module, call.name, factor, dims))
    return [{} if produced is None else {2: produced}]


def weight_norm(call: Call) -> Sequence[ChannelIds]:
    """``weight_norm``: v * g / |v|, each norm over all dimensions but one: in a cut model over the kept positions."""
    direction, scale = call.args[:2]
    dim = int(call.named("dim")) % direction.dim()
    ids = dict(call.ids(direction))
    merged = merge_operands(call, [(ids.get(dim), direction.size(dim)), (call.ids(scale).get(dim), scale.size(dim))])
    if merged is not None:
        ids[dim] = merged
    # Of a removed filter nothing is left to divide by, so the masked original must leave it out too.
    return call.mix([ids, *({} for _ in call.outputs[1:])])


def embedding(call: Call) -> Sequence[ChannelIds]:
    """A table of vectors: its columns are channels, its rows are what the indices name."""
    table = call.args[0]
    ids, out = call.ids(table), call.outputs[0]
    for other in call.inputs[1:]:
        call.ledger.freeze_all([call.ids(other)], f"channels are used as indices by {call.where}")
    call.ledger.freeze_all([{0: ids[0]}] if 0 in ids else [], f"{call.where} picks rows by an index")
    if 1 not in ids:
        return [{} for _ in call.outputs]
    call.ledger.roles.append((ids[1], Role.OUTPUT))
    return [{out.dim() - 1: ids[1]}, *({} for _ in call.outputs[1:])]


def matrix_product(call: Call) -> Sequence[ChannelIds]:
    """Connect the factors of ``mm`` and ``addmm``, (n, k) @ (k, m)."""
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
    """Connect the factors of ``bmm``, ``baddbmm`` and ``addbmm``, (batch, n, k) @ (batch, k, m).

    The last one sums over the batch.
    """
    if call.name == "bmm":
        return [_multiply(call, call.args[0], call.args[1], 1)]
    added, left, right = call.args[:3]
    product = _multiply(call, left, right, 1)
    if call.name == "addbmm":
        call.ledger.contracted.extend([product[0]] if 0 in product else [])
        product = {dim - 1: ids for dim, ids in product.items() if dim}
    return [_add_to_product(call, product, added)]


def _add_to_product(call: Call, product: ChannelIds, added: torch.Tensor) -> ChannelIds:
    """Tie the channels of a product to those of a tensor that is added to it."""
    out = call.outputs[0]
    result: ChannelIds = {}
    for dim in range(out.dim()):
        own = _ids_and_length(call, added, dim - out.dim() + added.dim())
        merged = merge_operands(call, [(product.get(dim), out.size(dim)), own])
        result.update({} if merged is None else {dim: merged})
    return result


def vector_product(call: Call) -> Sequence[ChannelIds]:
    """Connect the factors of ``mv`` and ``addmv``, (n, k) @ (k), and of ``dot`` and ``vdot``, (k) . (k)."""
    left, right = call.args[-2:] if call.name != "addmv" else call.args[1:3]
    inner, ours = call.ids(left).get(left.dim() - 1), call.ids(right).get(0)
    rows = call.ids(left).get(0) if left.dim() == 2 else None
    leaving: ChannelIds = {} if rows is None else {0: rows}
    weights = call.ledger.is_own(left), call.ledger.is_own(right)
    if weights[0] == weights[1]:
        # Two weights, as in spectral norm, or two activations: neither reads the channels of the other.
        _tie_inner(call, [inner, ours])
    elif weights[1]:
        connect_input(call, inner, ours)
    else:
        connect_input(call, ours, inner)
        call.ledger.roles.extend((ids, Role.OUTPUT) for ids in leaving.values())
    outer: list[IntArray | int] = [size if rows is None else rows for size in left.shape[:-1]]
    extents = (*outer, left.size(-1) if inner is None else inner)
    call.ledger.operations.append(CountedOperation(call.module, call.name, 1.0, extents))
    return [_add_to_product(call, leaving, call.args[0]) if call.name == "addmv" else leaving]


def bilinear(call: Call) -> Sequence[ChannelIds]:
    """``nn.Bilinear``: the sum over i and j of x[n, i] * weight[o, i, j] * y[n, j].

    ATen calls it ``_trilinear``: three tensors, to each of which dimensions are added (arguments 3 to 5) until all have
    the same ones, and the dimensions that the product is summed over (argument 6).
    """
    operands = [_with_dims(call, tensor, added) for tensor, added in zip(call.args[:3], call.args[3:6], strict=True)]
    summed, weight = set(call.args[6]), next((t for t in call.args[:3] if call.ledger.is_own(t)), None)
    result: ChannelIds = {}
    extents: list[IntArray | int] = []
    for dim in range(len(operands[0])):
        merged = merge_operands(call, [operand[dim] for operand in operands])
        extents.append(max(operand[dim][1] for operand in operands) if merged is None else merged)
        if merged is not None and dim not in summed:
            result[dim - sum(d < dim for d in summed)] = merged
    if weight is not None:
        own = operands[[t is weight for t in call.args[:3]].index(True)]
        roles = (((ids, Role.INPUT if dim in summed else Role.OUTPUT)) for dim, (ids, _) in enumerate(own))
        call.ledger.roles.extend((ids, role) for ids, role in roles if ids is not None)
    call.ledger.operations.append(CountedOperation(call.module, call.name, 1.0, tuple(extents)))
    return [result]


def _with_dims(call: Call, tensor: torch.Tensor, added: Sequence[int]) -> list[tuple[IntArray | None, int]]:
    """Return the ids and length of each dimension of a tensor after dimensions of size one are added to it."""
    found = [(call.ids(tensor).get(dim), tensor.size(dim)) for dim in range(tensor.dim())]
    for dim in sorted(added):
        found.insert(dim, (None, 1))
    return found


def distance(call: Call) -> Sequence[ChannelIds]:
    """``cdist`` and ``pdist``: distances between (..., n, k) and (..., m, k), in a cut model over the kept of the k."""
    first, second = call.inputs[0], call.inputs[1 if len(call.inputs) > 1 else 0]
    ours, theirs = call.ids(first), call.ids(second)
    rank, out = first.dim(), call.outputs[0]
    inner = ours.get(rank - 1), theirs.get(second.dim() - 1)
    _tie_inner(call, inner)
    result: ChannelIds = {}
    if call.name == "_pdist_forward":
        call.ledger.freeze_all([{0: ours[0]}] if 0 in ours else [], f"{call.where} lists pairs of channels")
    else:
        for dim in range(out.dim() - 2):
            both = [_ids_and_length(call, t, dim - out.dim() + t.dim()) for t in (first, second)]
            merged = merge_operands(call, both)
            result.update({} if merged is None else {dim: merged})
        result.update({out.dim() - 2: ours[rank - 2]} if rank - 2 in ours else {})
        result.update({out.dim() - 1: theirs[second.dim() - 2]} if second.dim() - 2 in theirs else {})
    return call.mix([result]) if inner[0] is not None and inner[1] is not None else [result]


def whole_product(call: Call) -> Sequence[ChannelIds]:
    """Count a product that no channel is followed through, and freeze the channels of its factors."""
    macs = float(_WHOLE_PRODUCTS[call.name](*call.args))
    call.ledger.operations.append(CountedOperation(call.module, call.name, macs, ()))
    return freeze_inputs(call)


_WHOLE_PRODUCTS: Mapping[str, Callable[..., int]] = {
    # One direction of one layer: (steps, batch, features), a matrix for the input, another for the hidden state.
    "mkldnn_rnn_layer": lambda x, w, u, *_: x.size(0) * x.size(1) * (w.numel() + u.numel()),
    "_cudnn_rnn": lambda x, weights, *_: x.size(0) * x.size(1) * sum(w.numel() for w in weights if w.dim() == 2),
}
WHOLE_PRODUCT_KINDS = tuple(_WHOLE_PRODUCTS)
PRODUCT_KINDS = (
    "mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "convolution", "conv_tbc", "deform_conv2d",
    "_trilinear",
)  # fmt: skip
"""Operations that are counted even if no channel reaches them."""


def _multiply(call: Call, left: torch.Tensor, right: torch.Tensor, rows: int) -> ChannelIds:
    """Connect (..., n, k) @ (..., k, m), where n is dimension ``rows`` of the left factor, and count the product."""
    left_ids, right_ids = call.ids(left), call.ids(right)
    # A batched product of two activations is taken for attention. The channels that it sums over count as read,
    # although no layer reads them.
    if rows and not call.ledger.is_own(left) and not call.ledger.is_own(right):
        call.ledger.note_attention(call.module, (*left_ids.values(), *right_ids.values()))
        call.ledger.contracted.extend(right_ids[dim] for dim in (rows,) if dim in right_ids)
    leaving = {dim: ids[dim] for dim, ids in ((rows, left_ids), (rows + 1, right_ids)) if dim in ids}
    inner = right_ids.get(rows, left_ids.get(rows + 1))
    # Of two activations, the right one is treated as the weight.
    if call.ledger.is_own(right) or not call.ledger.is_own(left):
        connect_input(call, left_ids.get(rows + 1), right_ids.get(rows))
        produced = leaving.get(rows + 1)
    else:
        # The weight is the left factor: ``W @ x``.
        connect_input(call, right_ids.get(rows), left_ids.get(rows + 1))
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
    """Connect the inputs of fused attention, softmax(q k^T) v over (..., heads, tokens, head dimension).

    It counts as two matrix products. The head dimensions of q and k are tied, that of v passes through, and the heads
    and other leading dimensions of all three are tied.
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
        operands = [_ids_and_length(call, t, dim - rank + t.dim()) for t in tensors]
        merged = merge_operands(call, operands)
        # If only the bias has channels here, such as a bias for every head, they are frozen now, and end here: where
        # heads and their dimensions are merged again, they would freeze those too.
        if merged is not None and all(found is not None for found, length in operands if length > 1):
            result[dim] = merged
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
    """Return the ids and length along a dimension, which may be missing, of size one, or broadcast."""
    if dim < 0 or tensor.size(dim) == 1 or tensor.stride(dim) == 0:
        return None, 1
    return call.ids(tensor).get(dim), tensor.size(dim)


def _tie_inner(call: Call, inner: Sequence[IntArray | None]) -> None:
    """Tie the two dimensions that a product sums over."""
    first, second = inner
    if first is not None and second is not None:
        call.ledger.contracted.append(call.ledger.tie(first, second))
        return
    for ids in inner:
        if ids is not None:
            call.ledger.freeze(ids, f"{call.where} multiplies them with a tensor that carries no channels")


class KeptChannelsMode(TorchDispatchMode):
    """A mode in which one run of a full model computes norms, means and softmaxes over the kept channels only.

    The removed positions of the results are zero.

    Args:
        graph: The channel graph of the model that runs.
        kept: The kept channels by axis name; an axis that is not named keeps all of them.
    """

    def __init__(self, graph: ChannelGraph, kept: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self._masks = graph.kept_masks(kept)
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
        if mixing is None or not self._is_expected(mixing, name, args, kwargs):
            return func(*args, **kwargs)
        read = self._narrowed(mixing.read)
        if not read:
            return func(*args, **kwargs)
        args, kwargs = _gather_kept(name, args, kwargs, read)
        return _scatter_kept(func(*args, **kwargs), self._narrowed(mixing.written))

    def _narrowed(self, dims: Sequence[ChannelDim]) -> list[tuple[ChannelDim, IntArray]]:
        """Dimensions that lose channels, with the positions that remain."""
        kept = [(channels, self._kept(channels)) for channels in dims]
        return [(channels, positions) for channels, positions in kept if len(positions) < len(channels.axis)]

    def _kept(self, channels: ChannelDim) -> IntArray:
        """Return the positions that remain; calls on the same channels share them."""
        key = id(channels.axis), id(channels.channel)
        if key not in self._positions:
            self._positions[key] = channels.kept(self._masks)
        return self._positions[key]

    def _is_expected(self, mixing: MixingCall, name: str, args: Any, kwargs: Any) -> bool:
        """Return whether a call is the one that was traced; if not, the model branches on data, and no later one is."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # Dimensions that lose nothing may have another size: images of another size have other numbers of tokens.
        same = mixing.kind == name and all(
            channels.tensor < len(tensors)
            and channels.dim < tensors[channels.tensor].dim()
            and tensors[channels.tensor].size(channels.dim) == len(channels.axis)
            for channels, _ in self._narrowed(mixing.read)
        )
        if not same:
            self._expected = {}
        return same


def compute_over_kept_channels_(
    model: nn.Module, graph: ChannelGraph, kept: Mapping[str, tuple[int, ...]]
) -> nn.Module:
    """Make a full model compute norms, means and softmaxes over the kept channels whenever it runs, and return it."""
    return add_run_context_(model, lambda _: KeptChannelsMode(graph, kept)) if graph.mixings else model


def _gather_kept(
    name: str, args: Any, kwargs: Any, read: Sequence[tuple[ChannelDim, IntArray]]
) -> tuple[tuple[Any, ...], Any]:
    leaves, spec = tree_flatten((args, kwargs))
    places = [number for number, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for channels, positions in read:
        tensor = leaves[places[channels.tensor]]
        leaves[places[channels.tensor]] = tensor.index_select(
            channels.dim, torch.from_numpy(positions).to(tensor.device)
        )
    args, kwargs = tree_unflatten(leaves, spec)
    args = list(args)
    # Further arguments count channels: the normalized shape; C (argument 4) and the groups (argument 6) of a group
    # norm.
    if name in {"native_layer_norm", "_fused_rms_norm"}:
        args[1] = list(args[0].shape[-len(args[1]) :])
    elif name == "native_group_norm":
        positions = next(p for channels, p in read if channels.tensor == 0 and channels.dim == 1)
        args[6] = len({int(p) // (args[4] // args[6]) for p in positions})
        args[4] = len(positions)
    return tuple(args), kwargs


def _scatter_kept(out: Any, written: Sequence[tuple[ChannelDim, IntArray]]) -> Any:
    leaves, spec = tree_flatten(out)
    places = [number for number, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for channels, positions in written:
        tensor = leaves[places[channels.tensor]]
        shape = list(tensor.shape)
        shape[channels.dim] = len(channels.axis)
        full = tensor.new_zeros(shape)
        leaves[places[channels.tensor]] = full.index_copy_(
            channels.dim, torch.from_numpy(positions).to(tensor.device), tensor
        )
    return tree_unflatten(leaves, spec)
