"""Products that need not be computed while a model is traced, because nobody reads their numbers.

A trace learns which calls are made, in which order and with which shapes. The numbers in the tensors decide that only
where somebody reads them: python (``if x.max() > 3``), an index, a mask, an operation that gives as many results as
the numbers say. So convolutions and matrix products, nearly all of the arithmetic of a model, give zeros, and what
is computed from them is *hollow*. As soon as anybody is about to read what is hollow, the trace is given up and made
again with every number.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

READERS = frozenset({
    "tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "_typed_storage",
})  # fmt: skip
"""Methods of a tensor that hand out its numbers without any ATen call."""
_TAGS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


class NumbersReadError(Exception):
    """Somebody is about to read the numbers of a hollow tensor."""


def reads_numbers(func: Any, name: str, hollow: Sequence[torch.Tensor]) -> bool:
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


def stand_in(func: Any, args: tuple[Any, ...]) -> torch.Tensor | None:
    """Zeros of the shape and layout of a product; None if there is anything unusual about it.

    Args:
        func: The ATen overload, one of `PRODUCTS`.
        args: Its positional arguments, all of them.
    """
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    first = tensors[0]
    plain = all(t.device.type == "cpu" and t.dtype == first.dtype and t.layout == torch.strided for t in tensors)
    shape = PRODUCTS[func](*args) if plain and first.is_floating_point() else None
    return None if shape is None or 0 in shape else first.new_zeros(shape)


def _product(left: torch.Tensor, right: torch.Tensor) -> tuple[int, ...] | None:
    """(..., n, k) @ (..., k, m)."""
    fits = left.shape[:-2] == right.shape[:-2] and left.size(-1) == right.size(-2)
    return (*left.shape[:-1], right.size(-1)) if fits else None


def _added_product(bias: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> tuple[int, ...] | None:
    shape = _product(left, right)
    return shape if bias.shape in {shape, (right.size(1),)} else None


def _convolution(  # noqa: PLR0917
    source: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    further: Sequence[int],
    groups: int,
) -> tuple[int, ...] | None:
    """(n, in, ...) by (out, in / groups, ...), or (in, out / groups, ...) if transposed."""
    per_dim = (source.shape[2:], weight.shape[2:], stride, padding, dilation, further)
    entering, leaving = (0, 1) if transposed else (1, 0)
    channels = weight.size(leaving) * (groups if transposed else 1)
    fits = (
        len({len(amounts) for amounts in per_dim}) == 1
        and source.is_contiguous()
        and weight.is_contiguous()
        and source.size(1) == weight.size(entering) * (1 if transposed else groups)
        and weight.size(0) % groups == 0
        and (bias is None or bias.shape == (channels,))
    )
    if not fits:
        return None
    length = _stretched if transposed else _slid
    lengths = [length(*amounts) for amounts in zip(*per_dim, strict=True)]
    return (source.size(0), channels, *lengths) if min(lengths) > 0 else None


def _slid(size: int, kernel: int, stride: int, pad: int, dilation: int, _: int) -> int:
    """How many places a kernel takes as it slides."""
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def _stretched(size: int, kernel: int, stride: int, pad: int, dilation: int, further: int) -> int:  # noqa: PLR0917
    """How far a transposed convolution reaches."""
    return (size - 1) * stride - 2 * pad + dilation * (kernel - 1) + further + 1


PRODUCTS: Mapping[Any, Callable[..., tuple[int, ...] | None]] = {
    torch.ops.aten.mm.default: _product,
    torch.ops.aten.bmm.default: _product,
    torch.ops.aten.addmm.default: _added_product,
    torch.ops.aten.convolution.default: _convolution,
}
"""What may go without being computed: from the arguments of a call to the shape of its result."""
