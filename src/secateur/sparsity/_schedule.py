"""When weights are pruned: the kept fraction as a function of the progress of training."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from secateur.errors import SparsityError
from secateur.sparsity._weights import check_density


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
    """Fast while there is much to prune, slow towards the end.

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
