"""What is pruned: a score and a budget, each a choice that can be written down, put together as one."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import BudgetError, SparsityError
from secateur.sparsity._allocation import erk, keep_globally, keep_largest, keep_n_of_m
from secateur.sparsity._schedule import Cubic, SparsitySchedule
from secateur.sparsity._scores import Batch, magnitude, movement, random_scores, snip, taylor
from secateur.sparsity._weights import Scores, Weights, check_density, prunable


class WeightScore(ABC):
    """What every weight is worth. Implementations are frozen dataclasses; fields are configuration."""

    @abstractmethod
    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Scores, highest for the weights that should stay.

        Args:
            model: Left as it is.
            weights: Of `prunable`.
            batches: Inputs and labels on the model's device, for scores that need gradients.
        """


@dataclass(frozen=True)
class ByMagnitude(WeightScore):
    """`magnitude`."""

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return magnitude(weights)


@dataclass(frozen=True)
class AtRandom(WeightScore):
    """`random_scores`.

    Attributes:
        seed: Of the draw.
    """

    seed: int = 0

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return random_scores(weights, seed=self.seed)


@dataclass(frozen=True)
class ByTaylor(WeightScore):
    """`taylor` of the cross-entropy."""

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return taylor(model, weights, batches, F.cross_entropy)


@dataclass(frozen=True)
class BySnip(WeightScore):
    """`snip` of the cross-entropy."""

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return snip(model, weights, batches, F.cross_entropy)


@dataclass(frozen=True)
class ByMovement(WeightScore):
    """`movement` of the cross-entropy.

    Attributes:
        learning_rate: Of its steps, >= 0.
    """

    learning_rate: float = 0.01

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return movement(model, weights, batches, F.cross_entropy, learning_rate=self.learning_rate)


class Allocation(ABC):
    """Which weights stay, by their scores. Implementations are frozen dataclasses; fields are configuration."""

    @abstractmethod
    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """Masks that keep at most a fraction of all weights, in (0, 1]."""

    def nearest(self, density: float) -> float:
        """The largest fraction up to ``density`` that can be asked for."""
        return density


@dataclass(frozen=True)
class Globally(Allocation):
    """`keep_globally`: the highest scores, whatever their tensor."""

    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """See `Allocation`."""
        return keep_globally(scores, density)


@dataclass(frozen=True)
class Evenly(Allocation):
    """The same fraction of every tensor, rounded down."""

    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """See `Allocation`."""
        return keep_largest(scores, {name: math.floor(density * score.numel()) for name, score in scores.items()})


@dataclass(frozen=True)
class ByERK(Allocation):
    """`erk`: sparser where tensors are larger."""

    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """See `Allocation`."""
        return keep_largest(scores, erk(scores, density))


@dataclass(frozen=True)
class NOfM(Allocation):
    """`keep_n_of_m`: the pattern alone says how many stay; a density above n / m keeps everything.

    Attributes:
        n: Kept of each group.
        m: Size of a group.
    """

    n: int = 2
    m: int = 4

    def nearest(self, density: float) -> float:
        """See `Allocation.nearest`: that of the pattern, if it is not above."""
        return min(density, self.n / self.m)

    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """See `Allocation`.

        Raises:
            SparsityError: If the density is below that of the pattern.
        """
        masks = keep_n_of_m(scores, self.n, self.m)
        if density < self.n / self.m:
            raise SparsityError(
                f"`density` must be at least {self.n / self.m:g} for {self.n} of {self.m}; got {density}. "
                "Ask for that much, or use another allocation."
            )
        return masks if density == self.n / self.m else {name: mask.logical_or(~mask) for name, mask in masks.items()}


@dataclass(frozen=True)
class WeightPruning:
    """How single weights are pruned, whatever is left of them.

        WeightPruning(ByTaylor(), ByERK(), schedule=partial(Cubic, end=0.5), exclude=("conv1", "linear"))

    Attributes:
        score: What each weight is worth.
        allocation: Which weights stay, by their scores.
        schedule: Makes the schedule for a final density: `Cubic`, `OneShot`, `Iterative`, or one of them with other
            settings by `functools.partial` (a lambda has another name in every process: no resume).
        exclude: Patterns of what is never pruned, see `prunable`.
        every: Steps between two changes of the masks, >= 1.
    """

    score: WeightScore = ByMagnitude()
    allocation: Allocation = Globally()
    schedule: Callable[[float], SparsitySchedule] = Cubic
    exclude: tuple[str, ...] = ()
    every: int = 10

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SparsityError(f"`every` must be at least 1; got {self.every}. 10 to 100 steps is usual.")

    def masks(self, model: nn.Module, density: float, batches: Sequence[Batch] = ()) -> dict[str, Tensor]:
        """The masks that keep a fraction of a model's weights as they are now.

        Args:
            model: Left as it is; may be masked already.
            density: Kept fraction of the weights that may be pruned, in (0, 1].
            batches: For scores that need gradients; on any device.

        Raises:
            SparsityError: If the density is out of range, a pattern matches nothing, or batches are missing.
        """
        check_density("density", density, dense=True)
        weights = prunable(model, exclude=self.exclude)
        device = next(iter(weights.values())).device
        here = [(images.to(device), labels.to(device)) for images, labels in batches]
        return self.allocation(self.score(model, weights, here), density)

    def density_within(self, model: nn.Module, nonzero: float) -> float:
        """The kept fraction with which a model has at most so many parameters that are not zero.

        What may not be pruned (biases, norms, what is excluded) counts whole.

        Args:
            model: Without masks.
            nonzero: Bound on its parameters that are not zero.

        Returns:
            In (0, 1]; 1 if the model is within the bound as it is.

        Raises:
            BudgetError: If what may not be pruned is more than that, with the least that can be reached.
        """
        size = sum(weight.numel() for weight in prunable(model, exclude=self.exclude).values())
        rest = sum(parameter.numel() for parameter in model.parameters()) - size
        room = math.floor(nonzero) - rest
        if room >= size:
            return 1.0
        if room < 1:
            raise BudgetError(
                f"`nonzero` must leave room for the {rest} parameters that are not pruned one by one (biases, norms, "
                f"what is excluded); got {math.floor(nonzero)}. Allow more than {rest}, or exclude less."
            )
        return self.allocation.nearest(room / size)
