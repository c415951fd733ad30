"""Remove residual blocks for real, and the independent reference: the original whose branches give zero."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import SurgeryError
from secateur.graph import Block, ChannelGraph, Replacement, StandIn

_ADDITIONS = frozenset({"aten::add", "aten::add_"})


class PassThrough(nn.Module):
    """Stands in for a removed module: returns its first tensor argument.

    Args:
        items: Length of the tuple to return, the tensor first and None after it; None to return the tensor itself.
    """

    def __init__(self, items: int | None = None):
        super().__init__()
        self._items = items

    @property
    def items(self) -> int | None:
        """Length of the tuple that it returns; None if it returns a tensor."""
        return self._items

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first tensor among the arguments."""
        tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        return self._packed(tensor)

    def _packed(self, tensor: torch.Tensor) -> Any:
        return tensor if self._items is None else (tensor, *[None] * (self._items - 1))

    def extra_repr(self) -> str:
        """What differs from the usual."""
        return "" if self._items is None else f"items={self._items}"


class Silence(PassThrough):
    """Stands in for a removed module: returns zeros of the shape of its first tensor argument."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros like the first tensor among the arguments."""
        tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        return self._packed(torch.zeros_like(tensor))


_CLASSES: dict[StandIn, type[PassThrough]] = {StandIn.PASS_THROUGH: PassThrough, StandIn.SILENCE: Silence}


def replace_(model: nn.Module, replacements: Iterable[Replacement]) -> None:
    """Put the stand-ins into a model of ours, outermost first; a module within a replaced one is gone with it.

    Raises:
        SurgeryError: If the model lacks one of the modules.
    """
    done: list[str] = []
    for replacement in sorted(replacements, key=lambda r: r.module.count(".")):
        name = replacement.module
        if any(name == outer or name.startswith(outer + ".") for outer in done):
            continue
        done.append(name)
        path, _, leaf = name.rpartition(".")
        try:
            model.get_submodule(name)
        except AttributeError as error:
            raise SurgeryError(f"`replacements` must name modules of the model; got {name!r}.") from error
        if not name:
            raise SurgeryError("`replacements` must name modules within the model; got the model itself.")
        stand_in = _CLASSES[replacement.stand_in](replacement.items)
        setattr(model.get_submodule(path), leaf, stand_in.train(model.training))


def replacements_in(model: nn.Module) -> tuple[Replacement, ...]:
    """The stand-ins that a cut model holds: what `replace_` needs to make them again."""
    kinds = {kind: stand_in for stand_in, kind in _CLASSES.items()}
    return tuple(
        Replacement(name, kinds[type(module)], module.items)
        for name, module in model.named_modules()
        if isinstance(module, PassThrough)
    )


def replacements_of(graph: ChannelGraph, removed_blocks: Iterable[str]) -> tuple[Replacement, ...]:
    """What stands in for the modules of some blocks."""
    return tuple(r for name in removed_blocks for r in graph.blocks_by_name[name].replacements)


def zero_branches_(model: nn.Module, blocks: Iterable[Block]) -> nn.Module:
    """Make a full model add zeros in the place of some residual branches whenever it runs; returns it.

    The reference for removed blocks: it knows nothing of modules, only which sums of the forward pass they end in.
    """
    mode = _ZeroBranches(blocks)

    def begin(*_: Any) -> None:
        mode.__enter__()

    def end(*_: Any) -> None:
        mode.__exit__(None, None, None)

    model.register_forward_pre_hook(begin, prepend=True)
    model.register_forward_hook(end, always_call=True)
    return model


class _ZeroBranches(TorchDispatchMode):
    def __init__(self, blocks: Iterable[Block]):
        super().__init__()
        self._operands = {block.addition: block.operand for block in blocks}
        self._number = 0
        self._fast = True

    def __enter__(self) -> "_ZeroBranches":
        self._number = 0
        # It adds within one opaque operation, and the sums would be numbered wrongly.
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.backends.mha.set_fastpath_enabled(self._fast)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name not in _ADDITIONS:
            return func(*args, **(kwargs or {}))
        operand = self._operands.get(self._number)
        self._number += 1
        if operand is None:
            return func(*args, **(kwargs or {}))
        first, second = args
        if operand == 1:
            return func(first, torch.zeros_like(second))
        # An addition in place must still write into its first operand.
        return func(first.zero_() if func._schema.is_mutable else torch.zeros_like(first), second)
