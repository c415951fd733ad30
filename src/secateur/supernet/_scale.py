"""Scale some channels of features, at the price in memory of those channels."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def scale_channels(z: Tensor, factors: Tensor, positions: Tensor, *, dim: int) -> Tensor:
    """z with some channels multiplied: out[p] = factors[i] * z[p] for p = positions[i], out[p] = z[p] elsewhere.

    A plain product with a vector would keep all of z for the gradient of the factors; this keeps the scaled channels.

    Args:
        z: Features of any shape.
        factors: (n,).
        positions: (n,) increasing, along the dimension.
        dim: The dimension with the channels.

    Returns:
        The shape and type of ``z``; differentiable once in ``z`` and ``factors``.
    """
    return _ScaleChannels.apply(z, factors, positions, dim)  # type: ignore[no-any-return]


class _ScaleChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, factors: Tensor, positions: Tensor, dim: int) -> Tensor:  # pyright: ignore
        every = torch.ones(z.shape[dim], dtype=z.dtype, device=z.device).index_copy(0, positions, factors.to(z.dtype))
        every = every.view([-1 if number == dim else 1 for number in range(z.dim())])
        ctx.dim, ctx.of_factors = dim, factors.dtype
        scaled = _some(z, positions, dim) if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(every, positions, scaled)
        return z * every

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore
        every, positions, scaled = ctx.saved_tensors
        of_factors = None
        if scaled is not None:
            product = _some(gradient, positions, ctx.dim) * scaled
            others = [number for number in range(product.dim()) if number != ctx.dim]
            of_factors = product.sum(others, dtype=ctx.of_factors)
        return gradient * every if ctx.needs_input_grad[0] else None, of_factors, None, None


def _some(z: Tensor, positions: Tensor, dim: int) -> Tensor:
    """A copy of some channels; where they lie in a row, one that is quick."""
    first, count = int(positions[0]), len(positions)
    if int(positions[-1]) - first == count - 1:
        return z.narrow(dim, first, count).clone()
    return z.index_select(dim, positions)
