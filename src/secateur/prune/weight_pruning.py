"""When weights are pruned: the kept fraction as a function of the progress of training.

What is pruned: a score and a budget, each a choice that can be written down, put together as one.

Pruning while a model is trained: which masks it has at which step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import BudgetError, SparsityError
from secateur.prune.masks import Scores, Weights, apply_masks, check_density, get_masks, prunable_weights, set_masks_
from secateur.prune.weight_scores import (
    Batch,
    erk_counts,
    keep_globally,
    keep_largest,
    keep_n_of_m,
    magnitude_scores,
    movement_scores,
    random_scores,
    snip_scores,
    taylor_scores,
)


class SparsitySchedule(ABC):
    """The kept fraction over a training run.

    Ask for the density whenever the masks may change, make masks of it (`keep_largest`, `keep_globally`) from the
    weights as they are then, and put them in with `set_masks_`. What is pruned scores 0 and stays pruned.
    """

    @abstractmethod
    def density_at(self, progress: float) -> float:
        """The fraction of weights kept, never rising.

        Args:
            progress: Part of the run that is done, from 0 to 1: (step - first) / steps.
        """


@dataclass(frozen=True)
class OneShot(SparsitySchedule):
    """All at once, at the start.

    Attributes:
        density: Kept fraction, in (0, 1).
    """

    density: float

    def __post_init__(self) -> None:
        check_density("density", self.density, dense=False)

    def density_at(self, progress: float) -> float:
        """The density, whatever the progress."""
        _check_progress(progress)
        return self.density


@dataclass(frozen=True)
class Iterative(SparsitySchedule):
    """In rounds, each of which keeps the same fraction of what is left:  density^(k / rounds) in round k.

    Round k, from 1, begins at progress (k - 1) / rounds.

    Attributes:
        density: Kept fraction at the end, in (0, 1).
        rounds: >= 1; one is `OneShot`.

    References:
        Frankle & Carbin, arXiv:1803.03635, iterative pruning.
    """

    density: float
    rounds: int = 5

    def __post_init__(self) -> None:
        check_density("density", self.density, dense=False)
        if self.rounds < 1:
            raise SparsityError(f"`rounds` must be at least 1; got {self.rounds}. 5 is usual.")

    def density_at(self, progress: float) -> float:
        """The density of the round that has begun last."""
        _check_progress(progress)
        done = min(int(progress * self.rounds) + 1, self.rounds)
        return self.density ** (done / self.rounds)


@dataclass(frozen=True)
class Cubic(SparsitySchedule):
    """Fast while there is much to prune, slow toward the end.

    With sparsity s = 1 - density, u = (progress - begin) / (end - begin) clipped to [0, 1]:
    s = s_final + (s_initial - s_final) * (1 - u)^3.

    Attributes:
        density: Kept fraction at the end, in (0, 1).
        initial_density: Kept fraction at the beginning, in (0, 1], above ``density``.
        begin: Progress at which pruning begins.
        end: Progress at which it ends; the rest of the run trains what is left.

    References:
        Zhu & Gupta, arXiv:1710.01878, Eq. (1).
    """

    density: float
    initial_density: float = 1.0
    begin: float = 0.0
    end: float = 0.75

    def __post_init__(self) -> None:
        check_density("density", self.density, dense=False)
        check_density("initial_density", self.initial_density, dense=True)
        if self.initial_density <= self.density:
            raise SparsityError(
                f"`initial_density` must be above density={self.density}; got {self.initial_density}. Begin with 1."
            )
        if not 0 <= self.begin < self.end <= 1:
            raise SparsityError(
                f"`begin` and `end` must be such that 0 <= begin < end <= 1; got {self.begin} and {self.end}. "
                "They are parts of the run."
            )

    def density_at(self, progress: float) -> float:
        """The density on the curve."""
        _check_progress(progress)
        done = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.density + (self.initial_density - self.density) * (1 - done) ** 3


def _check_progress(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise SparsityError(f"`progress` must be from 0 to 1; got {progress}. Divide the steps done by all steps.")


class WeightScore(ABC):
    """What every weight is worth. Implementations are frozen dataclasses; fields are configuration."""

    @abstractmethod
    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Scores, highest for the weights that should stay.

        Args:
            model: Left as it is.
            weights: Of `prunable_weights`.
            batches: Inputs and labels on the model's device, for scores that need gradients.
        """


@dataclass(frozen=True)
class MagnitudeScore(WeightScore):
    """`magnitude_scores`."""

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return magnitude_scores(weights)


@dataclass(frozen=True)
class RandomScore(WeightScore):
    """`random_scores`.

    Attributes:
        seed: Of the draw.
    """

    seed: int = 0

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return random_scores(weights, seed=self.seed)


@dataclass(frozen=True)
class TaylorScore(WeightScore):
    """`taylor_scores` of the cross-entropy."""

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return taylor_scores(model, weights, batches, F.cross_entropy)


@dataclass(frozen=True)
class SnipScore(WeightScore):
    """`snip_scores` of the cross-entropy."""

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return snip_scores(model, weights, batches, F.cross_entropy)


@dataclass(frozen=True)
class MovementScore(WeightScore):
    """`movement_scores` of the cross-entropy.

    Attributes:
        learning_rate: Of its steps, >= 0.
    """

    learning_rate: float = 0.01

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return movement_scores(model, weights, batches, F.cross_entropy, learning_rate=self.learning_rate)


class Allocation(ABC):
    """Which weights stay, by their scores. Implementations are frozen dataclasses; fields are configuration."""

    @abstractmethod
    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """Masks that keep at most a fraction of all weights, in (0, 1]."""

    def nearest(self, density: float) -> float:
        """The largest fraction up to ``density`` that can be asked for."""
        return density


@dataclass(frozen=True)
class GlobalAllocation(Allocation):
    """`keep_globally`: the highest scores, whatever their tensor."""

    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """See `Allocation`."""
        return keep_globally(scores, density)


@dataclass(frozen=True)
class UniformAllocation(Allocation):
    """The same fraction of every tensor, rounded down."""

    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """See `Allocation`."""
        return keep_largest(scores, {name: math.floor(density * score.numel()) for name, score in scores.items()})


@dataclass(frozen=True)
class ERKAllocation(Allocation):
    """`erk_counts`: sparser where tensors are larger."""

    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """See `Allocation`."""
        return keep_largest(scores, erk_counts(scores, density))


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
        exclude: Patterns of what is never pruned, see `prunable_weights`.
        every: Steps between two changes of the masks, >= 1.
    """

    score: WeightScore = MagnitudeScore()
    allocation: Allocation = GlobalAllocation()
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
        weights = prunable_weights(model, exclude=self.exclude)
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
        size = sum(weight.numel() for weight in prunable_weights(model, exclude=self.exclude).values())
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
    pruning: WeightPruning = WeightPruning()
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
        return apply_masks(model, self.pruning.masks(model, self.density_before(0, steps), self.batches))

    def update_(self, model: nn.Module, step: int, steps: int) -> None:
        """Put the masks of a step into a model that `begun` made, in place, if they change there."""
        density = self.density_before(step, steps)
        if step and density != self.density_before(step - 1, steps):
            set_masks_(model, get_masks(model) | self.pruning.masks(model, density, self.batches))
