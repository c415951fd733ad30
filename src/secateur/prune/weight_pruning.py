"""Configurations for pruning single weights: a schedule, a score and an allocation, combined in `WeightPruning`.

`Sparsify` applies such a configuration while a model is trained.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import field

from torch import Tensor, nn
from torch.nn import functional as F

from secateur._batches import move
from secateur._kinds import settings
from secateur.errors import BudgetError, SparsityError
from secateur.prune.masks import Scores, Weights, apply_masks, check_density, get_masks, prunable_weights, set_masks_
from secateur.prune.weight_scores import (
    Batch,
    Loss,
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
    """The kept fraction of the weights as a function of the progress of training.

    Whenever the masks may change, compute masks of the current density from the current weights (`keep_largest`,
    `keep_globally`), and set them with `set_masks_`. Pruned weights have score 0 and stay pruned.
    """

    @abstractmethod
    def density_at(self, progress: float) -> float:
        """Return the kept fraction, which never increases.

        Args:
            progress: The completed part of the run, from 0 to 1: (step - first) / steps.
        """


@settings
class OneShot(SparsitySchedule):
    """Prune all weights at the start.

    Attributes:
        density: The kept fraction, in (0, 1).
    """

    density: float

    def __post_init__(self) -> None:
        check_density("density", self.density, dense=False)

    def density_at(self, progress: float) -> float:
        """Return the density, at any progress."""
        _check_progress(progress)
        return self.density


@settings
class Iterative(SparsitySchedule):
    """Prune in rounds that each keep the same fraction of the remaining weights:  density^(k / rounds) in round k.

    Round k, from 1, begins at progress (k - 1) / rounds.

    Attributes:
        density: The kept fraction at the end, in (0, 1).
        rounds: The number of rounds, >= 1; one round is `OneShot`.

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
        """Return the density of the current round."""
        _check_progress(progress)
        # At progress 1 the last round is complete, and there is no further one.
        done = min(int(progress * self.rounds) + 1, self.rounds)
        return self.density ** (done / self.rounds)


@settings
class Cubic(SparsitySchedule):
    """Prune fast at the beginning and slowly toward the end.

    With sparsity s = 1 - density, u = (progress - begin) / (end - begin) clipped to [0, 1]:
    s = s_final + (s_initial - s_final) * (1 - u)^3.

    Attributes:
        density: The kept fraction at the end, in (0, 1).
        initial_density: The kept fraction at the beginning, in (0, 1], above ``density``.
        begin: The progress at which pruning begins.
        end: The progress at which it ends; the rest of the run trains the remaining weights.

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
        """Return the density on the curve."""
        _check_progress(progress)
        done = min(max((progress - self.begin) / (self.end - self.begin), 0.0), 1.0)
        # Eq. (1) in densities: with s = 1 - density it keeps its form.
        return self.density + (self.initial_density - self.density) * (1 - done) ** 3


def _check_progress(progress: float) -> None:
    if not 0 <= progress <= 1:
        raise SparsityError(f"`progress` must be from 0 to 1; got {progress}. Divide the steps done by all steps.")


class WeightScore(ABC):
    """The importance of every weight. Implementations are frozen dataclasses whose fields are the configuration."""

    @abstractmethod
    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Return scores, highest for the weights to keep.

        Args:
            model: Not modified.
            weights: The result of `prunable_weights`.
            batches: Inputs and labels on the model's device, for scores that need gradients.
        """


@settings
class MagnitudeScore(WeightScore):
    """Scores of `magnitude_scores`."""

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return magnitude_scores(weights)


@settings
class RandomScore(WeightScore):
    """Scores of `random_scores`.

    Attributes:
        seed: The random seed.
    """

    seed: int = 0

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return random_scores(weights, seed=self.seed)


@settings
class TaylorScore(WeightScore):
    """Scores of `taylor_scores`.

    Attributes:
        loss: The mean loss of a batch of outputs and targets; None is the cross-entropy. `secateur.compress` puts that
            of its task here.
    """

    loss: Loss | None = field(default=None, repr=False, compare=False)

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return taylor_scores(model, weights, batches, self.loss or F.cross_entropy)


@settings
class SnipScore(WeightScore):
    """Scores of `snip_scores`.

    Attributes:
        loss: The mean loss of a batch of outputs and targets; None is the cross-entropy. `secateur.compress` puts that
            of its task here.
    """

    loss: Loss | None = field(default=None, repr=False, compare=False)

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return snip_scores(model, weights, batches, self.loss or F.cross_entropy)


