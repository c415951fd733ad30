"""Scored candidates of every stage, and what choosing one of each loses and costs."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from secateur.cost import format_count
from secateur.errors import BudgetError, TrainingError

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
CostArray = np.ndarray[tuple[int, ...], np.dtype[np.int64] | np.dtype[np.float64]]

_BITS = 60
"""Sums are compared as whole numbers below 2^60: those of float64 keep more digits than they had."""


@dataclass(frozen=True)
class Choice:
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
class Table:
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

    def choice(self, picked: Sequence[int]) -> Choice:
        """The choice of these candidates, by number."""
        numbers = tuple(int(number) for number in picked)
        loss = math.fsum(float(row[number]) for row, number in zip(self.losses, numbers, strict=True))
        cost = {
            field: _total([self.base[field], *(row[number].item() for row, number in zip(rows, numbers, strict=True))])
            for field, rows in self.costs.items()
        }
        return Choice(numbers, loss, cost)

    def allows(self, choice: Choice) -> bool:
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
    def whole(self) -> "Whole":
        """The same in whole numbers."""
        return Whole.of(self)


@dataclass(frozen=True, eq=False)
class Whole:
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
    def of(cls, table: Table) -> "Whole":
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
    def combine(self, table: Table, seed: int) -> Choice:
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
