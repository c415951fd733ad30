"""What a search may choose between: a few widths of every axis, a few depths of every chain of blocks."""

from dataclasses import dataclass

import numpy as np

from secateur.errors import BudgetError
from secateur.search._problem import Problem
from secateur.search._ratios import Depths, Widths
from secateur.search._space import IntArray
from secateur.search._streams import Streams

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


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
