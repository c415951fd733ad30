"""Which widths of an axis and which depths of a chain of blocks a search chooses between."""

from dataclasses import dataclass

import numpy as np

from secateur.errors import BudgetError
from secateur.search._space import IntArray


@dataclass(frozen=True)
class Widths:
    """Search how many channels each axis keeps.

    Attributes:
        kept_fractions: Candidate widths as fractions of the full one; the full one is always among them. Each becomes
            the nearest width that the search space allows.

    Raises:
        BudgetError: If a fraction is not above 0 and at most 1.

    References:
        Dong & Yang (TAS), arXiv:1905.09717; the fractions are those of the reference code.
    """

    kept_fractions: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

    def __post_init__(self) -> None:
        if not self.kept_fractions or not all(0 < f <= 1 for f in self.kept_fractions):
            raise BudgetError(f"`kept_fractions` must lie above 0 and up to 1; got {self.kept_fractions}.")

    def of(self, levels: IntArray) -> tuple[int, ...]:
        """The candidates among the allowed widths of an axis, ascending, the full one last."""
        wanted = np.array([*self.kept_fractions, 1.0]) * levels[-1]
        nearest = np.abs(levels[None, :] - wanted[:, None]).argmin(axis=1)
        return tuple(int(width) for width in np.unique(levels[nearest]))


@dataclass(frozen=True)
class Depths:
    """Search how many of the first blocks each chain of residual blocks keeps.

    Attributes:
        stride: Chains of more than ``short`` blocks give up so many at a time.
        short: Chains of up to so many blocks give up one at a time.

    Raises:
        BudgetError: If a number is below 1.

    References:
        Dong & Yang (TAS), arXiv:1905.09717; 1, 3, 5, ... blocks of a stage, or 1, 2, 3, in the reference code, which
        counts the block that changes the resolution. That one is no removable block here, so the last candidate of a
        chain behind it is none at all.
    """

    stride: int = 2
    short: int = 4

    def __post_init__(self) -> None:
        if self.stride < 1 or self.short < 1:
            raise BudgetError(f"`stride` and `short` must be at least 1; got {self.stride} and {self.short}.")

    def of(self, blocks: int) -> tuple[int, ...]:
        """The candidates of a chain of so many blocks, ascending, all of them last."""
        return tuple(range(blocks, -1, -(1 if blocks <= self.short else self.stride)))[::-1]
