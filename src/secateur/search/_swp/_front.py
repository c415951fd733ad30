"""The whole trade-off between loss and costs, from one table."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.errors import BudgetError
from secateur.search._swp._evolve import Evolution
from secateur.search._swp._sweep import Rows, sweep, undominated
from secateur.search._swp._table import Choice, Table

_MOST = 1_000_000
"""Points of the front of the first stages; there are never more than different costs."""


@dataclass(frozen=True)
class Front:
    """Choices none of which is beaten by another one in the loss and in all costs.

    Attributes:
        fields: The costs that count.
        choices: From the cheapest to the dearest, by cost in the order of the fields.
    """

    fields: tuple[str, ...]
    choices: tuple[Choice, ...]


def pareto(
    table: Table, fields: Sequence[str] | None = None, *, evolution: Evolution | None = None, seed: int = 0
) -> Front:
    """All choices within the limits that no other one beats in the loss and in these costs.

    With one cost that is exact: the front of the first stages plus every candidate of the next one, without what is
    dominated, is the front of the stages up to that one. With several the front is the best that NSGA-II meets.

    Args:
        table: Candidates, costs and limits.
        fields: Which costs count; None means all that the table has. Limited ones always do.
        evolution: Sizes of NSGA-II; None means `Evolution()`. Without effect with one cost.
        seed: For NSGA-II.

    Raises:
        BudgetError: If a field has no costs, or no choice keeps to the limits.
        ImportError: If there are several costs and pymoo is not installed.
    """
    table.check()
    wanted = tuple(table.costs) if fields is None else (*fields, *(name for name in table.limits if name not in fields))
    for field in wanted:
        if field not in table.costs:
            raise BudgetError(f"`fields` must be among those with costs, {sorted(table.costs)}; got {field!r}.")
    rows = Rows.of(table, wanted)
    if len(wanted) == 1:
        met = sweep(rows, most=_MOST).rows
    else:
        met = (evolution or Evolution()).meet(rows, range(len(wanted)), seed)
    if not len(met):
        raise table.out_of_reach()
    loss, cost = rows.sums(met)
    best = undominated(loss, cost)
    ordered = best[np.lexsort((loss[best], *cost[::-1, best]))]
    return Front(wanted, tuple(table.choice(rows.picked(met[index].tolist())) for index in ordered))
