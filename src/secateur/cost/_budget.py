"""Budgets: upper bounds on cost, absolute or relative to the original model."""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

from secateur.cost._cost import FIELDS, Cost
from secateur.errors import BudgetError

_UNITS = {"": Decimal(1), "k": Decimal(10**3), "m": Decimal(10**6), "g": Decimal(10**9)}
_AMOUNT = re.compile(r"(?P<number>(\d[\d_]*)?(\.\d+)?(e[+-]?\d+)?)\s*(?P<unit>%|[a-z]*)", re.IGNORECASE)
_CLAUSE = re.compile(r"(?P<field>[A-Za-z_]+)\s*(?P<sign>[<>=!]+)\s*(?P<amount>.*)")
_LATER = ("latency", "latency_s", "size", "size_bytes", "activation_bytes")
_NONZERO = "nonzero"
_LIMITED = (*FIELDS, _NONZERO)
"""What a budget can limit: the fields of `Cost`, which the channels decide, and what is left of the weights."""
_EXAMPLE = "Write, for example, 'macs=50%' or 'macs<=20M, params<=200k'"


@dataclass(frozen=True)
class Limit:
    """An upper bound on one field of `Cost`, or on the number of parameters that are not zero.

    Attributes:
        field: "macs", "params" or "nonzero".
        value: Percent of the original if relative, else the count itself.
        relative: Whether ``value`` is percent of the original.
    """

    field: str
    value: float
    relative: bool

    def of(self, original: Cost) -> float:
        """The bound as a count, for a model whose whole cost is ``original``."""
        whole = original.params if self.field == _NONZERO else getattr(original, self.field)
        return self.value * whole / 100 if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.field}<={self.amount}"

    @property
    def amount(self) -> str:
        """The bound as text that `Budget` reads back to the same number."""
        if self.relative:
            return f"{_shortest(self.value)}%"
        for unit in ("G", "M", "k"):
            scale = _UNITS[unit.lower()]
            text = format((Decimal(repr(self.value)) / scale).normalize(), "f")
            if self.value >= scale and len(text) < 8 and float(Decimal(text) * scale) == self.value:
                return f"{text}{unit}"
        return _shortest(self.value)


@dataclass(frozen=True)
class Budget:
    """Upper bounds on the cost of an architecture; all of them hold.

    Values are counts (``20e6``, ``"20M"``) or percentages of the original model (``"50%"``). The units k, M, G are
    decimal and may be written in either case. Equal budgets are equal however they were written.

    Attributes:
        macs: Bound on multiply-accumulates at batch 1.
        params: Bound on the number of parameters.
        nonzero: Bound on the number of parameters that are not zero, a percentage being of all of the original's.
            Channels are cut to the other bounds first; weight pruning sees to this one.

    Raises:
        BudgetError: If nothing is limited or a value cannot be read.
    """

    macs: str | float | None = None
    params: str | float | None = None
    nonzero: str | float | None = None

    def __post_init__(self) -> None:
        found = [_read(name, getattr(self, name)) for name in _LIMITED if getattr(self, name) is not None]
        if not found:
            raise BudgetError(f"`budget` must limit {' or '.join(_LIMITED)}; got no limit. {_EXAMPLE}.")
        for limit in found:
            object.__setattr__(self, limit.field, limit.amount if limit.relative else limit.value)

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read limits separated by commas, such as "macs=50%, params<=200k"; = and <= mean the same.

        Raises:
            BudgetError: If the text cannot be read, with the offending part.
        """
        values: dict[str, str] = {}
        for part in (part.strip() for part in text.split(",")):
            field, amount = _clause(part, text)
            if field in values:
                raise BudgetError(f"`budget` must limit {field} once; got {text!r}. Keep the smaller limit.")
            values[field] = amount
        return cls(**values)  # type: ignore[arg-type]

    @cached_property
    def parts(self) -> tuple[Limit, ...]:
        """The limits, in the order of the fields."""
        return tuple(_read(name, getattr(self, name)) for name in _LIMITED if getattr(self, name) is not None)

    def limits(self, original: Cost) -> dict[str, float]:
        """The bounds on fields of `Cost` as counts by name, for a model whose whole cost is ``original``."""
        return {limit.field: limit.of(original) for limit in self.parts if limit.field in FIELDS}

    def nonzero_limit(self, original: Cost) -> float | None:
        """The bound on parameters that are not zero, as a count; None if there is none."""
        return next((limit.of(original) for limit in self.parts if limit.field == _NONZERO), None)

    def allows(self, cost: Cost, original: Cost) -> bool:
        """Whether ``cost`` is within every bound on a field of it (equal to it is within)."""
        return all(getattr(cost, name) <= bound for name, bound in self.limits(original).items())

    def __str__(self) -> str:
        return ", ".join(map(str, self.parts))


def _clause(part: str, text: str) -> tuple[str, str]:
    """Field name and amount of one "field=amount"."""
    match = _CLAUSE.fullmatch(part)
    if match is None:
        raise BudgetError(f"`budget` must be limits separated by commas; got {part!r} in {text!r}. {_EXAMPLE}.")
    field, sign, amount = match["field"].lower(), match["sign"], match["amount"]
    if sign not in ("=", "<="):
        raise BudgetError(f"`budget` must use = or <=, both an upper bound; got {sign!r} in {part!r}. {_EXAMPLE}.")
    if field in _LATER:
        raise BudgetError(f"`budget` must limit {' or '.join(_LIMITED)}; {field!r} is not yet supported (in {part!r}).")
    if field not in _LIMITED:
        raise BudgetError(f"`budget` must limit {' or '.join(_LIMITED)}; got the unknown field {field!r} in {part!r}.")
    return field, amount


def _read(field: str, value: object) -> Limit:
    """One value in any accepted spelling."""
    text = (repr(float(value)) if type(value) in (int, float) else value if isinstance(value, str) else "").strip()  # type: ignore[arg-type]
    match = _AMOUNT.fullmatch(text)
    if match is None or not re.match(r"\.?\d", match["number"]) or float(match["number"]) == math.inf:
        raise BudgetError(f"`{field}` must be a number with an optional unit %, k, M or G; got {value!r}. {_EXAMPLE}.")
    number, unit = Decimal(match["number"].replace("_", "")), match["unit"].lower()
    if unit == "%":
        if not 0 < number <= 100:
            raise BudgetError(f"`{field}` must be above 0% and at most 100% of the original; got {value!r}.")
        return Limit(field, float(number), relative=True)
    if unit not in _UNITS:
        raise BudgetError(f"`{field}` must have the unit %, k, M or G, or none; got {unit!r} in {value!r}. {_EXAMPLE}.")
    count = float(number * _UNITS[unit])
    if count < 1:
        hint = f" Write '{_shortest(count * 100)}%' for a fraction of the original." if count > 0 else ""
        raise BudgetError(f"`{field}` must be at least 1 when it is a count; got {value!r}.{hint}")
    return Limit(field, count, relative=False)


def _shortest(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)
