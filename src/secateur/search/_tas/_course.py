"""What a search by TAS is, before it begins."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import TrainingError
from secateur.search._tas._choice import Choice
from secateur.search._tas._price import Price
from secateur.search._tas._temperature import Cosine, Linear
from secateur.supernet import Blending
from secateur.train import Batches, Schedule

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Adam:
    """The optimiser of the architecture.

    Attributes:
        learning_rate: > 0.
        betas: Decay of the running mean and of the running square.
        weight_decay: L2 factor of the logits: pulls towards equal probabilities.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, reference code, but for the learning rate; see `TAS`.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise TrainingError(f"`learning_rate` must be positive and finite; got {self.learning_rate}. Try 0.02.")

    def build(self, choice: Choice) -> torch.optim.Optimizer:
        """A torch optimiser of the logits."""
        return torch.optim.Adam(
            choice.parameters(), lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )


@dataclass(frozen=True, eq=False)
class Course:
    """Everything of a search that does not change.

    Attributes:
        price: Costs, limits, tolerance.
        for_weights: Images that the weights learn from.
        for_choice: Images that the choice is judged on; none of the others.
        validation: Images that the derived network is measured on after every epoch, for the record; None for none.
        augment: For both.
        calibration: Image batches for the batch norms of a derived network.
        schedule: Epochs, batch size, learning rate and optimiser of the weights, seed.
        adam: Optimiser of the choice.
        temperature: Of the draws.
        blending: Of the two widths that are drawn.
        fabric: Device and precision.
    """

    price: Price
    for_weights: Batches
    for_choice: Batches
    validation: Batches | None
    augment: Any
    calibration: tuple[Tensor, ...]
    schedule: Schedule
    adam: Adam
    temperature: Linear | Cosine
    blending: Blending
    fabric: "Fabric"

    @property
    def steps(self) -> int:
        """Pairs of steps in an epoch."""
        return min(self.schedule.steps_per_epoch(len(half)) for half in (self.for_weights, self.for_choice))

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Pairs of batches, the first for the weights; without the first so many pairs."""
        size = self.schedule.batch_size
        first, second = (
            half.batches(
                size,
                device=self.fabric.device,
                seed=self.schedule.seed,
                epoch=epoch,
                augment=self.augment,
                drop_last=len(half) >= size,
                start=start,
            )
            for half in (self.for_weights, self.for_choice)
        )
        return zip(first, second, strict=False)
