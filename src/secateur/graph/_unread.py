"""Operations that need not be computed while a model is traced, because nobody reads their numbers.

A trace learns which calls are made, in which order and with which shapes. The numbers in the tensors decide that only
where somebody reads them: python (``if x.max() > 3``), an index, a mask, an operation that gives as many results as
the numbers say. So the operations that do nearly all of the arithmetic of a model are not run: tensors of the same
shape and layout stand in for what they would return, and what is computed from those is *hollow*. As soon as anybody
is about to read what is hollow, the trace is given up and made again with every number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

READERS = frozenset({
    "tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "_typed_storage",
})  # fmt: skip
"""Methods of a tensor that hand out its numbers without any ATen call."""
_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


class NumbersReadError(Exception):
    """Somebody is about to read the numbers of a hollow tensor."""


def reads_numbers(func: Any, name: str, hollow: Sequence[Tensor]) -> bool:
    """Whether what an ATen call gives back, but for the numbers in its tensors, may depend on hollow inputs.

    Args:
        func: The ATen overload.
        name: Its base name.
        hollow: The hollow tensors among its inputs, at least one.
    """
    if func.namespace != "aten" or any(not (t.is_floating_point() or t.is_complex()) for t in hollow):
        return True  # What is no floating-point number is a mask or an index computed from one.
    # What is taken of a tensor by an index depends on that index alone.
    return name != "index" and not _TAGS.isdisjoint(func.tags)


def stand_in(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Tensors of the shapes and layouts that a call would return; None if there is anything unusual about it.

    What they hold is whatever lies in the memory. An operation in place returns what it is given.

    Args:
        func: The ATen overload, one of `STAND_INS`.
        args: Its positional arguments.
        kwargs: Its named arguments.
    """
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    first = tensors[0]
    plain = first.device.type == "cpu" and first.is_floating_point() and first.numel()
    alike = plain and all((t.device, t.dtype, t.layout) == (first.device, first.dtype, torch.strided) for t in tensors)
    return STAND_INS[func](*args, **kwargs) if alike else None


def _product(left: Tensor, right: Tensor) -> Tensor | None:
    """(..., n, k) @ (..., k, m)."""
    fits = left.shape[:-2] == right.shape[:-2] and left.size(-1) == right.size(-2)
    return left.new_empty((*left.shape[:-1], right.size(-1))) if fits else None


def _added_product(bias: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    made = _product(left, right)
    return made if made is not None and bias.shape in {made.shape, made.shape[1:]} else None


def _convolution(  # noqa: PLR0917
    source: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    further: Sequence[int],
    groups: int,
) -> Tensor | None:
    """(n, in, ...) by (out, in / groups, ...), or (in, out / groups, ...) if transposed."""
    per_dim = (source.shape[2:], weight.shape[2:], stride, padding, dilation, further)
    entering, leaving = (0, 1) if transposed else (1, 0)
    channels = weight.size(leaving) * (groups if transposed else 1)
    fits = (
        len({len(amounts) for amounts in per_dim}) == 1
        # Where channels come last in memory, what comes out depends on the library that convolves.
        and _is_in_order(source)
        and _is_in_order(weight)
        and source.size(1) == weight.size(entering) * (1 if transposed else groups)
        and weight.size(0) % groups == 0
        and (bias is None or bias.shape == (channels,))
    )
    if not fits:
        return None
    length = _stretched if transposed else _slid
    lengths = [length(*amounts) for amounts in zip(*per_dim, strict=True)]
    return source.new_empty((source.size(0), channels, *lengths)) if min(lengths) > 0 else None


def _is_in_order(tensor: Tensor) -> bool:
    """Contiguous, and its strides say so even where a dimension has one position only and any would do."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if stride != expected:
            return False
        expected *= size
    return True


def _slid(size: int, kernel: int, stride: int, pad: int, dilation: int, *_: int) -> int:
    """How many places a kernel takes as it slides."""
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def _stretched(size: int, kernel: int, stride: int, pad: int, dilation: int, *further: int) -> int:
    """How far a transposed convolution reaches."""
    return (size - 1) * stride - 2 * pad + dilation * (kernel - 1) + sum(further) + 1


def _elementwise(source: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return torch.empty_like(source) if _is_in_order(source) else None


def _in_place(source: Tensor, *_: Any, **__: Any) -> Tensor:
    return source


def _of_two(left: Tensor, right: Any, **_: Any) -> Tensor | None:
    same = isinstance(right, Tensor) and left.shape == right.shape and _is_in_order(left) and _is_in_order(right)
    return torch.empty_like(left) if same else None


def _of_two_in_place(left: Tensor, right: Any, **_: Any) -> Tensor | None:
    return left if isinstance(right, Tensor) and left.shape == right.shape else None


def _batch_norm(source: Tensor, *vectors_training_and_more: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """With running statistics only: those of the input are of no use to anyone then, and are empty."""
    *vectors, training, _, _ = vectors_training_and_more
    shapes = {tuple(v.shape) for v in vectors if v is not None}
    if training or source.dim() < 2 or shapes - {(source.size(1),)} or not _is_in_order(source):
        return None
    return torch.empty_like(source), source.new_empty(0), source.new_empty(0)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, causal: bool = False, **_: Any
) -> tuple[Tensor, Tensor] | None:
    """(batch, heads, tokens, dimension) in the order of the query, and a sum for each of its tokens."""
    batch, heads, tokens, size = query.shape
    fits = key.shape == value.shape and key.shape == (batch, heads, key.size(2), size) and query.dtype == torch.float32
    if dropout or causal or not fits:
        return None
    sums = query.new_empty(batch, tokens, heads).transpose(1, 2)
    return torch.empty_like(query), sums


_ATEN = torch.ops.aten
STAND_INS: Mapping[Any, Callable[..., Any]] = {
    _ATEN.mm.default: _product,
    _ATEN.bmm.default: _product,
    _ATEN.addmm.default: _added_product,
    _ATEN.convolution.default: _convolution,
    _ATEN.add.Tensor: _of_two,
    _ATEN.mul.Tensor: _of_two,
    _ATEN.add_.Tensor: _of_two_in_place,
    _ATEN.native_batch_norm.default: _batch_norm,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    **dict.fromkeys(
        (_ATEN.relu.default, _ATEN.silu.default, _ATEN.gelu.default, _ATEN.hardswish.default, _ATEN.sigmoid.default),
        _elementwise,
    ),
    **dict.fromkeys(
        (_ATEN.relu_.default, _ATEN.silu_.default, _ATEN.hardswish_.default, _ATEN.hardtanh_.default), _in_place
    ),
}
"""What may go without being computed: from the arguments of a call to what stands in for its results."""
