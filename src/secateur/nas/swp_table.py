"""Losses and costs of the candidates of every stage, and all sums of them that can be part of a best choice.

`StageTable` is what a search has measured. `IntegerTable` has the same in whole numbers, so that sums are exact, and
`ReducedTable` leaves out candidates that no best choice needs. `enumerate_nondominated` adds up stage after stage.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from secateur._arrays import FloatArray, IntArray
from secateur.cost.budget import format_count
from secateur.errors import BudgetError, TrainingError

CostArray = np.ndarray[tuple[int, ...], np.dtype[np.int64] | np.dtype[np.float64]]

_BITS = 60
"""Sums are compared as whole numbers below 2^60, which keeps more digits than float64 has."""


@dataclass(frozen=True)
class StageChoice:
    """One candidate of every stage.

    Attributes:
        picked: Number of the candidate, by stage.
        loss: Sum of the losses of the candidates.
        cost: Cost of the whole network by field: base + sum of the costs of the candidates.
    """

    picked: tuple[int, ...]
    loss: float
    cost: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class StageTable:
    """Loss and costs of every candidate of every stage. Both add up over the stages.

    The loss of a choice is sum_s losses[s][picked[s]], its cost of a field base + sum_s costs[field][s][picked[s]].

    Attributes:
        losses: For each stage: (candidates,) finite losses, in one unit.
        costs: For each field ("macs", "params", ...) and each stage: (candidates,) costs, not negative; whole numbers
            for counts, floats for seconds.
        base: Cost of the rest of the network, by field.
        limits: The largest cost of the whole network, by field. A field without a limit is only reported.

    Raises:
        ValueError: If shapes, fields or types do not fit together.
        TrainingError: If a loss is not finite.
        BudgetError: If a limit is not a number, or limits a field that has no costs.
    """

    losses: tuple[FloatArray, ...]
    costs: Mapping[str, tuple[CostArray, ...]]
    base: Mapping[str, float]
    limits: Mapping[str, float]

    def __post_init__(self) -> None:
        _check_losses(self.losses)
        for field, rows in self.costs.items():
            _check_costs(field, rows, [len(row) for row in self.losses])
        if set(self.base) != set(self.costs):
            raise ValueError(f"`base` must have the fields of `costs`, {sorted(self.costs)}; got {sorted(self.base)}.")
        for field, limit in self.limits.items():
            if field not in self.costs:
                raise BudgetError(f"`limits` must be on fields with costs, {sorted(self.costs)}; got {field!r}.")
            if not limit >= 0:
                raise BudgetError(f"`limits` must not be negative or NaN; got {field}={limit!r}.")

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(self.losses)

    def choose(self, picked: Sequence[int]) -> StageChoice:
        """Return the choice of the candidates with these numbers, one for each stage."""
        numbers = tuple(int(number) for number in picked)
        loss = math.fsum(float(row[number]) for row, number in zip(self.losses, numbers, strict=True))
        cost = {
            field: _add([self.base[field], *(row[number].item() for row, number in zip(rows, numbers, strict=True))])
            for field, rows in self.costs.items()
        }
        return StageChoice(numbers, loss, cost)

    def allows(self, choice: StageChoice) -> bool:
        """Say whether a choice keeps to every limit; a cost equal to its limit is allowed."""
        return all(choice.cost[field] <= limit for field, limit in self.limits.items())

    def cost_range(self, field: str) -> tuple[float, float]:
        """Return the cost of the whole network with the cheapest and with the dearest candidate of every stage."""
        rows, base = self.costs[field], self.base[field]
        return _add([base, *(row.min().item() for row in rows)]), _add([base, *(row.max().item() for row in rows)])

    def check(self) -> None:
        """Refuse limits that no choice can meet one by one.

        Raises:
            BudgetError: If there are such limits; it says which costs can be reached.
        """
        if any(self.cost_range(field)[0] > limit for field, limit in self.limits.items()):
            raise self.infeasible()

    def infeasible(self) -> BudgetError:
        """Return the error for limits that no choice meets."""
        ranges = ["{} from {} to {}".format(field, *map(_format, self.cost_range(field))) for field in self.limits]
        got = ", ".join(f"{name}<={_format(limit)}" for name, limit in self.limits.items())
        return BudgetError(
            f"`budget` must leave room for one candidate of every stage; got {got}. In reach, each alone: "
            f"{', '.join(ranges)}. Raise the budget, or allow smaller candidates."
        )

    @cached_property
    def as_integers(self) -> "IntegerTable":
        """The table in whole numbers."""
        return IntegerTable.of(self)


@dataclass(frozen=True, eq=False)
class IntegerTable:
    """A table in whole numbers, so that sums are exact and no rounding lets a choice exceed a limit.

    Counts stay as they are. Floats are multiplied by the power of two that brings their largest sum to 2^60. Losses are
    then rounded, costs rounded up and the capacity down.

    Attributes:
        losses: For each stage: (candidates,).
        costs: For each field and each stage: (candidates,).
        capacity: For each limited field: what the candidates may cost together; negative if the base alone exceeds it.
    """

    losses: tuple[IntArray, ...]
    costs: Mapping[str, tuple[IntArray, ...]]
    capacity: Mapping[str, int]

    @classmethod
    def of(cls, table: StageTable) -> "IntegerTable":
        """Convert a table."""
        shift = _exponent(table.losses)
        losses = tuple(np.rint(np.ldexp(row, shift)).astype(np.int64) for row in table.losses)
        costs: dict[str, tuple[IntArray, ...]] = {}
        capacity: dict[str, int] = {}
        for field, rows in table.costs.items():
            shift = 0 if _are_counts(rows) else _exponent(rows)
            costs[field] = tuple(_scaled_up(row, shift) for row in rows)
            limit = table.limits.get(field, math.inf)
            if limit < math.inf:
                # In fractions, because the difference of two floats may round to more than the capacity is.
                exact = (Fraction(limit) - Fraction(table.base[field])) * Fraction(2) ** shift
                # Cut to int64: more than the sum of all costs is no limit, and -1 says as much as any negative number.
                capacity[field] = max(min(math.floor(exact), 2 ** (_BITS + 1)), -1)
        return cls(losses, costs, {field: capacity[field] for field in table.limits if field in capacity})


class Combination(ABC):
    """A method that chooses one candidate of every stage within the limits. Implementations are frozen dataclasses."""

    @abstractmethod
    def combine(self, table: StageTable, seed: int) -> StageChoice:
        """Choose candidates of small total loss within every limit: the same ones for the same table and seed.

        Args:
            table: Candidates, costs and limits.
            seed: Random seed.

        Raises:
            BudgetError: If no choice keeps to the limits.
        """


def _check_losses(losses: Sequence[FloatArray]) -> None:
    if not losses:
        raise ValueError("`losses` must have at least one stage; got none.")
    for stage, row in enumerate(losses):
        if row.ndim != 1 or not len(row) or row.dtype.kind != "f":
            raise ValueError(f"`losses` must be (candidates,) floats; got {row.dtype} {row.shape} for stage {stage}.")
        if not np.isfinite(row).all():
            number = int(np.flatnonzero(~np.isfinite(row))[0])
            raise TrainingError(
                f"`losses` must be finite; got {row[number]} for candidate {number} of stage {stage}. "
                "Leave out candidates that cannot be scored, or train with a smaller learning rate."
            )


def _check_costs(field: str, rows: Sequence[CostArray], candidates: Sequence[int]) -> None:
    shapes, wanted = [row.shape for row in rows], [(number,) for number in candidates]
    if shapes != wanted:
        raise ValueError(f"`costs` must have one number per candidate, {wanted}; got {shapes} for {field}.")
    kinds = {row.dtype.kind for row in rows}
    if kinds not in ({"i"}, {"f"}):
        raise ValueError(f"`costs` must be whole numbers or floats throughout; got {sorted(kinds)} for {field}.")
    if not all(np.isfinite(row).all() and row.min() >= 0 for row in rows):
        raise ValueError(f"`costs` must be finite and not negative; got others for {field}.")
    if sum(row.max().item() for row in rows) >= 2**_BITS and kinds == {"i"}:
        raise ValueError(f"`costs` must sum up to less than 2^{_BITS}; got more for {field}.")


def _are_counts(rows: Sequence[CostArray]) -> bool:
    return rows[0].dtype.kind == "i"


def _exponent(rows: Sequence[CostArray]) -> int:
    """The power of two that brings the largest sum of magnitudes close to, but not over, 2^60."""
    # A power of two, because scaling by it changes no digit of a float.
    total = math.fsum(float(np.abs(row).max()) for row in rows)
    return _BITS - math.frexp(total)[1] if total > 0 else 0


def _scaled_up(row: CostArray, shift: int) -> IntArray:
    return np.ceil(np.ldexp(row, shift)).astype(np.int64) if shift or row.dtype.kind == "f" else row.astype(np.int64)


def _add(numbers: Sequence[float]) -> float:
    """Add whole numbers exactly, and floats with one rounding at the end."""
    return sum(numbers) if all(isinstance(number, int) for number in numbers) else math.fsum(numbers)


def _format(value: float) -> str:
    return format_count(value) if value >= 1 or value == 0 else f"{value:.3g}"


MAX_PARTIAL_CHOICES = 100_000
"""Partial choices kept after a stage. With more, an enumeration is not complete."""
_SUMS_AT_ONCE = 1_000_000
"""Sums computed at once, which take tens of megabytes."""
_UNLIMITED = 2**62


@dataclass(frozen=True, eq=False)
class ReducedTable:
    """The candidates that some best choice may need, in whole numbers above the smallest of their stage.

    Attributes:
        numbers: For each stage: (candidates,) numbers of the candidates in the table, ascending.
        losses: For each stage: (candidates,).
        costs: For each stage: (fields, candidates).
        capacity: (fields,) what the candidates may cost together, above the smallest; negative if nothing fits.
    """

    numbers: tuple[IntArray, ...]
    losses: tuple[IntArray, ...]
    costs: tuple[IntArray, ...]
    capacity: IntArray

    @classmethod
    def of(cls, table: StageTable, fields: Sequence[str]) -> "ReducedTable":
        """Keep the candidates that are not dominated within their stage in the loss and these costs.

        A dominated candidate is never needed: the one that dominates it has no larger loss and no larger cost.
        """
        whole, stages = table.as_integers, range(table.stages)
        absolute = [_stack([whole.costs[field][stage] for field in fields], whole.losses[stage]) for stage in stages]
        least = [cost.min(axis=1, keepdims=True) for cost in absolute]
        # Every choice has one candidate of each stage, so that these differences order the choices as the losses do.
        losses = [loss - loss.min() for loss in whole.losses]
        costs = [cost - low for cost, low in zip(absolute, least, strict=True)]
        # A capacity that the dearest candidates fit into is no limit. Cut to their sum, it cannot overflow.
        most = sum(cost.max(axis=1) for cost in absolute)
        capacity = np.minimum([whole.capacity.get(field, _UNLIMITED) for field in fields], most)
        capacity = (capacity - np.concatenate(least, axis=1).sum(axis=1)).astype(np.int64)
        every = cls(tuple(np.arange(len(loss)) for loss in losses), tuple(losses), tuple(costs), capacity)
        return every.select([nondominated_indices(loss, cost) for loss, cost in zip(losses, costs, strict=True)])

    def select(self, kept: Sequence[IntArray]) -> "ReducedTable":
        """Return some candidates of each stage, by row."""
        return ReducedTable(
            tuple(number[k] for number, k in zip(self.numbers, kept, strict=True)),
            tuple(loss[k] for loss, k in zip(self.losses, kept, strict=True)),
            tuple(cost[:, k] for cost, k in zip(self.costs, kept, strict=True)),
            self.capacity,
        )

    def prune(self, bound: "Bound") -> "ReducedTable":
        """Leave out the candidates that are part of no choice as good as the bound."""
        terms = [loss + bound.prices @ cost for loss, cost in zip(self.losses, self.costs, strict=True)]
        # A choice with a candidate has at least its term and the smallest terms of the other stages. So a candidate may
        # exceed the smallest term of its stage by what the bound leaves above the sum of all smallest terms.
        spare = bound.loss + bound.prices @ self.capacity - sum(float(term.min()) for term in terms)
        return self.select([np.flatnonzero(term - term.min() <= spare) for term in terms])

    def cheapest(self, prices: FloatArray, most: int) -> list[IntArray]:
        """Return, for each stage, the rows of the candidates with the smallest loss + price . cost."""
        terms = (loss + prices @ cost for loss, cost in zip(self.losses, self.costs, strict=True))
        # Rows stay in the order of the candidates, by which equal choices are told apart.
        return [np.sort(np.argsort(term, kind="stable")[:most]) for term in terms]

    def loss(self, rows: Sequence[int]) -> int:
        """Add the losses of the candidates in these rows, one per stage."""
        return sum(int(loss[row]) for loss, row in zip(self.losses, rows, strict=True))

    def fits(self, rows: Sequence[int]) -> bool:
        """Say whether the candidates in these rows are within the capacity."""
        return bool((sum(cost[:, row] for cost, row in zip(self.costs, rows, strict=True)) <= self.capacity).all())

    def totals(self, choices: IntArray) -> tuple[IntArray, IntArray]:
        """Return (n,) losses and (fields, n) costs of choices (n, stages) of rows."""
        loss, cost = np.zeros(len(choices), np.int64), np.zeros((len(self.capacity), len(choices)), np.int64)
        for stage, row in enumerate(choices.T):
            loss, cost = loss + self.losses[stage][row], cost + self.costs[stage][:, row]
        return loss, cost

    def candidate_numbers(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Return the numbers in the table of the candidates in these rows."""
        return tuple(int(number[row]) for number, row in zip(self.numbers, rows, strict=True))


