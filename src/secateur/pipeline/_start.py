"""What the recovery begins with: the weights that the cut left, healed, or none at all."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.architecture import Architecture
from secateur.errors import TrainingError
from secateur.graph import ChannelGraph
from secateur.surgery import Cut, Healer, RecalibrateBatchNorm, Refit, cut
from secateur.train import Schedule, check_redrawable, redraw_

HEAL: tuple[Healer, ...] = (Refit(), RecalibrateBatchNorm())
"""Refit what lost inputs to give what it gave before, then measure the batch norms anew."""


@dataclass(frozen=True, eq=False)
class Uncut:
    """What is to be cut.

    Attributes:
        original: The model as it was given.
        searched: The same with the weights that the search trained; the original itself if it trained none.
        graph: The channel graph of both.
        images: Calibration batches, normalised, on the models' device.
        seed: Of weights that are drawn.
    """

    original: nn.Module
    searched: nn.Module
    graph: ChannelGraph
    images: Sequence[Tensor]
    seed: int


class Start(ABC):
    """How a student comes from the uncut model. Implementations are frozen dataclasses; fields are configuration."""

    @property
    @abstractmethod
    def done(self) -> str:
        """What was done to the student, as the name of a step."""

    @abstractmethod
    def check(self, model: nn.Module, schedule: Schedule) -> None:
        """Refuse a model or a recovery that it cannot be for, before any work.

        Raises:
            SecateurError: With the way out.
        """

    @abstractmethod
    def cut(self, uncut: Uncut, architecture: Architecture) -> Cut:
        """The student before any training, proved as long as its weights are those of the uncut model."""


@dataclass(frozen=True)
class Inherit(Start):
    """The student keeps the weights of its channels, and is healed.

    They are the weights that the search trained, if it trained any. The repairs compare with the model of these.

    Attributes:
        heal: Repairs right after the cut, in order.
    """

    heal: Sequence[Healer] = HEAL

    @property
    def done(self) -> str:
        """See `Start.done`."""
        return "cut and healed"

    def check(self, model: nn.Module, schedule: Schedule) -> None:
        """See `Start.check`: for any."""

    def cut(self, uncut: Uncut, architecture: Architecture) -> Cut:
        """See `Start.cut`."""
        return cut(uncut.searched, uncut.graph, architecture, calibration=uncut.images, heal=tuple(self.heal))


@dataclass(frozen=True)
class FromScratch(Start):
    """The student keeps its architecture alone: its weights are drawn anew, and all it knows comes from the recovery.

    The cut is made and proved with the original's weights. Then every module draws its own by its
    ``reset_parameters()`` (or torch's other spelling, ``_reset_parameters()``), as when it was made: what a module
    holds before the module itself, which may have other wishes for it. The same seed gives the same weights on every
    device.
    """

    @property
    def done(self) -> str:
        """See `Start.done`."""
        return "cut, weights drawn anew"

    def check(self, model: nn.Module, schedule: Schedule) -> None:
        """See `Start.check`.

        Raises:
            ModelError: If a module has parameters and no way to draw them.
            TrainingError: If there is no recovery.
        """
        if schedule.epochs == 0:
            raise TrainingError(
                "`schedule` must have epochs for a student from scratch, which knows nothing yet; got 0. Give it as "
                "many as the original had (--epochs), or let it inherit weights."
            )
        check_redrawable(
            model, "start", "let the student inherit its weights (without --from-scratch; in Python: start=Inherit())."
        )

    def cut(self, uncut: Uncut, architecture: Architecture) -> Cut:
        """See `Start.cut`."""
        pruned = cut(uncut.original, uncut.graph, architecture)
        return dataclasses.replace(pruned, model=redraw_(pruned.model, uncut.seed))
