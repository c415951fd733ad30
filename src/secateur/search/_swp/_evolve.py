"""Choosing one candidate per stage by evolution, as in the paper."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from secateur.errors import BudgetError
from secateur.search._swp._sweep import Rows
from secateur.search._swp._table import Choice, Combination, IntArray, Table


@dataclass(frozen=True)
class Evolution(Combination):
    """A genetic algorithm over the numbers of the candidates; needs the extra ``evolution``.

    Parents are drawn by binary tournament; a child has each stage from one parent or the other, and each stage is
    drawn anew with a small probability; the best of parents and children survive. Choices over a limit rank behind all
    others, by how far they are over. Candidates that another one of their stage beats in everything are left out. It
    ends after its generations, whatever it has found.

    Attributes:
        population: Choices in a generation.
        generations: How many there are, with the first one, which is drawn.
        mutation: Probability for each stage of a child to be drawn anew; None means one stage on average.

    Raises:
        BudgetError: If a number is out of range.

    References:
        The paper (Zhang et al., arXiv:2011.04908) searches by evolution without giving its operators. These are pymoo's
        (Blank & Deb, IEEE Access 8, 2020); several objectives: NSGA-II, Deb et al., 2002.
    """

    population: int = 100
    generations: int = 100
    mutation: float | None = None

    def __post_init__(self) -> None:
        for name in ("population", "generations"):
            if getattr(self, name) < 2:
                raise BudgetError(f"`{name}` must be at least 2; got {getattr(self, name)}. 100 is usual.")
        if self.mutation is not None and not 0 <= self.mutation <= 1:
            raise BudgetError(f"`mutation` must be a probability, 0 to 1; got {self.mutation}. None suits most.")

    def combine(self, table: Table, seed: int) -> Choice:
        """The best choice it meets.

        Raises:
            BudgetError: If no choice keeps to the limits, or it meets none that does.
            ImportError: If pymoo is not installed.
        """
        table.check()
        rows = Rows.of(table, tuple(table.whole.room))
        met = self.meet(rows, (), seed)
        if not len(met):
            raise BudgetError(
                f"`generations` must be enough to meet a choice within the budget; got {self.generations} of "
                f"{self.population}. `Exact` says whether there is one. {table.out_of_reach()}"
            )
        loss, cost = rows.sums(met)
        best = np.lexsort((*met.T[::-1], *cost[::-1], loss))[0]
        return table.choice(rows.picked(met[best].tolist()))

    def meet(self, rows: Rows, objectives: Sequence[int], seed: int) -> IntArray:
        """(n, stages) the different choices within the room that it meets, by row, in lexicographic order.

        Args:
            rows: Candidates and room.
            objectives: Costs to be minimised together with the loss, by number of the field; none means the loss only.
            seed: For all that is drawn; the caller's random numbers are not touched.
        """
        mutation = 1 / len(rows.losses) if self.mutation is None else self.mutation
        met = _genetic().evolved(rows, objectives, self, mutation, seed)
        return met[(rows.sums(met)[1] <= rows.room[:, None]).all(axis=0)]


def _genetic() -> ModuleType:
    if importlib.util.find_spec("pymoo") is None:
        raise ImportError("`Evolution` needs pymoo; got none. Run pip install 'secateur[evolution]'.")
    from secateur.search._swp import _genetic

    return _genetic
