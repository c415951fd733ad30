"""Several processes that torchrun has started: their Fabric, their parts of a batch, gradients and batch norms."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur._batches import batch_length, take
from secateur._runtime import process_count
from secateur.errors import TrainingError
from secateur.train.device import Precision, default_device, fabric_plugin, preserve_nvml_variable

if TYPE_CHECKING:
    from lightning_fabric import Fabric


_PATIENCE = timedelta(days=30)
"""How long a process waits for the others, which may be long while the first one searches alone. If a process dies,
torchrun ends the others."""


def open_group(precision: Precision | None = None, *, device: torch.device | None = None) -> "Fabric":
    """Open a Fabric for all processes that torchrun has started, and connect them.

    Every process has a device of its own: with CUDA the device of its number on its machine.

    Args:
        precision: None means `best_precision` of the device.
        device: Kind of device, without a number; None means the accelerator if there is one, else the CPU.

    Raises:
        TrainingError: If the device has a number, or torchrun did not start this process.
    """
    kind = device or default_device()
    if ":" in str(kind):
        raise TrainingError(
            f"`device` must have no number with several processes, each of which takes its own; got {kind}. "
            f"Say {kind.type}."
        )
    with preserve_nvml_variable():
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy

    together = process_count()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", together))
    if not TorchElasticEnvironment.detect() or together % here:
        raise TrainingError(
            f"Several processes must be started by torchrun, as many on each machine; got {together} in all and {here} "
            "on this one, or not all of its variables. Run torchrun --nproc-per-node N."
        )
    fabric = Fabric(
        accelerator=kind.type,
        devices=here,
        num_nodes=together // here,
        strategy=DDPStrategy(timeout=_PATIENCE),
        plugins=[TorchElasticEnvironment(), fabric_plugin(precision, kind)],
    )
    fabric.launch()
    return fabric


def check_divisible(fabric: "Fabric", batch: int, parts: int) -> None:
    """Refuse batches that do not give every process as many images as the parts it computes them in.

    Raises:
        TrainingError: If so.
    """
    if batch < fabric.world_size * parts:
        raise TrainingError(
            f"`batch_size` must give every part of a batch an image; got {batch} images for {fabric.world_size} "
            f"process(es) and `accumulate` {parts}. Take larger batches or fewer parts."
        )


def own_shard(fabric: "Fabric", batch: Any) -> Any:
    """Return this process's part of a batch, a tree of tensors: every n-th item, for n processes.

    The mean of the parts' mean losses is the mean loss of the batch, and so are the gradients, if the number of
    processes divides the batch, or the parts are weighted by their images, and nothing is normalized over the batch.

    Raises:
        TrainingError: If there are more processes than items.
    """
    if fabric.world_size == 1 or batch is None:
        return batch
    if batch_length(batch) < fabric.world_size:
        raise TrainingError(
            f"`batch_size` must give every process an image; got {batch_length(batch)} for {fabric.world_size} "
            "processes."
        )
    # Every n-th, not one block each: the parts differ by one item at most, and classes in order are spread.
    return take(batch, slice(fabric.global_rank, None, fabric.world_size))


def average_gradients_(fabric: "Fabric", parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their means over all processes; with one process nothing is done.

    All gradients travel in one message, after all backward passes of a step. A parameter without a gradient in this
    process counts as zero.
    """
    if fabric.world_size == 1:
        return
    # Zeros for missing gradients, because all processes must send tensors of the same size.
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    _spread(learning, gradients, mean_over_processes(fabric, flat))


def mean_over_processes(fabric: "Fabric", values: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes; with one process the tensor itself."""
    if fabric.world_size == 1:
        return values
    mean = fabric.all_reduce(values, reduce_op="mean")
    assert isinstance(mean, Tensor)
    return mean


def gather(fabric: "Fabric", values: Tensor) -> Tensor:
    """Return the tensors of all processes, stacked to (processes, ...), in each of them."""
    # A sum with zeros, because all backends have it for all types.
    found = values.new_zeros((fabric.world_size, *values.shape), device=fabric.device)
    found[fabric.global_rank] = values.to(fabric.device)
    if fabric.world_size > 1:
        found = fabric.all_reduce(found, reduce_op="sum")
        assert isinstance(found, Tensor)
    return found


def _spread(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], mean: Tensor) -> None:
    parts = mean.split([gradient.numel() for gradient in gradients])
    for parameter, gradient, part in zip(parameters, gradients, parts, strict=True):
        parameter.grad = part.reshape(gradient.shape).to(gradient)


def synchronized_batch_norms(fabric: "Fabric") -> AbstractContextManager[object]:
    """Return a context in which every batch norm in training mode normalizes over the parts of all processes.

    Everything that calls `torch.nn.functional.batch_norm` in it gets the statistics of one process with the whole
    batch. This works on any device; `torch.nn.SyncBatchNorm` is for CUDA alone, and would change the model. All
    processes must run the same layers in the same order, backward too.
    """
    return nullcontext() if fabric.world_size == 1 else _Synchronized(fabric)


class _Synchronized(TorchFunctionMode):
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
    """Compute `torch.nn.functional.batch_norm` as if this process had the whole batch."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    wide = input if input.dtype == torch.float64 else input.float()  # As torch does, also where autocast is on.
    over = [0, *range(2, input.ndim)]
    broadcast = (1, -1, *(1 for _ in range(input.ndim - 2)))
    own = wide.new_tensor([input.numel() / input.shape[1]])
    total = _Sum.apply(fabric, torch.cat([wide.sum(over), own]))
    n = total[-1].detach()
    mean = total[:-1] / n
    centered = wide - mean.reshape(broadcast)
    # A second message: the mean of squares less the square of the mean would lose digits.
    variance = _Sum.apply(fabric, centered.square().sum(over)) / n
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean), momentum)
        if running_var is not None:
            # The running variance is the unbiased one, as in torch.
            running_var.lerp_((variance * n / (n - 1)).to(running_var), momentum)
    found = centered * (variance + eps).rsqrt().reshape(broadcast)
    if weight is not None:
        found = found * weight.reshape(broadcast)
    if bias is not None:
        found = found + bias.reshape(broadcast)
    return found.to(input.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all processes. Its gradient is summed too, because the losses of all processes depend on it."""

    @staticmethod
    def forward(ctx: Any, fabric: "Fabric", values: Tensor) -> Tensor:
        ctx.fabric = fabric
        return _summed(fabric, values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, _summed(ctx.fabric, gradient)


def _summed(fabric: "Fabric", values: Tensor) -> Tensor:
    # A copy, because the sum may be written into the tensor that is given.
    found = fabric.all_reduce(values.clone(), reduce_op="sum")
    assert isinstance(found, Tensor)
    return found
