"""Scored candidates of every stage, and what choosing one of each loses and costs.

Sums over stages, one stage after the other, without what cannot be part of a best choice."""

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
"""Sums are compared as whole numbers below 2^60: those of float64 keep more digits than they had."""


@dataclass(frozen=True)
class StageChoice:
    """One candidate of every stage.

    Attributes:
        picked: Number of the candidate, by stage.
        loss: Sum of the losses of the candidates.
        cost: What the whole network then costs, by field: base + sum of the candidates.
    """

    picked: tuple[int, ...]
    loss: float
    cost: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class StageTable:
    """What every candidate of every stage loses and costs. Both are sums over the stages.

    The loss of a choice is sum_s losses[s][picked[s]], its cost of a field base + sum_s costs[field][s][picked[s]].

    Attributes:
        losses: For each stage: (candidates,) finite losses, in any unit common to all.
        costs: For each field ("macs", "params", ...) and each stage: (candidates,) what a candidate costs, not
            negative; whole numbers for counts, floats for seconds.
        base: What the rest of the network costs, by field.
        limits: The largest cost of the whole network, by field. A field without a limit is only reported.

    Raises:
        ValueError: If shapes, fields or types do not go together.
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
        """How many stages there are."""
        return len(self.losses)

    def choice(self, picked: Sequence[int]) -> StageChoice:
        """The choice of these candidates, by number."""
        numbers = tuple(int(number) for number in picked)
        loss = math.fsum(float(row[number]) for row, number in zip(self.losses, numbers, strict=True))
        cost = {
            field: _total([self.base[field], *(row[number].item() for row, number in zip(rows, numbers, strict=True))])
            for field, rows in self.costs.items()
        }
        return StageChoice(numbers, loss, cost)

    def allows(self, choice: StageChoice) -> bool:
        """Whether a choice keeps to every limit (equal to it is within)."""
        return all(choice.cost[field] <= limit for field, limit in self.limits.items())

    def reach(self, field: str) -> tuple[float, float]:
        """Cost of the whole network with the cheapest, and with the dearest, candidate of every stage."""
        rows, base = self.costs[field], self.base[field]
        return _total([base, *(row.min().item() for row in rows)]), _total([base, *(row.max().item() for row in rows)])

    def check(self) -> None:
        """Refuse limits that no choice can meet one by one.

        Raises:
            BudgetError: With what is in reach.
        """
        if any(self.reach(field)[0] > limit for field, limit in self.limits.items()):
            raise self.out_of_reach()

    def out_of_reach(self) -> BudgetError:
        """The error for limits that no choice meets."""
        ranges = (f"{name} from {_shown(low)} to {_shown(high)}" for name, (low, high) in self._reaches.items())
        got = ", ".join(f"{name}<={_shown(limit)}" for name, limit in self.limits.items())
        return BudgetError(
            f"`budget` must leave room for one candidate of every stage; got {got}. In reach, each alone: "
            f"{', '.join(ranges)}. Raise the budget, or allow smaller candidates."
        )

    @property
    def _reaches(self) -> dict[str, tuple[float, float]]:
        return {field: self.reach(field) for field in self.limits}

    @cached_property
    def whole(self) -> "SupernetCosts":
        """The same in whole numbers."""
        return SupernetCosts.of(self)


@dataclass(frozen=True, eq=False)
class SupernetCosts:
    """A table in whole numbers, so that sums are exact and no tolerance lets anything over a limit.

    Counts stay as they are. Floats are multiplied by the power of two that brings their largest sum to 2^60; losses are
    then rounded, costs rounded up and the room for them down.

    Attributes:
        losses: For each stage: (candidates,).
        costs: For each field and each stage: (candidates,).
        room: For each limited field: what the candidates may cost together; negative if the base alone is over.
    """

    losses: tuple[IntArray, ...]
    costs: Mapping[str, tuple[IntArray, ...]]
    room: Mapping[str, int]

    @classmethod
    def of(cls, table: StageTable) -> "SupernetCosts":
        """The whole numbers of a table."""
        shift = _shift(table.losses)
        losses = tuple(np.rint(np.ldexp(row, shift)).astype(np.int64) for row in table.losses)
        costs: dict[str, tuple[IntArray, ...]] = {}
        room: dict[str, int] = {}
        for field, rows in table.costs.items():
            shift = 0 if _counts(rows) else _shift(rows)
            costs[field] = tuple(_scaled_up(row, shift) for row in rows)
            limit = table.limits.get(field, math.inf)
            if limit < math.inf:
                exact = (Fraction(limit) - Fraction(table.base[field])) * Fraction(2) ** shift
                room[field] = max(min(math.floor(exact), 2 ** (_BITS + 1)), -1)
        return cls(losses, costs, {field: room[field] for field in table.limits if field in room})


class Combination(ABC):
    """A way to choose one candidate of every stage within the limits. Implementations are frozen dataclasses."""

    @abstractmethod
    def combine(self, table: StageTable, seed: int) -> StageChoice:
        """A choice of small loss that keeps to every limit: the same one for the same table and seed.

        Args:
            table: Candidates, costs and limits.
            seed: For what is drawn.

        Raises:
            BudgetError: If no choice keeps to the limits, with what is in reach.
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


