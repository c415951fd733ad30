"""The channel rule of every ATen operation, and the functions from which users build their own rules (docs/rules.md).

A rule is a function from a `Call` to the channel ids of each output tensor, a mapping from dimension to the ids of its
positions. Users pass rules by operation name: ``trace(model, example, rules={"my_lib::my_op": pointwise})``.
Operations that only move channels need no rule of their own, because they are executed on the ids themselves. An
operation without a rule freezes every channel it meets and records the reason, so a model is at worst less prunable.
"""

import re
from collections.abc import Mapping, Sequence

import torch

from secateur._arrays import IntArray
from secateur.graph._ledger import (
    ATTENTION_KINDS,
    Call,
    ChannelIds,
    CountedOperation,
    Rule,
    UncountedOperation,
    freeze_inputs,
    merge_operands,
)
from secateur.graph.blocks import is_pointwise
from secateur.graph.channel_rules import layers
from secateur.graph.channel_rules import movement as moves
from secateur.graph.channel_rules.layers import convolution, group_norm, layer_norm, matrix_product
from secateur.graph.channel_rules.movement import concatenate, move_channels
from secateur.graph.channel_rules.recurrent import RECURRENT_RULES


def apply_rule(call: Call, further: Mapping[str, Rule]) -> None:
    """Give the outputs of a call their channel ids, by the user's ``further`` rules or else the built-in ones."""
    # Where no channels enter, a rule has nothing to do but to count the products.
    if not any(call.ids(tensor) for tensor in call.inputs) and call.name not in _ALWAYS_COUNTED:
        return
    rule = further.get(call.full_name) or further.get(call.name) or _rule_for(call)
    counted = len(call.ledger.operations)
    # A rule of a user may return None for an output without channels.
    results = [ids if ids else {} for ids in rule(call)]
    if len(call.ledger.operations) == counted:
        _note_uncounted(call)
    own = all(map(call.ledger.is_own, call.inputs))
    for tensor, ids in zip(call.outputs, results, strict=False):
        if tensor is call.kwargs.get("out"):
            _tie_given_result(call, tensor, ids)
        call.ledger.mark(tensor, ids, own=own)
        for vector in ids.values():
            call.ledger.touched.append((call.module, vector))


def _tie_given_result(call: Call, given: torch.Tensor, ids: ChannelIds) -> None:
    """Tie the channels of a tensor that was made for the result (``out=``) to those that are written into it."""
    for dim in range(given.dim()):
        merge_operands(call, [(call.ids(given).get(dim), given.size(dim)), (ids.get(dim), given.size(dim))])


def _note_uncounted(call: Call) -> None:
    """Record a call that combines parameters with an activation in a way of which the MACs are not known."""
    known = is_pointwise(call.operator) or (call.operator.namespace == "aten" and call.name in _WITHOUT_PRODUCTS)
    if not known and not all(map(call.ledger.is_own, call.inputs)):
        size = sum(tensor.numel() for tensor in call.inputs if call.ledger.is_learned(tensor))
        if size:
            call.ledger.uncounted.append(UncountedOperation(call.module, call.full_name, size))


def _rule_for(call: Call) -> Rule:
    # The operation of another library may have the name of one of ATen, and do something else.
    rule = RULES.get(call.name if call.operator.namespace == "aten" else call.full_name)
    if rule is not None:
        return rule
    if is_pointwise(call.operator) and call.outputs:  # `equal` is said to be one, and gives a bool.
        return pointwise
    return freeze_inputs


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
        merged = merge_operands(call, operands)
        if merged is not None:
            result[dim] = merged
    # A second output is a buffer for the backward pass, empty on some devices.
    return [result if other.shape == out.shape else {} for other in call.outputs]


