"""A counter of multiply-accumulates that shares nothing with the one of the package: every call, from its arguments.

It knows what torch's ``FlopCounterMode`` passes over, such as deformable convolutions, bilinear and recurrent layers. A
call that reads a parameter and is neither counted nor known to multiply nothing is an error.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _convolved(out: Tensor, source: Tensor, weight: Tensor, *more: Any) -> int:
    # Every result of a convolution is a sum over one filter; a transposed one spreads every input by one.
    return (source if more[4] else out).numel() * weight[0].numel()


def _attended(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any) -> int:
    return query[..., 0].numel() * key.size(-2) * (query.size(-1) + value.size(-1))


def _stepped(_: Any, source: Tensor, of_input: Tensor, of_state: Tensor, *__: Any) -> int:
    return source.size(0) * source.size(1) * (of_input.numel() + of_state.numel())


COUNTED: Mapping[str, Callable[..., int]] = {
    "aten::mm": lambda out, left, right: out.numel() * left.size(1),
    "aten::addmm": lambda out, _, left, right, **__: out.numel() * left.size(1),
    "aten::bmm": lambda out, left, right: out.numel() * left.size(2),
    "aten::baddbmm": lambda out, _, left, right, **__: out.numel() * left.size(2),
    "aten::addbmm": lambda out, _, left, right, **__: left.size(0) * out.numel() * left.size(2),
    "aten::mv": lambda out, left, right: left.numel(),
    "aten::addmv": lambda out, _, left, right, **__: left.numel(),
    "aten::dot": lambda out, left, right: left.numel(),
    "aten::vdot": lambda out, left, right: left.numel(),
    "aten::convolution": _convolved,
    "aten::conv_tbc": lambda out, source, weight, *_: out.numel() * weight[..., 0].numel(),
    "aten::_trilinear": lambda out, left, weight, *_: left.size(0) * weight.numel(),
    "aten::mkldnn_rnn_layer": _stepped,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attended,
    "torchvision::deform_conv2d": lambda out, source, weight, *_: out.numel() * weight[0].numel(),
}
_NOTHING = {
    "t", "transpose", "permute", "view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "slice", "select",
    "split", "split_with_sizes", "unbind", "cat", "stack", "index", "index_select", "repeat", "clone", "copy", "alias",
    "detach", "_to_copy", "roll", "flip", "constant_pad_nd", "embedding", "_embedding_bag", "upsample_bicubic2d",
    "upsample_bilinear2d", "_prelu_kernel", "_softmax", "var_mean", "mean", "sum", "native_batch_norm", "unsafe_split",
    "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "native_layer_norm", "native_group_norm",
    "_fused_rms_norm", "_weight_norm_interface", "linalg_vector_norm", "repeat_interleave", "unsafe_chunk", "chunk",
    "lift_fresh", "zeros_like", "cudnn_batch_norm", "as_strided", "norm", "_embedding_bag_forward_only", "unfold",
    "contiguous", "amax", "cumsum", "gather", "scatter", "topk", "sort",
}  # fmt: skip


class _Counter(TorchDispatchMode):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.total = 0
        self.unknown: set[str] = set()
        self._stored = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in COUNTED:
            result = out if isinstance(out, Tensor) else next(t for t in tree_leaves(out) if isinstance(t, Tensor))
            self.total += COUNTED[name](result, *args, **(kwargs or {}))
        elif torch.Tag.pointwise not in func.tags and name.removeprefix("aten::").rstrip("_") not in _NOTHING:
            given = (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
            if any(t.untyped_storage().data_ptr() in self._stored for t in given):
                self.unknown.add(name)
        return out


def macs_by_hand(model: nn.Module, *inputs: Any) -> int:
    """Multiply-accumulates of one forward pass of a model in evaluation mode, batch as given."""
    with torch.no_grad(), _Counter(model) as counter:
        model(*inputs)
    assert not counter.unknown, f"reads parameters in ways that nobody counts: {sorted(counter.unknown)}"
    return counter.total