def _counts(rows: Sequence[CostArray]) -> bool:
    return rows[0].dtype.kind == "i"


def _shift(rows: Sequence[CostArray]) -> int:
    """The power of two that brings the largest sum of magnitudes close to, but not over, 2^60."""
    total = math.fsum(float(np.abs(row).max()) for row in rows)
    return _BITS - math.frexp(total)[1] if total > 0 else 0


def _scaled_up(row: CostArray, shift: int) -> IntArray:
    return np.ceil(np.ldexp(row, shift)).astype(np.int64) if shift or row.dtype.kind == "f" else row.astype(np.int64)


def _total(numbers: Sequence[float]) -> float:
    """Whole numbers stay whole; floats are added without rounding in between."""
    return sum(numbers) if all(isinstance(number, int) for number in numbers) else math.fsum(numbers)


def _shown(value: float) -> str:
    return format_count(value) if value >= 1 or value == 0 else f"{value:.3g}"


MOST = 100_000
"""Partial choices kept after a stage; only if there are more is a sweep not complete."""
_BLOCK = 1_000_000
"""Sums made at once: tens of megabytes."""
_ENDLESS = 2**62


@dataclass(frozen=True, eq=False)
class StageRows:
    """The candidates of every stage that some best choice may need, in whole numbers above the least of their stage.

    Attributes:
        numbers: For each stage: (candidates,) their numbers in the table, ascending.
        losses: For each stage: (candidates,).
        costs: For each stage: (fields, candidates).
        room: (fields,) what the candidates may cost together; negative if nothing fits.
    """

    numbers: tuple[IntArray, ...]
    losses: tuple[IntArray, ...]
    costs: tuple[IntArray, ...]
    room: IntArray

    @classmethod
    def of(cls, table: StageTable, fields: Sequence[str]) -> "StageRows":
        """Candidates that no other of their stage beats in the loss and in every one of these fields.

        A dominated candidate is never needed: the other one in its place loses no more and costs no more.
        """
        whole, stages = table.whole, range(table.stages)
        absolute = [_stacked([whole.costs[field][stage] for field in fields], whole.losses[stage]) for stage in stages]
        least = [cost.min(axis=1, keepdims=True) for cost in absolute]
        losses = [loss - loss.min() for loss in whole.losses]
        costs = [cost - low for cost, low in zip(absolute, least, strict=True)]
        # More room than the dearest candidates take is no limit.
        most = sum(cost.max(axis=1) for cost in absolute)
        room = np.minimum([whole.room.get(field, _ENDLESS) for field in fields], most) - np.concatenate(
            least, axis=1
        ).sum(axis=1)
        every = cls(tuple(np.arange(len(loss)) for loss in losses), tuple(losses), tuple(costs), room.astype(np.int64))
        return every.only([undominated(loss, cost) for loss, cost in zip(losses, costs, strict=True)])

    def only(self, kept: Sequence[IntArray]) -> "StageRows":
        """Some candidates of each stage, by row."""
        return StageRows(
            tuple(number[k] for number, k in zip(self.numbers, kept, strict=True)),
            tuple(loss[k] for loss, k in zip(self.losses, kept, strict=True)),
            tuple(cost[:, k] for cost, k in zip(self.costs, kept, strict=True)),
            self.room,
        )

    def within(self, bound: "Bound") -> "StageRows":
        """Without the candidates that are part of no choice as good as the bound."""
        terms = [loss + bound.prices @ cost for loss, cost in zip(self.losses, self.costs, strict=True)]
        spare = bound.loss + bound.prices @ self.room - sum(float(term.min()) for term in terms)
        return self.only([np.flatnonzero(term - term.min() <= spare) for term in terms])

    def nearest(self, prices: FloatArray, most: int) -> list[IntArray]:
        """For each stage: the rows of the candidates of least loss + price . cost."""
        terms = (loss + prices @ cost for loss, cost in zip(self.losses, self.costs, strict=True))
        return [np.sort(np.argsort(term, kind="stable")[:most]) for term in terms]

    def loss(self, rows: Sequence[int]) -> int:
        """Sum of the losses of the candidates in these rows, one per stage."""
        return sum(int(loss[row]) for loss, row in zip(self.losses, rows, strict=True))

    def fits(self, rows: Sequence[int]) -> bool:
        """Whether there is room for the candidates in these rows."""
        return bool((sum(cost[:, row] for cost, row in zip(self.costs, rows, strict=True)) <= self.room).all())

    def sums(self, choices: IntArray) -> tuple[IntArray, IntArray]:
        """(n,) losses and (fields, n) costs of choices (n, stages), by row."""
        loss, cost = np.zeros(len(choices), np.int64), np.zeros((len(self.room), len(choices)), np.int64)
        for stage, row in enumerate(choices.T):
            loss, cost = loss + self.losses[stage][row], cost + self.costs[stage][:, row]
        return loss, cost

    def picked(self, rows: Sequence[int]) -> tuple[int, ...]:
        """Numbers in the table of the candidates in these rows."""
        return tuple(int(number[row]) for number, row in zip(self.numbers, rows, strict=True))


