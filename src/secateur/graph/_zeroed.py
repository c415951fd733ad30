"""The reference for removed blocks: the original in which their branches give zero."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.graph._call import base_name
from secateur.graph._channels import Block
from secateur.graph._flow import Flow
from secateur.graph._running import run_under_


class ZeroBranches(TorchDispatchMode):
    """While active, one run of a full model adds zeros in the place of some residual branches.

    It knows nothing of modules, only in which sums of the forward pass the branches end.

    Args:
        blocks: Whose branches.
        inputs: Of the run, which the sums that count depend on.
    """

    def __init__(self, blocks: Iterable[Block], inputs: Any):
        super().__init__()
        self._operands = {block.addition: block.operand for block in blocks}
        self._flow = Flow()
        self._flow.feed(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = base_name(func)
        inputs = tuple(t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        operand = self._operands.get(self._flow.addition(name, inputs))  # type: ignore[arg-type]
        given = args
        if operand == 1:
            given = (args[0], torch.zeros_like(args[1]))
        elif operand == 0:
            # An addition in place must still write into its first operand.
            given = (args[0].zero_() if func._schema.is_mutable else torch.zeros_like(args[0]), args[1])
        out = func(*given, **kwargs)
        outputs = tuple(t for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        self._flow.step(func, name, not kwargs, inputs, outputs)
        return out


def zero_branches_(model: nn.Module, blocks: Iterable[Block]) -> nn.Module:
    """Make a full model add zeros in the place of some residual branches whenever it runs; returns it."""
    blocks = tuple(blocks)
    return run_under_(model, lambda inputs: ZeroBranches(blocks, inputs))
