"""Choose one candidate per stage from a table of losses and costs.

`solve_knapsack` finds the best choice within the limits exactly, `pareto_front` the whole trade-off between loss and
costs, and `fill_budget` widens a choice further with what it leaves of the budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from secateur._arrays import FloatArray, IntArray
from secateur._kinds import settings
from secateur.errors import BudgetError
from secateur.nas.swp_candidates import CandidateRows, CandidateSpace
from secateur.nas.swp_evolution import Evolution
from secateur.nas.swp_table import (
    Bound,
    Combination,
    PartialChoices,
    ReducedTable,
    StageChoice,
    StageTable,
    enumerate_nondominated,
    nondominated_indices,
)
from secateur.search.ranking import FULL_ENOUGH

_MAX_FRONT = 1_000_000
"""The most points of the front of the first stages. There are never more points than different costs."""


@settings
class ParetoFront:
    """Choices of which none dominates another in the loss and the costs that count.

    Attributes:
        fields: The costs that count.
        choices: From the cheapest to the dearest, by cost in the order of the fields.
    """

    fields: tuple[str, ...]
    choices: tuple[StageChoice, ...]


def pareto_front(
    table: StageTable, fields: Sequence[str] | None = None, *, evolution: Evolution | None = None, seed: int = 0
) -> ParetoFront:
    """Return the choices within the limits that no other one dominates in the loss and these costs.

    With one cost the front is exact: the front of the first stages plus every candidate of the next one, without what
    is dominated, is the front of the stages up to that one. With several costs it is the best that NSGA-II finds.

    Args:
        table: Candidates, costs and limits.
        fields: The costs that count; None means all that the table has. Limited ones always count.
        evolution: Settings of NSGA-II; None means `Evolution()`. Without effect with one cost.
        seed: Random seed of NSGA-II.

    Raises:
        BudgetError: If a field has no costs, or no choice keeps to the limits.
        ImportError: If there are several costs and pymoo is not installed.
    """
    table.check()
    wanted = tuple(table.costs) if fields is None else (*fields, *(name for name in table.limits if name not in fields))
    for field in wanted:
        if field not in table.costs:
            raise BudgetError(f"`fields` must be among those with costs, {sorted(table.costs)}; got {field!r}.")
    rows = ReducedTable.of(table, wanted)
    if len(wanted) == 1:
        found = enumerate_nondominated(rows, most=_MAX_FRONT).rows
    else:
        found = (evolution or Evolution()).explore(rows, range(len(wanted)), seed)
    if not len(found):
        raise table.infeasible()
    loss, cost = rows.totals(found)
    best = nondominated_indices(loss, cost)
    ordered = best[np.lexsort((loss[best], *cost[::-1, best]))]
    return ParetoFront(wanted, tuple(table.choose(rows.candidate_numbers(found[index].tolist())) for index in ordered))


_NEAREST = 10
"""Candidates of each stage of which the first choice is made."""
_SCALE = 1e6
"""Losses and costs are scaled to numbers up to this for the solver, whose tolerances are absolute."""
# Ten times what the solver may overlook: 1e-6 of the dearest candidate. See `_IntegerProgram.solve`.
_SPARE_CAPACITY = 1e-5 * _SCALE


@settings
class ExactKnapsack(Combination):
    """Find the best choice; see `solve_knapsack`."""

    def combine(self, table: StageTable, seed: int) -> StageChoice:
        """Return the best choice; the seed has no effect."""
        return solve_knapsack(table)


def solve_knapsack(table: StageTable) -> StageChoice:
    """Choose one candidate of every stage so that the sum of losses is smallest within every limit.

    The multiple-choice knapsack  min sum_s l_s(x_s)  subject to  base_f + sum_s c_fs(x_s) <= limit_f  for every f:

    1. Candidates that are dominated within their stage in the loss and every limited cost are left out.
    2. HiGHS solves the linear relaxation. Its dual values bound the loss of all choices with a candidate, and
       candidates whose bound exceeds the loss of a first, quickly found choice are left out.
    3. HiGHS solves the integer program over the rest, in floating point, up to its tolerances.
    4. All choices that the bounds allow to be as good as that answer are added up in whole numbers
       (`enumerate_nondominated`). So the result is exactly within the limits and exactly the best.

    Of choices with equal losses the one of smallest cost is returned, field by field in the order of the limits; of
    those equal in that too, the one with the lowest number in the first stage, then in the second, and so on. If more
    than 100,000 partial choices were as good as HiGHS' answer, only that many would be compared.

    Args:
        table: Candidates, costs and limits.

    Raises:
        BudgetError: If no choice keeps to the limits; it says which costs can be reached.

    References:
        Sinha & Zoltners, The multiple-choice knapsack problem, Operations Research 27(3), 1979. Bounds by dual values:
        Geoffrion, Lagrangean relaxation for integer programming, 1974.
    """
    table.check()
    rows = ReducedTable.of(table, tuple(table.as_integers.capacity))
    prices = _IntegerProgram.of(rows).prices()
    # Steps 1 and 2. Any choice within the capacity is a bound; a few candidates of every stage give a good one quickly.
    # Here the bound is infinite, so that its prices only decide which sums are kept if there are too many.
    near = rows.select(rows.cheapest(prices, _NEAREST))
    first = _best(near, enumerate_nondominated(near, Bound(prices, np.inf), most=100 * _NEAREST))
    if first is not None:
        rows = rows.prune(Bound.around(rows, prices, near.loss(first)))
    # Steps 3 and 4. The solver takes a candidate of weight 1e-6 for unused, so that its answer may exceed a limit.
    # It only bounds the sums in whole numbers, which decide.
    answer = _IntegerProgram.of(rows).solve()
    bound = Bound.around(rows, prices, np.inf if answer is None else rows.loss(answer))
    best = _best(rows, enumerate_nondominated(rows, bound), answer)
    if best is None:
        raise table.infeasible()
    return table.choose(rows.candidate_numbers(best))


def _best(rows: ReducedTable, found: PartialChoices, other: tuple[int, ...] | None = None) -> tuple[int, ...] | None:
    """The best of the choices found, or the other one, which can only be better if the enumeration is incomplete."""
    best = [tuple(found.rows[found.order_by_loss()[0]].tolist())] if len(found.loss) else []
    return min([*best, *([] if other is None else [other])], key=rows.loss, default=None)


@dataclass(frozen=True, eq=False)
class _IntegerProgram:
    """min objective . x with x in {0, 1}, one x = 1 in every stage, and usage x <= capacity.

    Attributes:
        rows: The candidates.
        objective: (candidates of all stages,) scaled losses.
        usage: (fields, candidates of all stages) scaled costs.
        capacity: (fields,) scaled capacity.
        units: (fields,) loss per unit of the objective, per cost per unit of usage.
    """

    rows: ReducedTable
    objective: FloatArray
    usage: FloatArray
    capacity: FloatArray
    units: FloatArray

    @classmethod
    def of(cls, rows: ReducedTable) -> "_IntegerProgram":
        loss, cost = np.concatenate(rows.losses).astype(np.float64), np.concatenate(rows.costs, axis=1)
        unit = max(float(loss.max()) / _SCALE, 1.0)
        common = np.maximum(np.gcd.reduce(cost, axis=1), 1)
        units = np.maximum(common, cost.max(axis=1) / _SCALE)
        # Half a step more admits no further sum of whole numbers, and keeps sums at the limit away from the edge.
        capacity = (rows.capacity // common + 0.5) * common
        return cls(rows, loss / unit, cost / units[:, None], capacity / units, unit / units)

    def solve(self) -> tuple[int, ...] | None:
        """Return rows of a choice within the capacity, best up to the solver's tolerances; None if it finds none."""
        # The solver takes 1e-6 of a candidate for 0. If its answer exceeds the capacity by that, it is asked again with
        # a little less capacity. The second answer may not be the best, but it is close and only serves as a bound.
        for spare in (0.0, _SPARE_CAPACITY):
            limits = (
                [LinearConstraint(self.usage, -np.inf, (self.capacity - spare).tolist())] if len(self.capacity) else []
            )
            found = milp(
                self.objective,
                integrality=np.ones(len(self.objective)),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(self._stages(), 1, 1), *limits],
                # By default HiGHS stops 0.01 % above the best.
                options={"mip_rel_gap": 0.0},
            )
            if found.x is None:
                return None
            ends = np.cumsum([len(row) for row in self.rows.losses])[:-1]
            # Whole numbers up to the tolerance: the largest of a stage is its 1.
            chosen = tuple(int(part.argmax()) for part in np.split(found.x, ends))
            if self.rows.fits(chosen):
                return chosen
        return None

    def prices(self) -> FloatArray:
        """Return the (fields,) dual values of the linear relaxation, in loss per cost; zeros without a solution."""
        if not len(self.capacity):
            return np.zeros(0)
        ones = np.ones(len(self.rows.losses))
        found = linprog(self.objective, self.usage, self.capacity, self._stages(), ones, method="highs")
        # A marginal is the change of the loss per unit of capacity: not positive, and the negative of the price.
        return np.zeros(len(self.capacity)) if found.x is None else np.maximum(-found.ineqlin.marginals, 0) * self.units

    def _stages(self) -> sparse.csr_array:
        """(stages, candidates of all stages): 1 where the candidate belongs to the stage."""
        return sparse.csr_array(sparse.block_diag([np.ones((1, len(row))) for row in self.rows.losses]))


