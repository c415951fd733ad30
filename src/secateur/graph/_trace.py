"""`trace`: the public verb of this room."""

from typing import Any

import torch
from torch import nn

from secateur.errors import TraceError
from secateur.graph._channels import ChannelGraph
from secateur.graph._record import record
from secateur.graph._solve import solve


def trace(model: nn.Module, example: torch.Tensor | tuple[Any, ...]) -> ChannelGraph:
    """Find which channels of which tensors must be kept or removed together.

    The model runs once, in eval mode, at batch 1, while every operation is recorded (index tracing): any python
    control flow is fine because the model simply runs. The model itself is not changed: a shadow that shares its
    parameters runs in its place, and random state is put back.

    Args:
        model: A trained network.
        example: One input, or a tuple of positional inputs; of a batch, the first item is used.

    Returns:
        The channel graph. Channels that cannot be removed safely are in it too, with the reason.

    Raises:
        TraceError: If the model cannot run the example, or has no parameters.
    """
    arguments: tuple[Any, ...] = example if isinstance(example, tuple) else (example,)
    tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
    if not tensors:
        raise TraceError(f"`example` must hold at least one tensor; got {type(example).__name__}. Pass an input batch.")
    if next(model.parameters(), None) is None:
        raise TraceError(f"`model` ({type(model).__name__}) has no parameters; there is nothing to prune.")
    if tensors[0].numel() == 0:
        raise TraceError(
            f"`example` must hold at least one image; got a batch of shape {tuple(tensors[0].shape)}. "
            "Pass an input batch."
        )
    batch = tensors[0].shape[0] if tensors[0].dim() else 1
    single = tuple(t[:1] if isinstance(t, torch.Tensor) and t.dim() and t.shape[0] == batch else t for t in arguments)
    ledger, attributes = record(model, single)
    return solve(ledger, attributes, single)
