"""Batch norms of several processes, over the whole batch."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def synchronised_norms(fabric: "Fabric") -> AbstractContextManager[object]:
    """A context in which every batch norm in training mode normalises over the parts of all processes.

    Whatever calls `torch.nn.functional.batch_norm` in it, with the same statistics as one process with the whole batch.
    On any device; `torch.nn.SyncBatchNorm` is for CUDA alone, and would change the model. All processes must run the
    same layers in the same order, backwards too.
    """
    return nullcontext() if fabric.world_size == 1 else _Synchronised(fabric)


class _Synchronised(TorchFunctionMode):
    def __init__(self, fabric: "Fabric") -> None:
        super().__init__()
        self._fabric = fabric

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.batch_norm:
            return _batch_norm(self._fabric, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm(  # noqa: PLR0917 - in torch's order
    fabric: "Fabric",
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`: its arguments, and its result on the whole batch."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    wide = input if input.dtype == torch.float64 else input.float()  # As torch does, also where autocast is on.
    over = [0, *range(2, input.ndim)]
    broadcast = (1, -1, *(1 for _ in range(input.ndim - 2)))
    own = wide.new_tensor([input.numel() / input.shape[1]])
    total = _Sum.apply(fabric, torch.cat([wide.sum(over), own]))
    n = total[-1].detach()
    mean = total[:-1] / n
    centred = wide - mean.reshape(broadcast)
    # A second message: the mean of squares less the square of the mean would lose digits.
    variance = _Sum.apply(fabric, centred.square().sum(over)) / n
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
        if running_var is not None:
            running_var.lerp_((variance * n / (n - 1)).to(running_var), momentum)
    found = centred * (variance + eps).rsqrt().reshape(broadcast)
    if weight is not None:
        found = found * weight.reshape(broadcast)
    if bias is not None:
        found = found + bias.reshape(broadcast)
    return found.to(input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes; so is its gradient, because the losses of all depend on it."""

    @staticmethod
    def forward(ctx: Any, fabric: "Fabric", values: Tensor) -> Tensor:
        ctx.fabric = fabric
        return _summed(fabric, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, _summed(ctx.fabric, gradient)


def _summed(fabric: "Fabric", values: Tensor) -> Tensor:
    found = fabric.all_reduce(values.clone(), reduce_op="sum")
    assert isinstance(found, Tensor)
    return found