def fill_budget(options: CandidateSpace, rows: CandidateRows) -> CandidateRows:
    """Raise widths and depths step by step while a step fits and less than 99.5 % of the budget is used.

    The scored candidates are few, so the best combination of them may leave a part of the budget unused. Of the steps
    to the next width or depth that fit, the one is taken whose number is the smallest fraction of its maximum; of equal
    ones the first. Nothing gets narrower.

    Args:
        options: What there is to choose.
        rows: A network within the budget.

    Returns:
        A network within the budget into which no further step fits, or which uses at least 99.5 % of it.
    """
    sizes = [len(stage.max_numbers) for stage in options.of_stage]
    tops = np.concatenate(options.largest)
    now = np.concatenate(rows)
    while True:
        ups = now + np.eye(len(now), dtype=np.int64)[now < tops]
        if not len(ups) or _used_fraction(options, now[None], sizes)[0] >= FULL_ENOUGH:
            return _split_by_stage(now, sizes)
        # No step is scored: wider never costs accuracy, and the differences between candidates are much larger.
        fits = _used_fraction(options, ups, sizes) <= 1
        if not fits.any():
            return _split_by_stage(now, sizes)
        fraction = (now / np.maximum(tops, 1))[now < tops]
        now = ups[int(np.where(fits, fraction, np.inf).argmin())]


def _split_by_stage(row: IntArray, sizes: list[int]) -> CandidateRows:
    return tuple(np.split(row, np.cumsum(sizes)[:-1]))


def _used_fraction(options: CandidateSpace, networks: IntArray, sizes: list[int]) -> FloatArray:
    """(networks,) the largest cost / limit of each network, at most 1 within the budget."""
    both = [options.network_sizes(_split_by_stage(row, sizes)) for row in networks]
    widths, blocks = np.stack([widths for widths, _ in both]), np.stack([blocks for _, blocks in both])
    limits = options.context.limits
    found = options.context.costs.fields(limits, widths, blocks)
    # A limit may be zero.
    return np.max([found[name] / max(limit, 1e-300) for name, limit in limits.items()], axis=0)
