"""Costs counted by running the model: independent of the channel graph, to check it against."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.graph import shadow_of

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode


def counted_macs(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of one forward pass in evaluation mode at batch 1, counted operator by operator.

    Convolutions, products of matrices and vectors, attention and recurrent layers count, whichever kernel this version
    of torch runs them with (see `flop_counter`). A copy of the model runs, so modes, buffers and the global random
    state stay as they were.

    Args:
        model: Any module.
        example: Its input, or several; only the first sample of each (dimension 0) is used.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    running = _without_gradients(shadow_of(model))
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = sorted({tensor.device.index or 0 for tensor in inputs if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), flop_counter() as counter:
        try:
            # The fast path runs a whole attention layer as one operator that the counter does not know.
            torch.backends.mha.set_fastpath_enabled(False)
            running(*(tensor[:1] for tensor in inputs))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2


def flop_counter() -> FlopCounterMode:
    """torch's ``FlopCounterMode`` (two FLOPs per multiply-accumulate), with formulas for what some versions leave out.

    An operator without a formula silently counts as zero. torch 2.9 to 2.14 have no formula for the CPU's attention
    kernel, and no version has them for products with vectors, bilinear layers, and recurrent layers that run as one
    operator. The alternative, attention on its math backend while counting, would fail for a model that selects a
    backend itself, need memory for the scores of all heads, and set global switches.
    """
    # Imported here: it brings Triton along, a quarter of a second that only counting needs.
    from torch.utils.flop_counter import FlopCounterMode

    # Operators come and go between versions of torch: what this one lacks cannot run either.
    known = {getattr(torch.ops.aten, name, None): formula for name, formula in _FORMULAS.items()}
    return FlopCounterMode(
        display=False, custom_mapping={operator: formula for operator, formula in known.items() if operator is not None}
    )


_Shape = Sequence[int]


def _attention(query: _Shape, key: _Shape, value: _Shape, *_: Any, **__: Any) -> int:
    """Scores = query key^T, and scores times value, for every head; masks are not made use of."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _product_of_vectors(left: _Shape, _right: _Shape, *_: Any, **__: Any) -> int:
    """(k) . (k), and (n, k) @ (k): every element of the first factor is multiplied once."""
    return 2 * math.prod(left)


def _added_product_of_vectors(_added: _Shape, left: _Shape, _right: _Shape, *_: Any, **__: Any) -> int:
    """A sum + (n, k) @ (k)."""
    return 2 * math.prod(left)


def _summed_batched_product(_added: _Shape, left: _Shape, right: _Shape, *_: Any, **__: Any) -> int:
    """A sum + the sum over the batch of (batch, n, k) @ (batch, k, m)."""
    return 2 * math.prod(left) * right[-1]


def _bilinear(left: _Shape, weight: _Shape, _right: _Shape, *_: Any, **__: Any) -> int:
    """``nn.Bilinear``, (n, i) and (o, i, j) and (n, j): every weight is used once per sample."""
    return 2 * left[0] * math.prod(weight)


def _recurrent_layer(inputs: _Shape, of_inputs: _Shape, of_hidden: _Shape, *_: Any, **__: Any) -> int:
    """One direction of one recurrent layer on the CPU: (steps, batch, features), a matrix each for input and hidden."""
    return 2 * math.prod(inputs[:2]) * (math.prod(of_inputs) + math.prod(of_hidden))


def _recurrent_network(inputs: _Shape, weights: Sequence[_Shape], *_: Any, **__: Any) -> int:
    """All layers and directions of a recurrent network on the GPU: every matrix is used once per step and sample."""
    return 2 * math.prod(inputs[:2]) * sum(math.prod(weight) for weight in weights if len(weight) == 2)


_FORMULAS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_attention_math_for_mps": _attention,
    "dot": _product_of_vectors,
    "vdot": _product_of_vectors,
    "mv": _product_of_vectors,
    "addmv": _added_product_of_vectors,
    "addbmm": _summed_batched_product,
    "_trilinear": _bilinear,
    "mkldnn_rnn_layer": _recurrent_layer,
    "_cudnn_rnn": _recurrent_network,
}
"""FLOPs by name of the ATen operator, from the shapes of its arguments."""


def _without_gradients(shadow: nn.Module) -> nn.Module:
    """The shadow with parameters that share their numbers with the model's but require no gradient.

    The counter looks for the gradient function of every tensor that requires one, and fails where there is none.
    """
    frozen: dict[int, nn.Parameter] = {}
    for module in shadow.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            plain = frozen.setdefault(id(parameter), nn.Parameter(parameter.detach(), requires_grad=False))
            setattr(module, name, plain)
    return shadow


def counted_params(model: nn.Module) -> int:
    """Number of parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
