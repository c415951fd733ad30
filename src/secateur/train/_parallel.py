"""One step on several processes: each takes its part of the batch, and gradients are averaged."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.errors import TrainingError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


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


def own_part(fabric: "Fabric", batch: Tensor) -> Tensor:
    """This process's part of a batch: every n-th item, for n processes.

    The mean of the parts' mean losses is that of the batch, and so are the gradients, wherever the number of processes
    divides the batch (or the parts are weighed by their images) and nothing is normalised over it.

    Raises:
        TrainingError: If there are more processes than items.
    """
    if fabric.world_size == 1:
        return batch
    if len(batch) < fabric.world_size:
        raise TrainingError(
            f"`batch_size` must give every process an image; got {len(batch)} for {fabric.world_size} processes."
        )
    return batch[fabric.global_rank :: fabric.world_size]


def average_gradients_(fabric: "Fabric", parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their means over all processes; with one process nothing is done.

    All at once, in one message, after as many backward passes as a step has. A parameter without a gradient in this
    process counts as zero.
    """
    if fabric.world_size == 1:
        return
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learning]
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    _spread(learning, gradients, averaged(fabric, flat))


def averaged(fabric: "Fabric", values: Tensor) -> Tensor:
    """The mean of some values over all processes; with one process the values themselves."""
    if fabric.world_size == 1:
        return values
    mean = fabric.all_reduce(values, reduce_op="mean")
    assert isinstance(mean, Tensor)
    return mean


def gathered(fabric: "Fabric", values: Tensor) -> Tensor:
    """The values of all processes, (processes, ...), in each of them.

    By a sum with zeros: all backends know that, for all types.
    """
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