@settings
class MovementScore(WeightScore):
    """Scores of `movement_scores`.

    Attributes:
        learning_rate: The learning rate of its steps, >= 0.
        loss: See `TaylorScore`.
    """

    learning_rate: float = 0.01
    loss: Loss | None = field(default=None, repr=False, compare=False)

    def __call__(self, model: nn.Module, weights: Weights, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """See `WeightScore`."""
        return movement_scores(model, weights, batches, self.loss or F.cross_entropy, learning_rate=self.learning_rate)


class Allocation(ABC):
    """A rule for which weights to keep. Implementations are frozen dataclasses whose fields are the configuration."""

    @abstractmethod
    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """Return masks that keep at most a fraction ``density``, in (0, 1], of all weights."""

    def attainable_density(self, density: float) -> float:
        """Return the largest supported density up to ``density``."""
        return density


@settings
class GlobalAllocation(Allocation):
    """Keep the highest scores of all tensors together (`keep_globally`)."""

    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """See `Allocation`."""
        return keep_globally(scores, density)


@settings
class UniformAllocation(Allocation):
    """Keep the same fraction of every tensor, rounded down."""

    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """See `Allocation`."""
        # Not `uniform_counts`, which rounds to the nearest count: here the density is an upper bound.
        return keep_largest(scores, {name: math.floor(density * score.numel()) for name, score in scores.items()})


@settings
class ERKAllocation(Allocation):
    """Keep fewer weights in larger tensors (`erk_counts`)."""

    def __call__(self, scores: Scores, density: float) -> dict[str, Tensor]:
        """See `Allocation`."""
        return keep_largest(scores, erk_counts(scores, density))


@settings
class NOfM(Allocation):
    """Keep n of every m neighbors (`keep_n_of_m`). The density must be n / m; a higher one keeps everything.

    Attributes:
        n: The number of weights to keep in each group.
        m: The size of a group.
    """

    n: int = 2
    m: int = 4

    def attainable_density(self, density: float) -> float:
        """Return n / m, or the density if it is lower."""
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
        # A schedule passes through higher densities, which the pattern does not have: everything is kept until it ends.
        return masks if density == self.n / self.m else {name: mask.logical_or(~mask) for name, mask in masks.items()}


@settings
class WeightPruning:
    """How single weights are pruned, except the density.

        WeightPruning(TaylorScore(), ERKAllocation(), schedule=partial(Cubic, end=0.5), exclude=("conv1", "linear"))

    Attributes:
        score: The score of each weight.
        allocation: The rule for which weights to keep.
        schedule: Makes the schedule for a final density: `Cubic`, `OneShot`, `Iterative`, or one of them with other
            settings by `functools.partial`. With a lambda, whose name changes, a run cannot be resumed.
        exclude: Patterns of weights that are never pruned; see `prunable_weights`.
        every: The number of steps between two changes of the masks, >= 1.
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
        """Return masks that keep a fraction of the model's current weights.

        Args:
            model: Not modified; it may have masks already.
            density: The kept fraction of the weights that may be pruned, in (0, 1].
            batches: Inputs and labels for scores that need gradients, on any device.

        Raises:
            SparsityError: If the density is out of range, a pattern matches nothing, or batches are missing.
        """
        check_density("density", density, dense=True)
        # Read through the masks: what was pruned before is 0 here, so it scores lowest and stays pruned.
        weights = prunable_weights(model, exclude=self.exclude)
        device = next(iter(weights.values())).device
        here = [move(batch, device) for batch in batches]
        return self.allocation(self.score(model, weights, here), density)

    def density_within(self, model: nn.Module, nonzero: float) -> float:
        """Return the density with which a model has at most ``nonzero`` parameters that are not zero.

        All parameters that may not be pruned (biases, norms, excluded weights) count as not zero.

        Args:
            model: A model without masks.
            nonzero: The bound on the number of parameters that are not zero.

        Returns:
            The density in (0, 1]; 1 if the model is within the bound already.

        Raises:
            BudgetError: If more parameters than that may not be pruned.
        """
        # Both numbers count a tensor that modules share once.
        size = sum(weight.numel() for weight in prunable_weights(model, exclude=self.exclude).values())
        rest = sum(parameter.numel() for parameter in model.parameters()) - size
        # The bound is on all parameters, the density only on those that may be pruned.
        room = math.floor(nonzero) - rest
        if room >= size:
            return 1.0
        if room < 1:
            raise BudgetError(
                f"`nonzero` must leave room for the {rest} parameters that are not pruned one by one (biases, norms, "
                f"what is excluded); got {math.floor(nonzero)}. Allow more than {rest}, or exclude less."
            )
        # For a fixed pattern, such as 2 of 4, there may be no density that uses the whole bound.
        return self.allocation.attainable_density(room / size)


@settings
class Sparsify:
    """The masks of a training run, as a function of the step and of the weights at that step.

    Before step s of S the density is ``schedule.density_at(s / (S - 1))``, at the steps 0, ``every``, 2 ``every``, ...
    and at the last one. Masks are computed only if it changes; pruned weights have the lowest score and stay pruned.

    Attributes:
        density: The kept fraction at the end, in (0, 1), of the weights that may be pruned.
        pruning: How the weights are pruned.
        batches: Inputs and labels for scores that need gradients.
    """

    density: float
    pruning: WeightPruning = WeightPruning()
    # Not in the `repr`, by which a checkpoint recognizes its run.
    batches: Sequence[Batch] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        check_density("density", self.density, dense=False)

    def density_before(self, step: int, steps: int) -> float:
        """Return the density during a step.

        Args:
            step: The number of the step, from 0; ``steps`` stands for the end of the run.
            steps: The number of steps of the whole run; with 0, all pruning happens at once.
        """
        # A function of the step alone, so that a resumed run needs nothing but the masks, which are in the student's
        # state.
        schedule, last = self.pruning.schedule(self.density), steps - 1
        if step >= last:
            # The last step trains at the final density, also if it is no multiple of `every`, or the only step.
            return schedule.density_at(1.0)
        # The density of the last step at which masks may have changed.
        return schedule.density_at((step - step % self.pruning.every) / last)

    def start(self, model: nn.Module, steps: int) -> nn.Module:
        """Return a copy of a model with the masks of the first step.

        Args:
            model: Not modified. Masks that it has already stay on weights that are not pruned here.
            steps: The number of steps of the whole run.

        Raises:
            SparsityError: See `WeightPruning.masks`.
        """
        return apply_masks(model, self.pruning.masks(model, self.density_before(0, steps), self.batches))

    def update_(self, model: nn.Module, step: int, steps: int) -> None:
        """Set the masks of a step in place in a model that `start` returned, if the density changes at this step."""
        density = self.density_before(step, steps)
        # The masks of step 0 are those of `start`.
        if step and density != self.density_before(step - 1, steps):
            # `set_masks_` wants every mask of the model; weights that are excluded here may have one from before.
            set_masks_(model, get_masks(model) | self.pruning.masks(model, density, self.batches))
