"""Which weights a search begins with."""

import copy
from dataclasses import dataclass

from torch import nn

from secateur.train import check_redrawable, redraw_


@dataclass(frozen=True)
class Warm:
    """Those of the model: a search of few epochs has something to judge from the first step on."""

    def of(self, model: nn.Module, seed: int) -> nn.Module:
        """The model itself."""
        del seed
        return model


@dataclass(frozen=True)
class Redrawn:
    """New ones, as in the paper: needs as many epochs as a training, and usually `SearchedWeights` or a student that is
    trained from scratch.
    """

    def of(self, model: nn.Module, seed: int) -> nn.Module:
        """A copy with weights of its own.

        Raises:
            ModelError: If a module has parameters and no way to draw them.
        """
        check_redrawable(model, "begin", "search from the weights that are there (begin=Warm()).")
        return redraw_(copy.deepcopy(model), seed)
