"""Which widths a search may choose."""

import math
from dataclasses import dataclass

import numpy as np

from secateur.errors import BudgetError
from secateur.graph import ChannelAxis, ChannelGraph

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class SearchSpace:
    """The allowed widths of every prunable axis.

    A width is a multiple of lcm(divisor, the axis' own divisor) that is not below the minimum, or the full size: an
    axis may always stay whole. An axis too small for any other width stays whole.

    Attributes:
        min_width: Fewest channels an axis may keep.
        divisor: Widths are multiples of it. 8 or 16 make a smaller model also a faster one on most hardware.
        min_kept_fraction: Smallest part of its channels an axis may keep, 0 to 1; guards a layer against collapse.

    Raises:
        BudgetError: If a field is out of range.
    """

    min_width: int = 1
    divisor: int = 1
    min_kept_fraction: float = 0.0

    def __post_init__(self) -> None:
        for name in ("min_width", "divisor"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise BudgetError(f"`{name}` must be a whole number of channels, at least 1; got {value!r}.")
        if not 0 <= self.min_kept_fraction <= 1:
            raise BudgetError(f"`min_kept_fraction` must be from 0 to 1; got {self.min_kept_fraction!r}.")

    def widths(self, axis: ChannelAxis) -> IntArray:
        """The allowed widths of one axis, ascending; the last is its full size."""
        step = math.lcm(self.divisor, axis.divisor)
        least = max(self.min_width, math.ceil(self.min_kept_fraction * axis.size - 1e-9))
        multiples = np.arange(step, axis.size, step, dtype=np.int64)
        return np.append(multiples[multiples >= least], axis.size)

    def levels(self, graph: ChannelGraph) -> tuple[IntArray, ...]:
        """The allowed widths of each prunable axis, in the order of ``graph.prunable``."""
        return tuple(self.widths(axis) for axis in graph.prunable)
