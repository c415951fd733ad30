"""What each ATen operation does to channel ids.

Movement needs no rule: the same operation is executed on the ids. Operations that compute need a short one each. An
operation without a rule freezes every channel it meets, with the reason; so a model is at worst less prunable.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.graph._channels import IntArray, Role
from secateur.graph._ledger import ChannelIds, CountedOperation, Ledger


@dataclass(frozen=True, eq=False)
class Call:
    """One recorded ATen call.

    Attributes:
        ledger: Where conclusions go.
        operator: The ATen overload.
        name: Its base name without a trailing in-place underscore.
        module: Qualified name of the module whose forward made the call.
        args: Positional arguments.
        kwargs: Keyword arguments.
        inputs: Tensors among the arguments, in order.
        outputs: Tensors returned.
    """

    ledger: Ledger
    operator: Any
    name: str
    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]

    @property
    def where(self) -> str:
        """For a human."""
        return f"`{self.name}` in {self.module or 'the model itself'}"

    def ids(self, tensor: torch.Tensor) -> ChannelIds:
        """Channel ids of an argument."""
        return self.ledger.ids_of(tensor)

    def argument(self, position: int, default: Any = None) -> Any:
        """A positional argument that may have been left out."""
        return self.args[position] if len(self.args) > position else default


Rule = Callable[[Call], Sequence[ChannelIds]]


def apply_rule(call: Call) -> None:
    """Carry the ids of the inputs over to the outputs."""
    if not any(call.ids(tensor) for tensor in call.inputs) and call.name not in _ALWAYS_COUNTED:
        return
    rule = _rule_for(call)
    results = [ids if ids else {} for ids in rule(call)]
    for tensor, ids in zip(call.outputs, results, strict=False):
        call.ledger.mark(tensor, ids)
        for vector in ids.values():
            call.ledger.touched.append((call.module, vector))


def _rule_for(call: Call) -> Rule:
    rule = RULES.get(call.name)
    if rule is not None:
        return rule
    if torch.Tag.pointwise in call.operator.tags:
        return pointwise
    return unknown


def unknown(call: Call) -> Sequence[ChannelIds]:
    """No rule: everything that comes in stays whole."""
    call.ledger.freeze_all([call.ids(t) for t in call.inputs], f"{call.where} has no channel rule")
    return [{} for _ in call.outputs]


def created(call: Call) -> Sequence[ChannelIds]:
    """A new tensor with the shape of another (``zeros_like``): its sizes follow that tensor's."""
    source = call.inputs[0]
    return [call.ids(source) if out.shape == source.shape else {} for out in call.outputs]


# -- movement: execute the same operation on the ids -----------------------------------------------------------------


def movement(call: Call) -> Sequence[ChannelIds]:
    """Run the operation on the ids themselves."""
    source = call.inputs[0]
    for other in call.inputs[1:]:
        call.ledger.freeze_all([call.ids(other)], f"channels are used as indices by {call.where}")
    results: list[ChannelIds] = [{} for _ in call.outputs]
    for dim, vector in call.ids(source).items():
        moved = _execute_on_ids(call, source, dim, vector)
        for result, ids in zip(results, moved, strict=True):
            _place(call, result, ids, vector)
    return results


def _execute_on_ids(call: Call, source: torch.Tensor, dim: int, vector: IntArray) -> list[torch.Tensor]:
    shape = [1] * source.dim()
    shape[dim] = len(vector)
    probe = torch.from_numpy(vector).view(shape).expand(source.shape)
    if call.name in _FLOAT_ONLY:
        probe = probe.double()
    name = "reshape" if call.name in {"view", "_unsafe_view", "_reshape_alias"} else None
    if name:
        return [probe.reshape(call.args[1])]
    args, kwargs = tree_map_only(torch.Tensor, lambda t: probe if t is source else t, (call.args, call.kwargs))
    kwargs = {key: value for key, value in kwargs.items() if key not in {"dtype", "device", "layout", "memory_format"}}
    out = call.operator(*args, **kwargs)
    return [t.long() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]