@dataclass(frozen=True, eq=False)
class Bound:
    """A lower bound on the loss of every choice within the capacity, and an upper bound on the best one's.

    With prices p >= 0, loss(x) >= sum_s (loss_s + p . cost_s)(x_s) - p . capacity for every x within the capacity. With
    the smallest term of each stage that is not chosen yet, this bounds all choices with the same beginning (Lagrangian
    relaxation).

    Attributes:
        prices: (fields,) loss per unit of cost, not negative. The dual values of the linear relaxation bound best.
        loss: Choices whose lower bound exceeds this are left out.
    """

    prices: FloatArray
    loss: float

    @classmethod
    def around(cls, rows: ReducedTable, prices: FloatArray, loss: float) -> "Bound":
        """Return the bound given by a choice of this loss, with a margin for rounding, since terms are in float64."""
        # float64 rounds each term to 1e-16 of its size, so 1e-12 of the largest possible sum is ample.
        losses = sum(float(row.max()) for row in rows.losses)
        costs = sum(cost.max(axis=1).astype(np.float64) for cost in rows.costs)
        return cls(prices, loss + 1e-12 * (losses + float(prices @ (costs + np.abs(rows.capacity)))))


@dataclass(frozen=True, eq=False)
class PartialChoices:
    """Choices of candidates for the first stages, in lexicographic order of their rows.

    Attributes:
        rows: (n, stages so far) rows of the candidates.
        loss: (n,).
        cost: (fields, n).
        complete: Whether no choice was left out that may be part of a best one.
    """

    rows: IntArray
    loss: IntArray
    cost: IntArray
    complete: bool

    def at(self, index: IntArray) -> "PartialChoices":
        """Return some of them, in this order."""
        return PartialChoices(self.rows[index], self.loss[index], self.cost[:, index], self.complete)

    def order_by_loss(self) -> IntArray:
        """Return their order by loss, then by each cost, then by rows."""
        return np.lexsort((*self.cost[::-1], self.loss))


