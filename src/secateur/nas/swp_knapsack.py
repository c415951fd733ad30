"""The whole trade-off between loss and costs, from one table.

The best choice of one candidate per stage: a multiple-choice knapsack, solved exactly.

What a combination leaves of the budget: wider still, as far as it goes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from secateur._arrays import FloatArray, IntArray
from secateur.errors import BudgetError
from secateur.nas.swp_candidates import Options, Rows
from secateur.nas.swp_evolution import Evolution
from secateur.nas.swp_table import Bound, Combination, StageChoice, StageRows, StageTable, Sums, sweep, undominated
from secateur.search.knapsack import FULL_ENOUGH

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
    choices: tuple[StageChoice, ...]


def pareto(
    table: StageTable, fields: Sequence[str] | None = None, *, evolution: Evolution | None = None, seed: int = 0
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
    rows = StageRows.of(table, wanted)
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


_FEW = 10
"""Candidates of a stage that the first choice is made of."""
_LARGE = 1e6
"""Losses and costs go to the solver as numbers up to this."""
_SPARE = 1e-5 * _LARGE


@dataclass(frozen=True)
class Exact(Combination):
    """The best choice there is; see `exact`."""

    def combine(self, table: StageTable, seed: int) -> StageChoice:
        """The best choice; nothing is drawn."""
        return exact(table)


def exact(table: StageTable) -> StageChoice:
    """Choose one candidate of every stage so that the sum of losses is least, within every limit.

    The multiple-choice knapsack  min sum_s l_s(x_s)  subject to  base_f + sum_s c_fs(x_s) <= limit_f  for every f:

    1. candidates that another one of their stage beats in the loss and in every limited cost are left out;
    2. HiGHS solves the linear relaxation. Its dual values bound what each candidate can lead to, and those that
       cannot lead to anything as good as a first, quick choice are left out too;
    3. HiGHS solves the integer program over the others, in floating point, up to its tolerances;
    4. what the bounds cannot exclude from being as good as its answer is summed up in whole numbers (`clean_stale`).
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
    rows = StageRows.of(table, tuple(table.whole.room))
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


def _best(rows: StageRows, found: Sums, other: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
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

    rows: StageRows
    objective: FloatArray
    usage: FloatArray
    room: FloatArray
    units: FloatArray

    @classmethod
    def of(cls, rows: StageRows) -> "_Program":
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


def filled(options: Options, rows: Rows) -> Rows:
    """Take single steps up, to the next width or depth, while one fits and the budget is less than 99.5 % full.

    Few candidates are coarser than the widths there are: the best combination of them may leave room that costs nothing
    to use. Of the steps that fit, the one is taken whose choice is the furthest below its whole; of equal ones the
    first. Nothing gets narrower.

    Args:
        options: The choices.
        rows: Candidates within the budget.

    Returns:
        Candidates within the budget; no step fits, or it is full.
    """
    sizes = [len(stage.tops) for stage in options.of_stage]
    tops = np.concatenate([stage.tops for stage in options.of_stage])
    now = np.concatenate(rows)
    while True:
        ups = now + np.eye(len(now), dtype=np.int64)[now < tops]
        if not len(ups) or _fullness(options, now[None], sizes)[0] >= FULL_ENOUGH:
            return _by_stage(now, sizes)
        fits = _fullness(options, ups, sizes) <= 1
        if not fits.any():
            return _by_stage(now, sizes)
        below = (now / np.maximum(tops, 1))[now < tops]
        now = ups[int(np.where(fits, below, np.inf).argmin())]


def _by_stage(row: IntArray, sizes: list[int]) -> Rows:
    return tuple(np.split(row, np.cumsum(sizes)[:-1]))


def _fullness(options: Options, networks: IntArray, sizes: list[int]) -> FloatArray:
    """(networks,) the largest cost / limit of each; within the budget up to 1."""
    both = [options.network(_by_stage(row, sizes)) for row in networks]
    widths, blocks = np.stack([widths for widths, _ in both]), np.stack([blocks for _, blocks in both])
    limits = options.problem.limits
    found = options.problem.costs.fields(limits, widths, blocks)
    return np.max([found[name] / max(limit, 1e-300) for name, limit in limits.items()], axis=0)