def _place(call: Call, result: ChannelIds, ids: torch.Tensor, vector: IntArray) -> None:
    """Find the dimension along which moved ids vary; where they vary along several, let the longest stay free."""
    dims = [d for d in range(ids.dim()) if _varies(ids, d)]
    for d in set(range(ids.dim())) - set(dims):
        ids = ids.narrow(d, 0, min(1, ids.size(d)))
    if not dims:
        if ids.numel():
            call.ledger.freeze(ids.reshape(-1)[:1].numpy(), f"{call.where} picks single channels")
        return
    free = max(dims, key=lambda d: (ids.size(d), d))
    rest = [d for d in range(ids.dim()) if d != free]
    matrix = ids.permute(*rest, free).reshape(-1, ids.size(free))
    flat = matrix.numpy()
    if len(dims) > 1:
        flat = np.unique(flat, axis=0)
        picked = call.ledger.tie_rows(flat)
    else:
        picked = np.ascontiguousarray(flat[0])
    if free in result:
        call.ledger.freeze(picked, f"{call.where} merges two kinds of channels into one dimension")
        return
    result[free] = picked


def _varies(ids: torch.Tensor, dim: int) -> bool:
    if ids.size(dim) <= 1 or ids.stride(dim) == 0:
        return False
    first = ids.narrow(dim, 0, 1)
    return not bool((ids == first).all())


def picking(call: Call) -> Sequence[ChannelIds]:
    """``select`` and ``unbind``: fine along other dimensions, along channels positions are fixed."""
    source = call.inputs[0]
    dim = call.argument(1, call.kwargs.get("dim", 0)) % source.dim()
    if dim in call.ids(source):
        call.ledger.freeze(call.ids(source)[dim], f"{call.where} picks single channels")
    rest = {d: ids for d, ids in call.ids(source).items() if d != dim}
    return [{d - (d > dim): ids for d, ids in rest.items()} for _ in call.outputs]


def index(call: Call) -> Sequence[ChannelIds]:
    """Indexing with tensors: fine along other dimensions, frozen along channels."""
    source = call.inputs[0]
    results = movement(call)
    kept: list[ChannelIds] = []
    for ids in results:
        same = {d: v for d, v in ids.items() if any(np.array_equal(v, old) for old in call.ids(source).values())}
        kept.append(same)
    if any(len(same) != len(call.ids(source)) for same in kept):
        call.ledger.freeze_all([call.ids(source)], f"{call.where} picks channels by a fixed index")
        return [{} for _ in call.outputs]
    return kept


def pad(call: Call) -> Sequence[ChannelIds]:
    """Constant padding: new channels that no parameter produces (option-A shortcuts)."""
    source, amounts = call.inputs[0], call.args[1]
    result: ChannelIds = {}
    for dim, vector in call.ids(source).items():
        place = 2 * (source.dim() - 1 - dim)
        low, high = (amounts[place], amounts[place + 1]) if place + 1 < len(amounts) else (0, 0)
        if low < 0 or high < 0:
            call.ledger.freeze(vector, f"{call.where} crops channels")
            continue
        parts = [call.ledger.new(low), vector, call.ledger.new(high)]
        result[dim] = np.concatenate(parts) if low or high else vector
    return [result]


def concatenate(call: Call) -> Sequence[ChannelIds]:
    """``cat`` puts ids side by side; other dimensions must agree."""
    tensors: Sequence[torch.Tensor] = call.args[0]
    rank = tensors[0].dim()
    dim = call.argument(1, call.kwargs.get("dim", 0)) % rank
    result: ChannelIds = {}
    if any(dim in call.ids(t) for t in tensors):
        parts = [call.ids(t).get(dim) for t in tensors]
        result[dim] = np.concatenate(
            [part if part is not None else _pinned(call, t.size(dim)) for part, t in zip(parts, tensors, strict=True)]
        )
    for other in range(rank):
        if other != dim:
            merged = _merge(call, [(call.ids(t).get(other), t.size(other)) for t in tensors])
            if merged is not None:
                result[other] = merged
    return [result]


def _pinned(call: Call, size: int) -> IntArray:
    ids = call.ledger.new(size)
    call.ledger.freeze(ids, f"{call.where} adds channels that no parameter produces")
    return ids


# -- elementwise -----------------------------------------------------------------------------------------------------


def _merge(call: Call, operands: Sequence[tuple[IntArray | None, int]]) -> IntArray | None:
    """Ids of one dimension after an elementwise operation of several operands (ids or None, length)."""
    carried = [ids for ids, _ in operands if ids is not None]
    if not carried:
        return None
    for ids in carried[1:]:
        call.ledger.tie(carried[0], ids)
    if any(ids is None and length > 1 for ids, length in operands):
        call.ledger.freeze(carried[0], f"{call.where} meets a tensor that does not follow the channels")
    return carried[0]


