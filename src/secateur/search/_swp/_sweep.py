"""Sums over stages, one stage after the other, without what cannot be part of a best choice."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.search._swp._table import FloatArray, IntArray, Table

MOST = 100_000
"""Partial choices kept after a stage; only if there are more is a sweep not complete."""
_BLOCK = 1_000_000
"""Sums made at once: tens of megabytes."""
_ENDLESS = 2**62


@dataclass(frozen=True, eq=False)
class Rows:
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
    def of(cls, table: Table, fields: Sequence[str]) -> "Rows":
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

    def only(self, kept: Sequence[IntArray]) -> "Rows":
        """Some candidates of each stage, by row."""
        return Rows(
            tuple(number[k] for number, k in zip(self.numbers, kept, strict=True)),
            tuple(loss[k] for loss, k in zip(self.losses, kept, strict=True)),
            tuple(cost[:, k] for cost, k in zip(self.costs, kept, strict=True)),
            self.room,
        )

    def within(self, bound: "Bound") -> "Rows":
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
    def around(cls, rows: Rows, prices: FloatArray, loss: float) -> "Bound":
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


def sweep(rows: Rows, bound: Bound | None = None, *, most: int = MOST) -> Sums:
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


def _extended(sums: Sums, rows: Rows, stage: int, rest: IntArray, bound: Bound | None) -> Sums:
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


def _bounds(sums: Sums, rows: Rows, stage: int, bound: Bound) -> FloatArray:
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
