"""What each ATen operation does to channel ids.

Movement needs no rule: the same operation is executed on the ids. Operations that compute need a short one each. An
operation without a rule freezes every channel it meets, with the reason; so a model is at worst less prunable.
"""

from collections.abc import Mapping, Sequence

from secateur.graph import _layers as layers
from secateur.graph import _movement as moves
from secateur.graph._call import ATTENTION_KINDS, Call, Rule, merge, unknown
from secateur.graph._channels import IntArray
from secateur.graph._flow import is_pointwise
from secateur.graph._ledger import ChannelIds


def apply_rule(call: Call, further: Mapping[str, Rule]) -> None:
    """Carry the ids of the inputs over to the outputs, by the user's further rules or the built-in ones."""
    if not any(call.ids(tensor) for tensor in call.inputs) and call.name not in _ALWAYS_COUNTED:
        return
    rule = further.get(call.full_name) or further.get(call.name) or _rule_for(call)
    results = [ids if ids else {} for ids in rule(call)]
    own = all(map(call.ledger.is_own, call.inputs))
    for tensor, ids in zip(call.outputs, results, strict=False):
        call.ledger.mark(tensor, ids, own=own)
        for vector in ids.values():
            call.ledger.touched.append((call.module, vector))


def _rule_for(call: Call) -> Rule:
    rule = RULES.get(call.name)
    if rule is not None:
        return rule
    if is_pointwise(call.operator) and call.outputs:  # `equal` is said to be one, and gives a bool.
        return pointwise
    return unknown


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
        merged = merge(call, operands)
        if merged is not None:
            result[dim] = merged
    return [result for _ in call.outputs]


def overwrite(call: Call) -> Sequence[ChannelIds]:
    """``copy_``: the destination takes the ids of the source; into a view, nothing may move."""
    target, source = call.inputs[0], call.inputs[-1]
    shift = target.dim() - source.dim()
    if target._base is not None:
        call.ledger.freeze_all([call.ids(source), call.ids(target)], f"{call.where} writes into a part of a tensor")
        return [{} for _ in call.outputs]
    return [{dim + shift: ids for dim, ids in call.ids(source).items()}]


def per_channel(call: Call) -> Sequence[ChannelIds]:
    """Pooling, resizing, dropout: each channel on its own, channel dimensions unchanged."""
    source, out = call.inputs[0], call.outputs[0]
    if out.dim() != source.dim():
        return unknown(call)
    own = {dim: ids for dim, ids in call.ids(source).items() if dim <= 1 and out.size(dim) == source.size(dim)}
    others = {dim: ids for dim, ids in call.ids(source).items() if dim not in own}
    call.ledger.freeze_all([others], f"{call.where} slides over channels")
    return [own for _ in call.outputs]


def reduction(call: Call) -> Sequence[ChannelIds]:
    """Sums and means; over channels, a cut model takes them over the kept ones."""
    source = call.inputs[0]
    dims = call.dims() or set(range(source.dim()))
    keepdim = call.outputs[0].dim() == source.dim()
    over = {dim: ids for dim, ids in call.ids(source).items() if dim in dims}
    result = {
        dim if keepdim else dim - sum(d < dim for d in dims): ids
        for dim, ids in call.ids(source).items()
        if dim not in dims
    }
    results = [result for _ in call.outputs]
    if over and call.name in {"max", "min"}:
        call.ledger.freeze_all([over], f"{call.where} looks for the position of a channel")
    elif over:
        return call.mix(results)
    return results


def normalised(call: Call) -> Sequence[ChannelIds]:
    """Softmax, cumsum and the like along one dimension; if that carries channels, over the kept ones."""
    source = call.inputs[0]
    ids = call.ids(source)
    results = [ids for _ in call.outputs]
    return call.mix(results) if call.args[1] % source.dim() in ids else results


# fmt: off
_MOVEMENT = [
    "view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze",
    "expand", "slice", "split", "split_with_sizes", "chunk", "clone", "contiguous", "alias", "detach", "_to_copy",
    "flip", "repeat", "pixel_shuffle", "pixel_unshuffle", "reflection_pad1d", "reflection_pad2d",
    "replication_pad2d", "narrow", "movedim", "swapaxes", "lift_fresh", "lift_fresh_copy", "tile",
    "repeat_interleave",
]
_PER_CHANNEL = [
    "max_pool1d", "max_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_nearest3d", "upsample_trilinear3d",
    "native_dropout", "mkldnn_max_pool2d",
]
_REDUCTION = [
    "mean", "sum", "amax", "amin", "var", "var_mean", "std", "std_mean", "linalg_vector_norm", "norm", "prod",
    "logsumexp", "any", "all", "max", "min",
]
_NORMALISED = [
    "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod",
]
_BATCH_NORM = [
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_native_batch_norm_legit_functional", "batch_norm",
]
_CREATED = [
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
]
_FILLED = [
    "zero", "fill", "uniform", "normal", "bernoulli",
]
_FRESH = [
    "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided",
]
# Elementwise operations that ATen does not tag as such in every version.
_ELEMENTWISE = [
    "where", "addcmul", "addcdiv", "lerp", "clamp", "hardtanh", "hardswish", "hardsigmoid", "silu", "mish", "gelu",
    "elu", "celu", "selu", "leaky_relu", "relu6", "softplus", "threshold", "prelu", "_prelu_kernel", "masked_fill",
    "dropout", "log_sigmoid", "hardshrink", "softshrink", "rrelu_with_noise",
]
# fmt: on
_ALWAYS_COUNTED = frozenset({"mm", "addmm", "bmm", "convolution", *layers.WHOLE_PRODUCT_KINDS, *ATTENTION_KINDS})

RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVEMENT, moves.movement),
    **dict.fromkeys(_PER_CHANNEL, per_channel),
    **dict.fromkeys(_REDUCTION, reduction),
    **dict.fromkeys(_NORMALISED, normalised),
    **dict.fromkeys(_BATCH_NORM, layers.batch_norm),
    **dict.fromkeys(_CREATED, moves.created),
    **dict.fromkeys(_FRESH, moves.fresh),
    **dict.fromkeys(_FILLED, moves.filled),
    **dict.fromkeys(_ELEMENTWISE, pointwise),
    **dict.fromkeys(ATTENTION_KINDS, layers.attention),
    **dict.fromkeys(("roll", "unfold", "diagonal"), moves.elsewhere),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), moves.shuffled),
    "as_strided": moves.restrided,
    **dict.fromkeys(("select", "unbind"), moves.picking),
    **dict.fromkeys(("index", "index_select", "gather"), moves.index),
    "im2col": moves.unfolded,
    "cat": moves.concatenate,
    "stack": moves.stacked,
    "constant_pad_nd": moves.pad,
    "copy": overwrite,
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layers.layer_norm),
    "native_group_norm": layers.group_norm,
    "convolution": layers.convolution,
    "mm": layers.matrix_product,
    "addmm": layers.matrix_product,
    "bmm": layers.batched_product,
    **dict.fromkeys(layers.WHOLE_PRODUCT_KINDS, layers.whole_product),
}