def pointwise(call: Call) -> Sequence[ChannelIds]:
    """Elementwise with broadcasting: channels at the same position belong together."""
    out = call.outputs[0]
    rank = out.dim()
    result: ChannelIds = {}
    aligned = [(call.ids(t), t, rank - t.dim()) for t in call.inputs]
    dims = sorted({dim + shift for ids, _, shift in aligned for dim in ids})
    for dim in dims:
        operands: list[tuple[IntArray | None, int]] = []
        for ids, tensor, shift in aligned:
            own = dim - shift
            if own < 0:
                continue
            # A stride of zero is a broadcast scalar in disguise, not a tensor of that size.
            length = 1 if tensor.stride(own) == 0 else tensor.size(own)
            operands.append((ids.get(own), length))
        merged = _merge(call, operands)
        if merged is not None:
            result[dim] = merged
    return [result for _ in call.outputs]


def overwrite(call: Call) -> Sequence[ChannelIds]:
    """``copy_``: the destination takes the ids of the source; into a view, nothing may move."""
    target, source = call.inputs[0], call.inputs[1] if len(call.inputs) > 1 else call.inputs[0]
    shift = target.dim() - source.dim()
    if target._base is not None:
        call.ledger.freeze_all([call.ids(source), call.ids(target)], f"{call.where} writes into a part of a tensor")
        return [{} for _ in call.outputs]
    return [{dim + shift: ids for dim, ids in call.ids(source).items()}]


def per_channel(call: Call) -> Sequence[ChannelIds]:
    """Pooling, resizing, dropout: each channel on its own, channel dimensions unchanged."""
    source, out = call.inputs[0], call.outputs[0]
    ids = call.ids(source)
    if out.dim() == source.dim() and all(out.size(d) == source.size(d) for d in ids) and max(ids, default=0) <= 1:
        return [ids for _ in call.outputs]
    return unknown(call)


def reduction(call: Call) -> Sequence[ChannelIds]:
    """Sums and means over other dimensions; over channels they are frozen (the value would change)."""
    source = call.inputs[0]
    named = call.argument(1, call.kwargs.get("dim"))
    named = [named] if isinstance(named, int) else named
    dims = {d % source.dim() for d in named} if named else set(range(source.dim()))
    keepdim = call.outputs[0].dim() == source.dim()
    result: ChannelIds = {}
    for dim, ids in call.ids(source).items():
        if dim in dims:
            call.ledger.freeze(ids, f"{call.where} mixes all channels")
            continue
        result[dim if keepdim else dim - sum(d < dim for d in dims)] = ids
    return [result for _ in call.outputs]


def normalised(call: Call) -> Sequence[ChannelIds]:
    """Softmax, cumsum and the like along one dimension: frozen if that is the channel dimension."""
    source = call.inputs[0]
    dim = call.args[1] % source.dim()
    ids = dict(call.ids(source))
    if dim in ids:
        call.ledger.freeze(ids.pop(dim), f"{call.where} normalises over channels")
    return [ids for _ in call.outputs]


# -- layers ----------------------------------------------------------------------------------------------------------


def batch_norm(call: Call) -> Sequence[ChannelIds]:
    """One scale, shift, mean and variance per channel."""
    source = call.inputs[0]
    ids = dict(call.ids(source))
    vectors = [t for t in call.args[1:5] if isinstance(t, torch.Tensor)]
    merged = _merge(call, [(ids.get(1), source.size(1)), *((call.ids(t).get(0), t.size(0)) for t in vectors)])
    if merged is not None:
        ids[1] = merged
    return [ids, *({} for _ in call.outputs[1:])]


