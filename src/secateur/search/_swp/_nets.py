"""Which networks learn in every step."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from secateur.errors import TrainingError
from secateur.search._swp._options import Options, Rows


class Nets(ABC):
    """Which networks learn in a step. Implementations are frozen dataclasses."""

    @property
    @abstractmethod
    def full_learns(self) -> bool:
        """Whether the full net learns from the labels, or only hands its features on."""

    @abstractmethod
    def of(self, options: Options, draw: np.random.Generator) -> tuple[Rows, ...]:
        """The other networks of one step, as candidates of every stage."""


@dataclass(frozen=True)
class Sandwich(Nets):
    """The full net, the tiny net, and some that are drawn: every channel learns in every step.

    Attributes:
        random: How many are drawn.

    References:
        Zhang et al. (SWP), arXiv:2011.04908; Yu & Huang, arXiv:1903.05134, Section 3.1, the sandwich rule.
    """

    random: int = 2

    def __post_init__(self) -> None:
        if self.random < 0:
            raise TrainingError(f"`random` must not be negative; got {self.random}. 2 is usual.")

    @property
    def full_learns(self) -> bool:
        """It does."""
        return True

    def of(self, options: Options, draw: np.random.Generator) -> tuple[Rows, ...]:
        """The tiny net and the drawn ones."""
        return (options.tiny, *(options.drawn(draw) for _ in range(self.random)))


@dataclass(frozen=True)
class Drawn(Nets):
    """Networks that are drawn, and no others: the sandwich's ablation. Late channels learn rarely, the full net never.

    Attributes:
        random: How many are drawn.
    """

    random: int = 3

    def __post_init__(self) -> None:
        if self.random < 1:
            raise TrainingError(f"`random` must be at least 1; got {self.random}. 3 is usual.")

    @property
    def full_learns(self) -> bool:
        """It does not."""
        return False

    def of(self, options: Options, draw: np.random.Generator) -> tuple[Rows, ...]:
        """The drawn ones."""
        return tuple(options.drawn(draw) for _ in range(self.random))