def per_channel(call: Call) -> Sequence[ChannelIds]:
    """Pooling, resizing, sampling: each channel on its own, channel dimensions unchanged.

    Further inputs, such as the grid of ``grid_sample``, tell places: their own channels are frozen.
    """
    source, out = call.inputs[0], call.outputs[0]
    if out.dim() != source.dim():
        return freeze_inputs(call)
    of_places = [{dim: ids for dim, ids in call.ids(tensor).items() if dim} for tensor in call.inputs[1:]]
    call.ledger.freeze_all(of_places, f"channels are used as places by {call.where}")
    # `pool2d` slides over the last two dimensions; a batch may be missing.
    named = _SPACE.search(call.name)
    space = range(source.dim() - int(named[1]) if named else 2, source.dim())
    own = {dim: ids for dim, ids in call.ids(source).items() if dim not in space and out.size(dim) == source.size(dim)}
    others = {dim: ids for dim, ids in call.ids(source).items() if dim not in own}
    slid = _slide_over_padding(call, others) if call.name in {"avg_pool2d", "avg_pool3d"} else None
    if slid is not None:
        return call.mix([{**own, **slid}])
    call.ledger.freeze_all([others], f"{call.where} slides over channels")
    return [own for _ in call.outputs]


def _slide_over_padding(call: Call, others: ChannelIds) -> ChannelIds | None:
    """Return the ids after a sum over neighboring channels (``local_response_norm``): in a cut model over kept ones.

    Returns:
        None unless the pooling slides along channels one by one, so that every channel has a sum of its own.
    """
    rank = int(_SPACE.findall(call.name)[0])
    kernel, stride = (list(call.named(name)) for name in ("kernel_size", "stride"))
    if not others or [*(stride or kernel)] != [1] * rank or any(call.named("padding")):
        return None
    first = call.inputs[0].dim() - rank
    slid: ChannelIds = {}
    for dim, ids in others.items():
        size = kernel[dim - first] if len(kernel) == rank else kernel[0]
        # The zeros beside the channels have ids that no layer produces, so freezing them freezes no channel.
        call.ledger.freeze_all([{dim: ids[: size // 2]}, {dim: ids[len(ids) - (size - 1) // 2 :]}], call.where)
        slid[dim] = ids[size // 2 : len(ids) - (size - 1) // 2]
    return slid


_SPACE = re.compile(r"([123])d")


def random_per_channel(call: Call) -> Sequence[ChannelIds]:
    """Fractional pooling, whose regions are drawn anew for every channel: ``_random_samples`` (batch, channels, n)."""
    source, samples = call.args[0], call.args[3]
    ids = call.ids(source)
    channels = source.dim() - samples.size(2) - 1
    drawn = call.ids(samples).get(1)
    if drawn is None:
        call.ledger.freeze_all([ids], f"{call.where} draws random regions for every channel")
        return [{} for _ in call.outputs]
    merged = merge_operands(call, [(ids.get(channels), source.size(channels)), (drawn, samples.size(1))])
    return [{} if merged is None else {channels: merged} for _ in call.outputs]


def draw_random(call: Call) -> Sequence[ChannelIds]:
    """Random numbers in place of every element (``gumbel_softmax``): fewer channels would get other numbers."""
    call.ledger.freeze_all([call.ids(call.inputs[0])], f"{call.where} draws random numbers for every channel")
    return [call.ids(call.inputs[0]) for _ in call.outputs]


def put_back(call: Call) -> Sequence[ChannelIds]:
    """``max_unpool``: every channel puts its values at its own positions, which lie in space."""
    source, positions = call.inputs[:2]
    rank = source.dim() - (2 if call.name.endswith("2d") else 3)
    result: ChannelIds = {}
    for dim in range(rank):
        merged = merge_operands(call, [(call.ids(t).get(dim), t.size(dim)) for t in (source, positions)])
        result.update({} if merged is None else {dim: merged})
    others = [{dim: ids for dim, ids in call.ids(t).items() if dim >= rank} for t in (source, positions)]
    call.ledger.freeze_all(others, f"{call.where} slides over channels")
    return [result]


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


def along_dims(call: Call) -> Sequence[ChannelIds]:
    """Sorting, selecting, Fourier transforms: channels along ``dim`` are frozen, and those of other dimensions pass.

    An operation that names no dimension works along all of them; ``tril`` and ``triu`` along the last two.
    """
    source = call.inputs[0]
    rank = source.dim()
    dims = {rank - 2, rank - 1} if call.name in {"tril", "triu"} else call.dims() or set(range(rank))
    ids = call.ids(source)
    over = {dim: vector for dim, vector in ids.items() if dim in dims}
    call.ledger.freeze_all(
        [over], f"{call.where} {_ALONG.get(call.name, 'has no channel rule for the dimension along which it works')}"
    )
    shorter = call.outputs[0].dim() < rank
    passed = {dim - shorter * sum(d < dim for d in dims): vector for dim, vector in ids.items() if dim not in dims}
    return [passed for _ in call.outputs]


_ALONG = {
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), "transforms along channels"),
    **dict.fromkeys(("tril", "triu"), "masks channels by their position"),
}


def unchanged(call: Call) -> Sequence[ChannelIds]:
    """Operations that keep every position: ``native_dropout``, ``view_as_real`` (which adds a dimension at the end)."""
    source = call.inputs[0]
    ids = {dim: vector for dim, vector in call.ids(source).items() if dim < call.outputs[0].dim()}
    lost = {dim: vector for dim, vector in call.ids(source).items() if dim not in ids}
    call.ledger.freeze_all([lost], f"{call.where} joins two real numbers to a complex one")
    return [ids for _ in call.outputs]


def normalization(call: Call) -> Sequence[ChannelIds]:
    """Softmax, cumsum and the like along one dimension; if that carries channels, over the kept ones."""
    source = call.inputs[0]
    ids = call.ids(source)
    results = [ids for _ in call.outputs]
    return call.mix(results) if call.args[1] % source.dim() in ids else results


# fmt: off
_MOVEMENT = [
    "view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze",
    "expand", "slice", "split", "split_with_sizes", "chunk", "clone", "contiguous", "alias", "detach", "_to_copy",
    "flip", "rot90", "repeat", "pixel_shuffle", "pixel_unshuffle", "reflection_pad1d", "reflection_pad2d",
    "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "narrow", "movedim",
    "swapaxes", "lift_fresh", "lift_fresh_copy", "tile", "repeat_interleave",
]
_PER_CHANNEL = [
    "max_pool1d", "max_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "_upsample_lanczos2d_aa", "mkldnn_max_pool2d", "grid_sampler_2d", "grid_sampler_3d",
    "cudnn_grid_sampler",
]
_ALONG_DIMS = [
    "sort", "argsort", "topk", "kthvalue", "median", "nanmedian", "mode", "argmax", "argmin", "aminmax", "cummax",
    "cummin", "index_fill", "_fft_r2c", "_fft_c2r", "_fft_c2c", "tril", "triu",
]
_UNCHANGED = [
    "native_dropout", "view_as_real", "view_as_complex", "_conj", "_conj_physical", "_neg_view", "resolve_conj",
    "resolve_neg",
]
_REDUCTION = [
    "mean", "sum", "amax", "amin", "var", "var_mean", "std", "std_mean", "linalg_vector_norm", "norm", "prod",
    "logsumexp", "any", "all", "max", "min", "nansum", "count_nonzero",
]
_NORMALIZED = [
    "_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp",
]
_BATCH_NORM = [
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "_native_batch_norm_legit_functional", "batch_norm",
]
_LIKE_TENSOR = [
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
]
_FILLED = [
    "zero", "fill", "uniform", "normal", "bernoulli",
]
_NEW_TENSOR = [
    "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided",
]
# Elementwise operations that ATen does not tag as such in every version.
_ELEMENTWISE = [
    "where", "addcmul", "addcdiv", "lerp", "clamp", "hardtanh", "hardswish", "hardsigmoid", "silu", "mish", "gelu",
    "elu", "celu", "selu", "leaky_relu", "relu6", "softplus", "threshold", "prelu", "_prelu_kernel", "masked_fill",
    "dropout", "log_sigmoid", "log_sigmoid_forward", "hardshrink", "softshrink", "rrelu_with_noise", "complex",
    "polar",
]
# fmt: on
_ALWAYS_COUNTED = frozenset({*layers.PRODUCT_KINDS, *layers.WHOLE_PRODUCT_KINDS, *ATTENTION_KINDS})

RULES: dict[str, Rule] = {
    **dict.fromkeys(_MOVEMENT, moves.move_channels),
    **dict.fromkeys(_PER_CHANNEL, per_channel),
    **dict.fromkeys(_REDUCTION, reduction),
    **dict.fromkeys(_NORMALIZED, normalization),
    **dict.fromkeys(_BATCH_NORM, layers.batch_norm),
    **dict.fromkeys(_LIKE_TENSOR, moves.like_tensor),
    **dict.fromkeys(_NEW_TENSOR, moves.new_tensor),
    **dict.fromkeys(_FILLED, moves.fill),
    **dict.fromkeys(_ELEMENTWISE, pointwise),
    **dict.fromkeys(ATTENTION_KINDS, layers.attention),
    **dict.fromkeys(("roll", "unfold", "diagonal"), moves.move_positions),
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), moves.channel_shuffle),
    "as_strided": moves.as_strided,
    **dict.fromkeys(("select", "unbind"), moves.select),
    **dict.fromkeys(("index", "index_select"), moves.index),
    "gather": moves.pick_along,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy"), moves.scatter),
    "index_put": moves.write_at,
    **dict.fromkeys(("exponential", "geometric", "cauchy", "log_normal"), draw_random),
    "glu": moves.gated,
    "im2col": moves.im2col,
    "col2im": moves.col2im,
    **dict.fromkeys(_ALONG_DIMS, along_dims),
    **dict.fromkeys(_UNCHANGED, unchanged),
    **dict.fromkeys(("fractional_max_pool2d", "fractional_max_pool3d"), random_per_channel),
    **dict.fromkeys(("max_unpool2d", "max_unpool3d"), put_back),
    **dict.fromkeys(("torchvision::roi_align", "torchvision::roi_pool"), per_channel),
    **dict.fromkeys(("torchvision::ps_roi_align", "torchvision::ps_roi_pool"), moves.position_sensitive),
    "embedding": layers.embedding,
    **dict.fromkeys(("_embedding_bag", "_embedding_bag_forward_only"), layers.embedding),
    "cat": moves.concatenate,
    "stack": moves.stack,
    "constant_pad_nd": moves.pad,
    "copy": moves.overwrite,
    **dict.fromkeys(("slice_scatter", "select_scatter"), moves.scatter_part),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), layers.layer_norm),
    "native_group_norm": layers.group_norm,
    "_weight_norm_interface": layers.weight_norm,
    "convolution": layers.convolution,
    "torchvision::deform_conv2d": layers.deformable_convolution,
    "conv_tbc": layers.convolution_over_time,
    "mm": layers.matrix_product,
    "addmm": layers.matrix_product,
    **dict.fromkeys(("bmm", "baddbmm", "addbmm"), layers.batched_product),
    **dict.fromkeys(("mv", "addmv", "dot", "vdot"), layers.vector_product),
    "_trilinear": layers.bilinear,
    **dict.fromkeys(("_cdist_forward", "_euclidean_dist", "_pdist_forward"), layers.distance),
    **dict.fromkeys(layers.WHOLE_PRODUCT_KINDS, layers.whole_product),
    **RECURRENT_RULES,
}

# Sampling and measuring distances to parameters has a cost that no rule counts.
_WITHOUT_PRODUCTS = RULES.keys() - {"_cdist_forward", "_euclidean_dist", "_pdist_forward"} - _ALWAYS_COUNTED
"""The operations of ATen without multiply-accumulates: they move, compare, scale or normalize."""

__all__ = [
    "RULES",
    "Call",
    "ChannelIds",
    "CountedOperation",
    "Rule",
    "concatenate",
    "convolution",
    "freeze_inputs",
    "group_norm",
    "layer_norm",
    "matrix_product",
    "merge_operands",
    "move_channels",
    "normalization",
    "per_channel",
    "pointwise",
    "reduction",
]