def convolution(call: Call) -> Sequence[ChannelIds]:
    """Convolution of any rank: ties its input channels to the weight's input dimension, gives the output dimension."""
    source, weight, bias = call.args[0], call.args[1], call.args[2]
    transposed, groups = call.args[6], call.args[8]
    out = call.outputs[0]
    for dim, ids in call.ids(source).items():
        if dim != 1:
            call.ledger.freeze(ids, f"{call.where} slides over channels")
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    produced, consumed = call.ids(weight).get(out_dim), call.ids(weight).get(in_dim)
    incoming = call.ids(source).get(1)
    factor = float(math.prod((source if transposed else out).shape[2:]) * math.prod(weight.shape[2:]))
    if groups == 1:
        _connect(call, incoming, consumed)
    elif transposed:
        reason = f"{call.where}: grouped transposed convolution"
        call.ledger.freeze_all([call.ids(source), call.ids(weight)], reason)
        _count(call, factor, weight, (None, None), out_dim)
        return [{}]
    else:
        produced = _grouped(call, incoming, weight, groups)
    _count(call, factor, weight, (produced, consumed), out_dim)
    if bias is not None:
        _merge(call, [(produced, out.size(1)), (call.ids(bias).get(0), bias.size(0))])
        call.ledger.roles.append((call.ids(bias).get(0, np.zeros(0, np.int64)), Role.OUTPUT))
    return [{} if produced is None else {1: produced}]


def _connect(call: Call, incoming: IntArray | None, consumed: IntArray | None) -> None:
    """The channels that arrive are those the weight's input dimension expects."""
    if consumed is not None:
        call.ledger.roles.append((consumed, Role.INPUT))
    if incoming is not None and consumed is not None:
        call.ledger.tie(incoming, consumed)
    elif consumed is not None:
        call.ledger.freeze(consumed, f"{call.where} reads something that is not a channel of this model")
    elif incoming is not None:
        call.ledger.freeze(incoming, f"{call.where} uses a weight without channels of its own")


def _count(
    call: Call, factor: float, weight: torch.Tensor, vectors: tuple[IntArray | None, IntArray | None], out_dim: int
) -> None:
    """Count a convolution: factor x output channels x channels the weight reads."""
    produced, consumed = vectors
    if produced is not None and call.args[8] != weight.size(0):
        # A depthwise convolution passes its channels through; every other one produces new ones.
        call.ledger.roles.append((call.ids(weight).get(out_dim, produced), Role.OUTPUT))
    extents = (
        produced if produced is not None else weight.size(out_dim),
        consumed if consumed is not None else weight.size(1 - out_dim),
    )
    call.ledger.operations.append(CountedOperation(call.module, call.name, factor, extents))


def _grouped(call: Call, incoming: IntArray | None, weight: torch.Tensor, groups: int) -> IntArray | None:
    """Grouped convolution: remove whole groups where there are many, else the same positions of every group.

    With G groups of c channels, whole groups leave G units to choose from, equal positions leave c. The finer one is
    taken; depthwise (c = 1) is the first case.
    """
    produced, consumed = call.ids(weight).get(0), call.ids(weight).get(1)
    if incoming is None or produced is None:
        call.ledger.freeze_all([call.ids(weight)], f"{call.where} reads something that is not a channel of this model")
        return produced
    entering, leaving = incoming.reshape(groups, -1), produced.reshape(groups, -1)
    if groups >= entering.shape[1]:
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
    bias = call.args[0] if call.name == "addmm" else None
    left, right = call.args[-2:] if call.name == "mm" else call.args[1:3]
    left_ids, right_ids = call.ids(left), call.ids(right)
    _connect(call, left_ids.get(1), right_ids.get(0))
    result: ChannelIds = {}
    if 0 in left_ids:
        result[0] = left_ids[0]
    produced = right_ids.get(1)
    if produced is not None:
        result[1] = produced
        call.ledger.roles.append((produced, Role.OUTPUT))
    if bias is not None and produced is not None:
        _merge(call, [(produced, right.size(1)), (call.ids(bias).get(bias.dim() - 1), bias.size(-1))])
        call.ledger.roles.append((call.ids(bias).get(bias.dim() - 1, np.zeros(0, np.int64)), Role.OUTPUT))
    inner = right_ids.get(0, left_ids.get(1))
    extents = (
        left_ids.get(0, left.size(0)),
        right.size(0) if inner is None else inner,
        right.size(1) if produced is None else produced,
    )
    call.ledger.operations.append(CountedOperation(call.module, call.name, 1.0, extents))
    return [result]