def enumerate_nondominated(
    rows: ReducedTable, bound: Bound | None = None, *, most: int = MAX_PARTIAL_CHOICES
) -> PartialChoices:
    """Enumerate the choices within the capacity that no other choice dominates in the loss and all costs.

    Stage by stage, every choice so far is extended by every candidate. Left out is what leaves no room for the cheapest
    candidates of the later stages, what exceeds the bound, and what is dominated. The last loses nothing: whatever
    completes the dominated choice completes the other one too, at no larger loss and cost.

    Args:
        rows: Candidates and capacity.
        bound: Restricts the result to choices that may be best; None keeps everything not dominated.
        most: The most choices kept after a stage: those of the smallest bound, or of the smallest loss without one.
    """
    fields = len(rows.capacity)
    least = [cost.min(axis=1) for cost in rows.costs]
    sums = PartialChoices(
        np.zeros((1, 0), np.int64), np.zeros(1, np.int64), np.zeros((fields, 1), np.int64), complete=True
    )
    for stage in range(len(rows.losses)):
        # What the cheapest candidates of the later stages take is not available to this one.
        rest = np.array(least[stage + 1 :], dtype=np.int64).reshape(-1, fields).sum(axis=0)
        # Extending block by block, each without its dominated sums, bounds the memory.
        step = max(_SUMS_AT_ONCE // len(rows.losses[stage]), 1)
        blocks = [
            _extend(sums.at(np.arange(first, min(first + step, len(sums.loss)))), rows, stage, rest, bound)
            # At least one block, so that there is something to concatenate if no choice is left.
            for first in range(0, max(len(sums.loss), 1), step)
        ]
        sums = _drop_dominated(_concatenate(blocks, complete=sums.complete))
        if len(sums.loss) > most:
            by = sums.loss.astype(np.float64) if bound is None else _lower_bounds(sums, rows, stage, bound)
            # Sorted back into lexicographic order, in which the first of equal choices counts.
            kept = np.sort(np.argsort(by, kind="stable")[:most])
            sums = PartialChoices(sums.rows[kept], sums.loss[kept], sums.cost[:, kept], complete=False)
    return sums


def nondominated_indices(losses: IntArray, costs: IntArray) -> IntArray:
    """Return the indices of the points that no other point dominates, ascending; of equal ones the first is kept.

    Args:
        losses: (n,).
        costs: (fields, n).
    """
    # In order of loss, a point is dominated if and only if an earlier one has no larger costs.
    order = np.lexsort((*costs[::-1], losses))
    if not len(costs):
        return order[:1]
    # With one cost, a point stays if it is cheaper than every point of smaller loss; with several it is compared with
    # all that stay, in quadratic time.
    if len(costs) == 1:
        cost = costs[0, order]
        before = np.concatenate(([np.iinfo(np.int64).max], np.minimum.accumulate(cost)[:-1]))
        return np.sort(order[cost < before])
    kept: list[int] = []
    cheapest = np.empty_like(costs)
    for index in order.tolist():
        if not (cheapest[:, : len(kept)] <= costs[:, index, None]).all(axis=0).any():
            cheapest[:, len(kept)] = costs[:, index]
            kept.append(index)
    return np.array(sorted(kept), dtype=np.int64)


def _extend(
    sums: PartialChoices, rows: ReducedTable, stage: int, rest: IntArray, bound: Bound | None
) -> PartialChoices:
    """Extend every choice by every candidate of a stage, within the capacity and the bound."""
    candidates = len(rows.losses[stage])
    cost = (sums.cost[:, :, None] + rows.costs[stage][:, None, :]).reshape(len(rows.capacity), -1)
    fits = np.flatnonzero((cost <= (rows.capacity - rest)[:, None]).all(axis=0))
    # Sums lie as (choice, candidate), so the flat number says both, and their order remains lexicographic.
    before, added = np.divmod(fits, candidates)
    longer = np.concatenate((sums.rows[before], added[:, None]), axis=1)
    found = PartialChoices(longer, sums.loss[before] + rows.losses[stage][added], cost[:, fits], sums.complete)
    if bound is not None:
        found = found.at(np.flatnonzero(_lower_bounds(found, rows, stage, bound) <= bound.loss))
    return _drop_dominated(found)


def _lower_bounds(sums: PartialChoices, rows: ReducedTable, stage: int, bound: Bound) -> FloatArray:
    """(n,) lower bounds on the loss of the choices within the capacity that begin like each."""
    later = range(stage + 1, len(rows.losses))
    ahead = sum(float((rows.losses[s] + bound.prices @ rows.costs[s]).min()) for s in later)
    return sums.loss + bound.prices @ (sums.cost - rows.capacity[:, None]) + ahead


def _drop_dominated(sums: PartialChoices) -> PartialChoices:
    fields = len(sums.cost)
    if fields <= 1 or len(sums.loss) <= 1000:
        return sums.at(nondominated_indices(sums.loss, sums.cost))
    # With several costs, finding dominated points takes quadratic time, so of many points only duplicates are dropped.
    order = sums.order_by_loss()
    points = np.vstack((sums.loss, sums.cost))[:, order]
    # `lexsort` is stable, so that of equal points the first choice is the first here too.
    first = np.concatenate(([True], (points[:, 1:] != points[:, :-1]).any(axis=0)))
    return sums.at(np.sort(order[first]))


def _stack(costs: Sequence[IntArray], like: IntArray) -> IntArray:
    """(fields, candidates), also if there is no field."""
    return np.array(costs, dtype=np.int64).reshape(len(costs), len(like))


def _concatenate(blocks: Sequence[PartialChoices], *, complete: bool) -> PartialChoices:
    return PartialChoices(
        np.concatenate([block.rows for block in blocks]),
        np.concatenate([block.loss for block in blocks]),
        np.concatenate([block.cost for block in blocks], axis=1),
        complete,
    )
