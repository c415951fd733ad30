"""How the temperature of the draws falls during a search."""

import math
from dataclasses import dataclass

from secateur.errors import TrainingError


def _check(first: float, last: float) -> None:
    if not (math.isfinite(first) and math.isfinite(last) and first > 0 and last > 0):
        raise TrainingError(f"`first` and `last` must be positive and finite; got {first} and {last}. Try 10 and 0.1.")


@dataclass(frozen=True)
class Linear:
    """tau(x) = first + (last - first) * x at the fraction x of the search.

    Attributes:
        first: > 0.
        last: > 0.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, Section 3.2 (10 to 0.1).
    """

    first: float = 10.0
    last: float = 0.1

    def __post_init__(self) -> None:
        _check(self.first, self.last)

    def at(self, fraction: float) -> float:
        """tau at a fraction of the search, 0 to 1."""
        return self.first + (self.last - self.first) * fraction


@dataclass(frozen=True)
class Cosine:
    """tau(x) = last + (first - last) * (1 + cos(pi * x)) / 2 at the fraction x of the search.

    Attributes:
        first: > 0.
        last: > 0.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, reference code (5 to 0.1).
    """

    first: float = 5.0
    last: float = 0.1

    def __post_init__(self) -> None:
        _check(self.first, self.last)

    def at(self, fraction: float) -> float:
        """tau at a fraction of the search, 0 to 1."""
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * fraction)) / 2