@dataclass(frozen=True, eq=False)
class Bound:
    """A lower bound on the loss of every choice within the room, and an upper bound on the best one's.

    With prices p >= 0, loss(x) >= sum_s (loss_s + p . cost_s)(x_s) - p . room for every x within the room; with the
    least term of each stage that is not chosen yet this bounds all choices that begin alike (Lagrangian relaxation).

    Attributes:
        prices: (fields,) loss per unit of cost, not negative. Best are the dual values of the linear relaxation.
        loss: Nothing that must lose more than this is kept.
    """

    prices: FloatArray
    loss: float

    @classmethod
    def around(cls, rows: StageRows, prices: FloatArray, loss: float) -> "Bound":
        """The bound by a choice of this loss, with a margin for the rounding of the terms, which are in float64."""
        losses = sum(float(row.max()) for row in rows.losses)
        costs = sum(cost.max(axis=1).astype(np.float64) for cost in rows.costs)
        return cls(prices, loss + 1e-12 * (losses + float(prices @ (costs + np.abs(rows.room)))))


@dataclass(frozen=True, eq=False)
class Sums:
    """Choices for the first stages, in lexicographic order of their rows.

    Attributes:
        rows: (n, stages so far) row of the candidate of each stage.
        loss: (n,).
        cost: (fields, n).
        complete: Whether everything was kept that may be part of a best choice.
    """

    rows: IntArray
    loss: IntArray
    cost: IntArray
    complete: bool

    def at(self, index: IntArray) -> "Sums":
        """Some of them, in this order."""
        return Sums(self.rows[index], self.loss[index], self.cost[:, index], self.complete)

    def by_loss(self) -> IntArray:
        """Their order by loss, then by each cost, then by rows."""
        return np.lexsort((*self.cost[::-1], self.loss))


