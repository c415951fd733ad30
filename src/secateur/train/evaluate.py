"""How good a model is on a split, by the metric of its task."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur._batches import batch_length, call_model, take
from secateur._caller_state import in_default_state
from secateur.errors import TrainingError
from secateur.tasks.base import Score, Task
from secateur.tasks.classification import Classification
from secateur.tasks.imitation import Imitation
from secateur.train.config import Batches
from secateur.train.device import Precision, autocast, channels_last, copy_to_device, default_device
from secateur.train.distributed import mean_over_processes

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@in_default_state
def evaluate(
    model: nn.Module,
    split: Batches,
    *,
    task: Task = Classification(),  # noqa: B008 - frozen
    original: nn.Module | None = None,
    batch_size: int = 250,
    precision: Precision = Precision.FLOAT32,
    device: torch.device | None = None,
) -> Score:
    """Measure a model in eval mode, without augmentation.

    Args:
        model: A copy is measured; the model stays as it is.
        split: The images, read in their stored order.
        task: What outputs and targets mean, and the metric.
        original: The model whose outputs are the targets of `Imitation`.
        batch_size: Images per forward pass, >= 1.
        precision: Number formats; float32 unless told otherwise.
        device: Where to compute; None means the accelerator if there is one, else the CPU.

    Raises:
        TrainingError: If there are no images, or outputs or targets are not those of the task.
    """
    if batch_size < 1:
        raise TrainingError(f"`batch_size` must be at least 1; got {batch_size}. 250 is usual.")
    device = device or default_device()
    with torch.inference_mode(mode=False):
        copy = copy_to_device(model, device).eval()
        other = None if original is None else copy_to_device(original, device).eval()
    return measure_score(
        copy, split, task=task, original=other, batch_size=batch_size, precision=precision, device=device
    )


def measure_score(
    model: nn.Module,
    split: Batches,
    *,
    task: Task,
    original: nn.Module | None = None,
    batch_size: int,
    precision: Precision,
    device: torch.device,
    fabric: "Fabric | None" = None,
) -> Score:
    """Evaluate a model that is on the device and in eval mode already, see `evaluate`.

    With a Fabric of several processes each computes its part of every batch, if the metric can be added up, and all
    return the result of the whole.
    """
    if len(split) == 0:
        raise TrainingError("`split` must hold at least one image; got none. Check the data folder and its splits.")
    if isinstance(task, Imitation) and original is None:
        raise TrainingError("`original` must be given for Imitation, whose targets are its outputs; got None.")
    meter = task.meter()
    rank, processes = (0, 1) if fabric is None or not meter.additive else (fabric.global_rank, fabric.world_size)
    is_first = True
    with _compared(task, model, original), torch.inference_mode(), autocast(precision, device):
        for inputs, targets in split.batches(batch_size, device=device, seed=None):
            if processes > 1:
                own = slice(rank, None, processes)
                inputs, targets = take(inputs, own), take(targets, own)  # noqa: PLW2901 - its part
                # The last batch may have fewer images than there are processes.
                if batch_length(inputs) == 0:
                    continue
            if not isinstance(task, Imitation):
                task.check_targets(inputs, targets)
            inputs = in_channels_last(inputs)  # noqa: PLW2901
            outputs = call_model(model, inputs)
            if isinstance(task, Imitation):
                assert original is not None
                targets = call_model(original, inputs)  # noqa: PLW2901
            # One batch shows what the model returns, and looking at it waits for the device.
            if is_first:
                task.check(outputs, targets)
                is_first = False
            meter.update(outputs, targets)
    if fabric is not None and processes > 1:
        sums = meter.sums()
        assert sums is not None
        # A sum over the processes is their mean times their number.
        meter.set_sums(mean_over_processes(fabric, sums) * processes)
    return meter.compute()


@contextmanager
def _compared(task: Task, model: nn.Module, original: nn.Module | None) -> Generator[None]:
    """Make a model and its original return what `Imitation` compares; other tasks measure what models return."""
    watched = [model, original] if isinstance(task, Imitation) and original is not None else []
    for each in watched:
        task.observe_(each)
    try:
        yield
    finally:
        for each in watched:
            task.unobserve_(each)


def in_channels_last(inputs: Any) -> Any:
    """Return inputs with every batch of two-dimensional images in channels-last order."""
    return channels_last(inputs) if isinstance(inputs, Tensor) else tree_map_only(Tensor, channels_last, inputs)
