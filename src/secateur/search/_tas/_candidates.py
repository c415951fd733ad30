"""What a search may choose between: a few widths of every axis, a few depths of every chain of blocks."""

from dataclasses import dataclass

import numpy as np

from secateur.errors import BudgetError
from secateur.search._problem import Problem
from secateur.search._streams import Streams

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


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


@dataclass(frozen=True, eq=False)
class Candidates:
    """Every candidate of a search as tables; rows are padded with the last candidate.

    Attributes:
        axes: (n,) numbers of the prunable axes that have a choice.
        widths: (n, candidates) ascending.
        open_widths: (n, candidates) False for padding.
        chains: (m,) numbers of the chains of the graph that have a choice.
        depths: (m, candidates) numbers of blocks kept, ascending.
        open_depths: (m, candidates) False for padding.
        streams: Which widths go together.
    """

    axes: IntArray
    widths: IntArray
    open_widths: BoolArray
    chains: IntArray
    depths: IntArray
    open_depths: BoolArray
    streams: Streams

    @classmethod
    def of(cls, problem: Problem, widths: Widths | None, depths: Depths | None, seen: frozenset[str]) -> "Candidates":
        """The candidates of a problem.

        Args:
            problem: For the allowed widths and the chains.
            widths: None leaves all axes whole.
            depths: None keeps all blocks.
            seen: Names of the axes that can be searched; the others stay whole.

        Raises:
            BudgetError: If nothing has two candidates.
        """
        names = problem.costs.axes
        by_axis = {
            number: widths.of(levels)
            for number, levels in enumerate(problem.levels)
            if widths is not None and names[number] in seen
        }
        chains = problem.evidence.graph.chains
        by_chain = {number: depths.of(len(chain)) for number, chain in enumerate(chains) if depths is not None}
        by_axis, by_chain = (
            {number: found for number, found in rows.items() if len(found) > 1} for rows in (by_axis, by_chain)
        )
        if not by_axis and not by_chain:
            raise BudgetError(
                "`space` must leave some axis two widths, or some chain of blocks two depths; got none with a choice. "
                "Lower divisor, min_width or min_kept_fraction, or search depths too (for a net with residual blocks)."
            )
        return cls(*_table(by_axis), *_table(by_chain), problem.streams)


def _table(rows: dict[int, tuple[int, ...]]) -> tuple[IntArray, IntArray, BoolArray]:
    longest = max(map(len, rows.values()), default=1)
    table = np.array([(*row, *[row[-1]] * (longest - len(row))) for row in rows.values()], dtype=np.int64)
    valid = np.array([[column < len(row) for column in range(longest)] for row in rows.values()], dtype=np.bool_)
    return np.array(list(rows), dtype=np.int64), table.reshape(-1, longest), valid.reshape(-1, longest)