def sweep(rows: StageRows, bound: Bound | None = None, *, most: int = MOST) -> Sums:
    """All choices within the room that no other one beats, in the loss or a cost.

    Stage by stage: every choice so far with every candidate, without those that leave no room for the cheapest
    candidates of the later stages, lose too much, or are dominated (no loss of optimality: whatever completes the
    dominated one completes the other as well, and costs and loses no more).

    Args:
        rows: Candidates and room.
        bound: To find the best choice only; None means everything not dominated.
        most: Choices kept after a stage, those of least bound (of least loss without one).
    """
    fields = len(rows.room)
    least = [cost.min(axis=1) for cost in rows.costs]
    sums = Sums(np.zeros((1, 0), np.int64), np.zeros(1, np.int64), np.zeros((fields, 1), np.int64), complete=True)
    for stage in range(len(rows.losses)):
        rest = np.array(least[stage + 1 :], dtype=np.int64).reshape(-1, fields).sum(axis=0)
        step = max(_BLOCK // len(rows.losses[stage]), 1)
        blocks = [
            _extended(sums.at(np.arange(first, min(first + step, len(sums.loss)))), rows, stage, rest, bound)
            for first in range(0, max(len(sums.loss), 1), step)
        ]
        sums = _without_dominated(_joined(blocks, complete=sums.complete))
        if len(sums.loss) > most:
            by = sums.loss.astype(np.float64) if bound is None else _bounds(sums, rows, stage, bound)
            kept = np.sort(np.argsort(by, kind="stable")[:most])
            sums = Sums(sums.rows[kept], sums.loss[kept], sums.cost[:, kept], complete=False)
    return sums


def undominated(losses: IntArray, costs: IntArray) -> IntArray:
    """Which of n points no other one beats, ascending. Of equal ones the first is kept.

    Args:
        losses: (n,).
        costs: (fields, n).
    """
    order = np.lexsort((*costs[::-1], losses))
    if not len(costs):
        return order[:1]
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


def _extended(sums: Sums, rows: StageRows, stage: int, rest: IntArray, bound: Bound | None) -> Sums:
    """Every choice with every candidate of a stage, as far as there is room and the bound allows it."""
    candidates = len(rows.losses[stage])
    cost = (sums.cost[:, :, None] + rows.costs[stage][:, None, :]).reshape(len(rows.room), -1)
    fits = np.flatnonzero((cost <= (rows.room - rest)[:, None]).all(axis=0))
    before, added = np.divmod(fits, candidates)
    longer = np.concatenate((sums.rows[before], added[:, None]), axis=1)
    found = Sums(longer, sums.loss[before] + rows.losses[stage][added], cost[:, fits], sums.complete)
    if bound is not None:
        found = found.at(np.flatnonzero(_bounds(found, rows, stage, bound) <= bound.loss))
    return _without_dominated(found)


def _bounds(sums: Sums, rows: StageRows, stage: int, bound: Bound) -> FloatArray:
    """(n,) the least loss of any choice within the room that begins like each."""
    later = range(stage + 1, len(rows.losses))
    ahead = sum(float((rows.losses[s] + bound.prices @ rows.costs[s]).min()) for s in later)
    return sums.loss + bound.prices @ (sums.cost - rows.room[:, None]) + ahead


def _without_dominated(sums: Sums) -> Sums:
    fields = len(sums.cost)
    if fields <= 1 or len(sums.loss) <= 1000:
        return sums.at(undominated(sums.loss, sums.cost))
    # Beyond one cost it takes quadratic time: of many, only equal ones go.
    order = sums.by_loss()
    points = np.vstack((sums.loss, sums.cost))[:, order]
    first = np.concatenate(([True], (points[:, 1:] != points[:, :-1]).any(axis=0)))
    return sums.at(np.sort(order[first]))


def _stacked(costs: Sequence[IntArray], like: IntArray) -> IntArray:
    """(fields, candidates); also of no field."""
    return np.array(costs, dtype=np.int64).reshape(len(costs), len(like))


def _joined(blocks: Sequence[Sums], *, complete: bool) -> Sums:
    return Sums(
        np.concatenate([block.rows for block in blocks]),
        np.concatenate([block.loss for block in blocks]),
        np.concatenate([block.cost for block in blocks], axis=1),
        complete,
    )
