"""Weights drawn anew, by the modules that hold them."""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from secateur.errors import ModelError
from secateur.train._machine import seeded


def check_redrawable(model: nn.Module, name: str, way_out: str) -> None:
    """Refuse a model some of whose parameters nobody can draw.

    Args:
        model: To be drawn anew.
        name: What was given that asks for it, for the message.
        way_out: What else to do, a sentence for the message.

    Raises:
        ModelError: If a module has parameters of its own and no ``reset_parameters()``.
    """
    for path, module in model.named_modules():
        own = ", ".join(parameter for parameter, _ in module.named_parameters(recurse=False))
        if own and _drawing_of(module) is None:
            raise ModelError(
                f"`{name}` must be able to draw all weights anew; {path or 'the model'} ({type(module).__name__}) has "
                f"parameters of its own ({own}) and no reset_parameters(). Give it this method, or {way_out}"
            )


def redraw_(model: nn.Module, seed: int) -> nn.Module:
    """Draw all weights of a model anew, each module by its ``reset_parameters()``; returns the model.

    torch's other spelling, ``_reset_parameters()``, counts too. What a module holds is drawn before the module, which
    may draw it again. The same seed gives the same weights on every device; the caller's random state stays.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.to("cpu")  # Where a seed means the same on every machine.
    with seeded(torch.device("cpu"), seed), torch.no_grad():
        for module in reversed(list(model.modules())):
            draw = _drawing_of(module)
            if draw is not None:
                draw()
    return model.to(device)


def _drawing_of(module: nn.Module) -> Callable[[], object] | None:
    for name in ("reset_parameters", "_reset_parameters"):
        draw = getattr(module, name, None)
        if callable(draw):
            return cast(Callable[[], object], draw)
    return None
