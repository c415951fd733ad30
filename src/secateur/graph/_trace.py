"""`trace`: the public verb of this room."""

from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import TraceError
from secateur.graph._channels import ChannelGraph
from secateur.graph._components import components
from secateur.graph._ledger import BoolArray, Ledger
from secateur.graph._record import record
from secateur.graph._solve import solve


class HeadUnit(Enum):
    """What is kept or removed as one in attention."""

    DIMENSION = "dimension"
    """The same dimensions of every head, where that leaves the scale of the attention as it is; else whole heads."""
    HEAD = "head"
    """Whole heads."""


def trace(
    model: nn.Module, example: torch.Tensor | tuple[Any, ...], *, heads: HeadUnit = HeadUnit.DIMENSION
) -> ChannelGraph:
    """Find which channels of which tensors must be kept or removed together.

    The model runs once, in eval mode, at batch 1, while every operation is recorded (index tracing): any python
    control flow is fine because the model simply runs. The model itself is not changed: a shadow that shares its
    parameters runs in its place, and random state is put back.

    Args:
        model: A trained network.
        example: One input, or a tuple of positional inputs; of a batch, the first item is used.
        heads: What is kept or removed as one in attention. Where fewer dimensions per head would change the scale of
            the attention (`scaled_dot_product_attention` takes it from them unless told), it is whole heads always.

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
    by_head = _by_head(ledger, heads)
    if by_head.any():
        ledger, attributes = record(model, single, by_head=by_head)
    return solve(ledger, attributes, single)


def _by_head(ledger: Ledger, heads: HeadUnit) -> BoolArray:
    """(ids,) which belong to attention that must be cut by whole heads."""
    root = components(ledger.count, ledger.ties)
    marked = np.zeros(ledger.count, dtype=bool)
    scaled = np.zeros(ledger.count, dtype=bool)
    for ids in ledger.scaled:
        scaled[root[ids]] = True
    for vectors in ledger.attended.values():
        roots = root[np.concatenate(vectors)] if vectors else np.zeros(0, np.int64)
        if heads is HeadUnit.HEAD or scaled[roots].any():
            marked[roots] = True
    return marked[root]