def batched_product(call: Call) -> Sequence[ChannelIds]:
    """``bmm``: (batch, n, k) @ (batch, k, m), as `matrix_product` for every item of the batch."""
    left, right = call.args[0], call.args[1]
    left_ids, right_ids = call.ids(left), call.ids(right)
    for ids in (left_ids.get(0), right_ids.get(0)):
        if ids is not None:
            call.ledger.freeze(ids, f"{call.where} has channels in its batch dimension")
    if 2 in left_ids or 1 in right_ids:
        _connect(call, left_ids.get(2), right_ids.get(1))
    result = {dim: ids[dim] for dim, ids in ((1, left_ids), (2, right_ids)) if dim in ids}
    if 2 in right_ids:
        call.ledger.roles.append((right_ids[2], Role.OUTPUT))
    inner = left_ids.get(2, right_ids.get(1))
    extents = (
        left_ids.get(1, left.size(1)),
        left.size(2) if inner is None else inner,
        right_ids.get(2, right.size(2)),
    )
    call.ledger.operations.append(CountedOperation(call.module, call.name, float(left.size(0)), extents))
    return [result]


def attention(call: Call) -> Sequence[ChannelIds]:
    """Fused attention: counted (two matrix products), and frozen."""
    query, key, value = call.inputs[:3]
    macs = float(query.shape[:-1].numel() * key.size(-2) * (query.size(-1) + value.size(-1)))
    call.ledger.operations.append(CountedOperation(call.module, call.name, macs, ()))
    return unknown(call)


_ATTENTION = [
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
]
_ALWAYS_COUNTED = frozenset({"bmm", *_ATTENTION})
_FLOAT_ONLY = frozenset({"im2col", "reflection_pad1d", "reflection_pad2d", "replication_pad2d", "pixel_shuffle"})

_MOVEMENT = [
    "view",
    "_unsafe_view",
    "_reshape_alias",
    "reshape",
    "permute",
    "transpose",
    "t",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "split",
    "split_with_sizes",
    "chunk",
    "clone",
    "contiguous",
    "alias",
    "detach",
    "_to_copy",
    "flip",
    "repeat",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "native_channel_shuffle",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad2d",
    "im2col",
    "unfold",
    "narrow",
    "movedim",
    "swapaxes",
    "lift_fresh",
    "lift_fresh_copy",
    "diagonal",
    "tile",
    "repeat_interleave",
]
_PER_CHANNEL = [
    "max_pool1d",
    "max_pool2d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "upsample_nearest3d",
    "upsample_trilinear3d",
    "native_dropout",
    "bernoulli",
    "mkldnn_max_pool2d",
]
_REDUCTION = [
    "mean",
    "sum",
    "amax",
    "amin",
    "var",
    "var_mean",
    "std",
    "std_mean",
    "linalg_vector_norm",
    "norm",
    "prod",
    "logsumexp",
    "any",
    "all",
]
_NORMALISED = ["_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod"]
_BATCH_NORM = [
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm",
    "_native_batch_norm_legit_functional",
    "batch_norm",
]
_CREATED = ["empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"]
# Elementwise operations that ATen does not tag as such in every version.
_ELEMENTWISE = [
    "where",
    "addcmul",
    "addcdiv",
    "lerp",
    "clamp",
    "hardtanh",
    "hardswish",
    "hardsigmoid",
    "silu",
    "mish",
    "gelu",
    "elu",
    "celu",
    "selu",
    "leaky_relu",
    "relu6",
    "softplus",
    "threshold",
    "prelu",
    "_prelu_kernel",
    "masked_fill",
    "dropout",
    "log_sigmoid",
    "hardshrink",
    "softshrink",
    "rrelu_with_noise",
]

RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVEMENT, movement),
    **dict.fromkeys(_PER_CHANNEL, per_channel),
    **dict.fromkeys(_REDUCTION, reduction),
    **dict.fromkeys(_NORMALISED, normalised),
    **dict.fromkeys(_BATCH_NORM, batch_norm),
    **dict.fromkeys(_CREATED, created),
    **dict.fromkeys(_ELEMENTWISE, pointwise),
    "cat": concatenate,
    "constant_pad_nd": pad,
    "copy": overwrite,
    "convolution": convolution,
    "mm": matrix_product,
    "addmm": matrix_product,
    "bmm": batched_product,
    **dict.fromkeys(_ATTENTION, attention),
    "select": picking,
    "unbind": picking,
    "index": index,
    "index_select": index,
    "gather": index,
}
