"""Remove residual blocks for real: stand-ins take the places of their modules."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from secateur.errors import SurgeryError
from secateur.graph import ChannelGraph, Replacement, StandIn


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
        setattr(model.get_submodule(path), leaf, stand_in_of(replacement).train(model.training))


def stand_in_of(replacement: Replacement) -> PassThrough:
    """A new module to take the place of the one that goes."""
    return _CLASSES[replacement.stand_in](replacement.items)


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
