"""Pruning while a model is trained: which masks it has at which step."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from secateur.sparsity._masks import masked, masks_of, set_masks_
from secateur.sparsity._pruning import WeightPruning
from secateur.sparsity._scores import Batch
from secateur.sparsity._weights import check_density


@dataclass(frozen=True)
class Sparsify:
    """The masks of a training run, as a function of its step and of the weights at that time.

    Before step s of S the density is ``schedule.density_at(s / (S - 1))``, at the steps 0, ``every``, 2 ``every``, ...
    and at the last one. Masks are made anew only where it has changed; what is pruned scores lowest and stays pruned.

    Attributes:
        density: Kept fraction at the end, in (0, 1); of the weights that may be pruned.
        pruning: How.
        batches: Inputs and labels for scores that need gradients.
    """

    density: float
    pruning: WeightPruning = WeightPruning()  # noqa: RUF009 - frozen
    batches: Sequence[Batch] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        check_density("density", self.density, dense=False)

    def density_before(self, step: int, steps: int) -> float:
        """The density with which a step is made.

        Args:
            step: From 0; ``steps`` stands for the end of the run.
            steps: Of the whole run; 0 prunes at once.
        """
        schedule, last = self.pruning.schedule(self.density), steps - 1
        if step >= last:
            return schedule.density_at(1.0)
        return schedule.density_at((step - step % self.pruning.every) / last)

    def begun(self, model: nn.Module, steps: int) -> nn.Module:
        """A masked copy, with the masks of the first step.

        Args:
            model: Left as it is. Masks that it has already stay where the plan makes none.
            steps: Of the whole run.

        Raises:
            SparsityError: See `WeightPruning.masks`.
        """
        return masked(model, self.pruning.masks(model, self.density_before(0, steps), self.batches))

    def update_(self, model: nn.Module, step: int, steps: int) -> None:
        """Put the masks of a step into a model that `begun` made, in place, if they change there."""
        density = self.density_before(step, steps)
        if step and density != self.density_before(step - 1, steps):
            set_masks_(model, masks_of(model) | self.pruning.masks(model, density, self.batches))
