"""The best choice of one candidate per stage: a multiple-choice knapsack, solved exactly."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from secateur.search._swp._sweep import Bound, Rows, Sums, sweep
from secateur.search._swp._table import Choice, Combination, FloatArray, Table

_FEW = 10
"""Candidates of a stage that the first choice is made of."""
_LARGE = 1e6
"""Losses and costs go to the solver as numbers up to this."""
_SPARE = 1e-5 * _LARGE


@dataclass(frozen=True)
class Exact(Combination):
    """The best choice there is; see `exact`."""

    def combine(self, table: Table, seed: int) -> Choice:
        """The best choice; nothing is drawn."""
        return exact(table)


def exact(table: Table) -> Choice:
    """Choose one candidate of every stage so that the sum of losses is least, within every limit.

    The multiple-choice knapsack  min sum_s l_s(x_s)  subject to  base_f + sum_s c_fs(x_s) <= limit_f  for every f:

    1. candidates that another one of their stage beats in the loss and in every limited cost are left out;
    2. HiGHS solves the linear relaxation. Its dual values bound what each candidate can lead to, and those that
       cannot lead to anything as good as a first, quick choice are left out too;
    3. HiGHS solves the integer program over the others, in floating point, up to its tolerances;
    4. what the bounds cannot exclude from being as good as its answer is summed up in whole numbers (`sweep`).
       The result is thus exactly within the limits, and exactly the best.

    Of choices with equal losses the one of least cost is returned, field by field in the order of the limits; of
    those equal in that too, the one with the lowest number in the first stage, then in the second, and so on.
    (Were more than 100,000 partial choices as good as HiGHS' answer, only as many would be compared.)

    Args:
        table: Candidates, costs and limits.

    Raises:
        BudgetError: If no choice keeps to the limits, with what is in reach.

    References:
        Sinha & Zoltners, The multiple-choice knapsack problem, Operations Research 27(3), 1979. Bounds by dual values:
        Geoffrion, Lagrangean relaxation for integer programming, 1974.
    """
    table.check()
    rows = Rows.of(table, tuple(table.whole.room))
    prices = _Program.of(rows).prices()
    near = rows.only(rows.nearest(prices, _FEW))
    first = _best(near, sweep(near, Bound(prices, np.inf), most=100 * _FEW))
    if first is not None:
        rows = rows.within(Bound.around(rows, prices, near.loss(first)))
    answer = _Program.of(rows).solve()
    bound = Bound.around(rows, prices, np.inf if answer is None else rows.loss(answer))
    best = _best(rows, sweep(rows, bound), answer)
    if best is None:
        raise table.out_of_reach()
    return table.choice(rows.picked(best))


def _best(rows: Rows, found: Sums, other: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
    """The best of the sums, or the other one if it is better, which it can only be if they are not complete."""
    best = [tuple(found.rows[found.by_loss()[0]].tolist())] if len(found.loss) else []
    return min([*best, *([] if other is None else [other])], key=rows.loss, default=None)


@dataclass(frozen=True, eq=False)
class _Program:
    """min objective . x, x in {0, 1}, one x of every stage, usage x <= room.

    Attributes:
        rows: What it is about.
        objective: (candidates of all stages,) scaled losses.
        usage: (fields, candidates of all stages) scaled costs.
        room: (fields,) scaled.
        units: (fields,) loss per unit of the objective, per cost per unit of usage.
    """

    rows: Rows
    objective: FloatArray
    usage: FloatArray
    room: FloatArray
    units: FloatArray

    @classmethod
    def of(cls, rows: Rows) -> "_Program":
        loss, cost = np.concatenate(rows.losses).astype(np.float64), np.concatenate(rows.costs, axis=1)
        unit = max(float(loss.max()) / _LARGE, 1.0)
        common = np.maximum(np.gcd.reduce(cost, axis=1), 1)
        units = np.maximum(common, cost.max(axis=1) / _LARGE)
        # Half a step more room lets no other sum of whole numbers in, and keeps those at the limit off the edge.
        room = (rows.room // common + 0.5) * common
        return cls(rows, loss / unit, cost / units[:, None], room / units, unit / units)

    def solve(self) -> tuple[int, ...] | None:
        """Rows of a choice within the room, the best one up to the solver's tolerances; None if it finds none."""
        # To the solver 1e-6 of a candidate is none of it. An answer that is over the room by that is refused, and asked
        # for again with a little less room: no longer the best perhaps, but close.
        for spare in (0.0, _SPARE):
            limits = [LinearConstraint(self.usage, -np.inf, (self.room - spare).tolist())] if len(self.room) else []
            found = milp(
                self.objective,
                integrality=np.ones(len(self.objective)),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(self._stages(), 1, 1), *limits],
                options={"mip_rel_gap": 0.0},
            )
            if found.x is None:
                return None
            ends = np.cumsum([len(row) for row in self.rows.losses])[:-1]
            chosen = tuple(int(part.argmax()) for part in np.split(found.x, ends))
            if self.rows.fits(chosen):
                return chosen
        return None

    def prices(self) -> FloatArray:
        """(fields,) loss per unit of cost: the dual values of the linear relaxation, or zeros if it has no solution."""
        if not len(self.room):
            return np.zeros(0)
        ones = np.ones(len(self.rows.losses))
        found = linprog(self.objective, self.usage, self.room, self._stages(), ones, method="highs")
        return np.zeros(len(self.room)) if found.x is None else np.maximum(-found.ineqlin.marginals, 0) * self.units

    def _stages(self) -> sparse.csr_array:
        """(stages, candidates of all stages) 1 where the candidate belongs to the stage."""
        return sparse.csr_array(sparse.block_diag([np.ones((1, len(row))) for row in self.rows.losses]))
