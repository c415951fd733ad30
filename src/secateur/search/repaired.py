"""How near networks come to the original once they are repaired, by which searches compare them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from secateur._batches import first_images
from secateur.architecture import Architecture
from secateur.graph.trace import Example
from secateur.prune.cut import Cut, Repair, cut
from secateur.prune.distance import OutputDistance
from secateur.prune.repair import RecalibrateBatchNorm, Refit, batch_statistics
from secateur.search.base import SearchContext

QUICK_REPAIRS: tuple[Repair, ...] = (Refit(rows_per_unknown=16, in_one_pass=True), RecalibrateBatchNorm())
"""The usual repairs in a tenth of the time, on fewer images: good enough to compare."""

_MOST_IMAGES, _FEWEST_IMAGES = 256, 32
_PASS_MACS = 1.5e11
"""Multiply-accumulates of a pass over the images that networks are fitted to: some seconds on one core."""
_PASS_BYTES = 2**30
"""Memory of that pass, three of the largest activations."""


class RepairedNetworks:
    """Cuts and repairs networks of one search, and compares their outputs with the original's.

    What is the same for all of them, the original's outputs and batch-norm statistics, is computed once, when it is
    first needed.

    Attributes:
        held_out: The images that networks are compared on.
    """

    def __init__(
        self, context: SearchContext, repairs: Sequence[Repair], fit: Sequence[Example], held_out: Sequence[Example]
    ):
        """Take as many of the images as one short pass is made for.

        Args:
            context: The search.
            repairs: Made after every cut.
            fit: Batches that repairs are fitted to.
            held_out: Batches that they have not seen.
        """
        most = _images_of_a_pass(context)
        self._inputs = context.inputs
        self._fit, self._repairs = _joined(first_images(fit, most)), tuple(repairs)
        self.held_out = first_images(held_out, max(most // 2, _FEWEST_IMAGES))
        self._distance: OutputDistance | None = None

    @property
    def distance(self) -> OutputDistance:
        """Measures how far outputs are from the original's, on images that no repair has seen."""
        if self._distance is None:
            self._distance = OutputDistance(self._inputs.model, self.held_out)
            self._repairs = _with_statistics(self._repairs, self._inputs.model, self._fit)
        return self._distance

    def cut(self, architecture: Architecture) -> Cut:
        """Cut the original, and repair it."""
        self.distance  # noqa: B018 - the statistics that the repairs share
        model, graph = self._inputs.model, self._inputs.graph
        return cut(model, graph, architecture, calibration=self._fit, repairs=self._repairs, held_out=self.held_out)


def _images_of_a_pass(context: SearchContext) -> int:
    """How many images networks are fitted to, so that one pass over them is short and fits into memory."""
    activations = context.inputs.graph.activations.values()
    largest = max((math.prod(activation.shape[1:]) for activation in activations), default=1)
    by_time = _PASS_MACS / max(context.costs.original.macs, 1)
    by_memory = _PASS_BYTES / (12 * max(largest, 1))
    return int(min(_MOST_IMAGES, max(_FEWEST_IMAGES, min(by_time, by_memory))))


def _joined(batches: Sequence[Example]) -> list[Example]:
    """Batches as one, so that one pass repairs a whole network; those that are no single tensors stay as they are."""
    tensors = [batch for batch in batches if isinstance(batch, Tensor)]
    return [torch.cat(tensors)] if len(tensors) == len(batches) else list(batches)


def _with_statistics(repairs: Sequence[Repair], model: nn.Module, images: Sequence[Example]) -> tuple[Repair, ...]:
    """The repairs, which know the statistics of the original's batch norms: each network would measure them again."""
    if not any(isinstance(repair, RecalibrateBatchNorm) for repair in repairs):
        return tuple(repairs)
    known = batch_statistics(model, images)
    return tuple(replace(each, known=known) if isinstance(each, RecalibrateBatchNorm) else each for each in repairs)
