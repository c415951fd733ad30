"""What to learn and from what."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.distill import AlignedFeatures, Objective
from secateur.sparsity import Sparsify
from secateur.train._batches import Batches
from secateur.train._execution import Eager, Execution
from secateur.train._schedule import Schedule

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Task:
    """Everything of a run that does not change."""

    source: Batches
    validation: Batches | None
    augment: Any
    objective: Objective
    schedule: Schedule
    alignment: AlignedFeatures | None
    fabric: "Fabric"
    sparsify: Sparsify | None = None
    execution: Execution = Eager()  # noqa: RUF009 - frozen

    @property
    def steps(self) -> int:
        """Optimiser steps of one epoch."""
        return self.schedule.steps_per_epoch(len(self.source))

    def learning_rate_at(self, step: int) -> float:
        """Of a step, from 0 over all epochs."""
        return self.schedule.learning_rate_at(step, steps=self.schedule.epochs * self.steps)

    def density_after(self, epoch: int) -> float | None:
        """Kept fraction of the weights after so many epochs; None if none are pruned."""
        steps = self.schedule.epochs * self.steps
        return None if self.sparsify is None else self.sparsify.density_before(max(epoch * self.steps - 1, 0), steps)

    def settled(self, epoch: int) -> bool:
        """Whether so many epochs have ended with as few weights as the result may have."""
        return self.density_after(epoch) == self.density_after(self.schedule.epochs)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of an epoch, both from 0."""
        batch_size = self.schedule.batch_size
        return self.source.batches(
            batch_size,
            device=self.fabric.device,
            seed=self.schedule.seed,
            epoch=epoch,
            augment=self.augment,
            drop_last=len(self.source) >= batch_size,
            start=start,
        )
