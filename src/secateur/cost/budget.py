"""Costs, and budgets: upper bounds on them, absolute or relative to the original model, and their units."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from decimal import Decimal
from functools import cached_property

from secateur.errors import BudgetError


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass and of one copy of a model.

    Attributes:
        macs: Multiply-accumulates of one forward pass at batch 1. Papers often call them FLOPs; a multiply-accumulate
            is two floating-point operations. Convolutions and matrix products only, no bias, norm or activation.
        params: Number of parameters; a shared one counts once, buffers do not count.
        size_bytes: Size of the weights file, parameters and buffers in their own precision; None if not computed.
        latency_s: Seconds of one forward pass on a target; None if not computed.
    """

    macs: int
    params: int
    size_bytes: int | None = None
    latency_s: float | None = None

    def __repr__(self) -> str:
        return f"Cost({', '.join(f'{name}={value!r}' for name, value in self.to_json().items())})"

    def to_json(self) -> dict[str, int | float]:
        """Return a JSON object with the fields that are known."""
        found = {name: getattr(self, name) for name in (*FIELDS, *MODELED)}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Cost":
        """Read what `to_json` wrote.

        Raises:
            BudgetError: If a field is missing, unknown or has a value that it cannot have.
        """
        whole = all(type(data[name]) is int for name in (*FIELDS, "size_bytes") if name in data)
        if not set(FIELDS) <= set(data) <= {*FIELDS, *MODELED} or not whole or not all(map(_amount, data.values())):
            raise BudgetError(
                f"`cost` must hold the whole numbers {', '.join(FIELDS)}, not negative, and may hold "
                f"{' and '.join(MODELED)}; got {dict(data)!r}."
            )
        return cls(**data)  # type: ignore[arg-type]


def _amount(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


FIELDS = tuple(each.name for each in fields(Cost) if each.default is MISSING)
"""The fields that every cost has."""
MODELED = tuple(each.name for each in fields(Cost) if each.default is None)
"""The fields that a cost has if something computes them; see `CostModel`."""


def format_count(value: float) -> str:
    """Format a count for people: three significant digits and a decimal unit, such as "125 M" or "12.3 k".

    Args:
        value: Not negative. k = 1e3, M = 1e6, G = 1e9, T = 1e12.
    """
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if float(f"{value:.3g}") >= scale:
            return f"{_three_digits(value / scale)} {unit}"
    return _three_digits(value)


def _format_bytes(value: float) -> str:
    return f"{format_count(value)}B" if value >= 1000 else f"{format_count(value)} B"


def _format_seconds(value: float) -> str:
    unit, scale = next(((u, s) for u, s in (("s", 1), ("ms", 1e-3)) if float(f"{value:.3g}") >= s), ("us", 1e-6))
    return f"{_three_digits(value / scale)} {unit}"


def _three_digits(value: float) -> str:
    rounded = float(f"{value:.3g}")
    decimals = 0 if rounded == 0 else max(0, 2 - math.floor(math.log10(rounded)))
    text = f"{rounded:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


_DECIMAL = {"": Decimal(1), "k": Decimal(10**3), "m": Decimal(10**6), "g": Decimal(10**9)}
_BYTES = {
    **{f"{unit}b": factor for unit, factor in _DECIMAL.items()},
    **{f"{unit}ib": Decimal(2 ** (10 * power)) for power, unit in enumerate("kmg", 1)},
}
_SECONDS = {"s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6"), "µs": Decimal("1e-6")}


@dataclass(frozen=True)
class Quantity:
    """A quantity that a budget can bound.

    Attributes:
        word: Its name in a budget, which is also its field of `Budget`.
        field: The field of `Cost` that a percentage refers to.
        units: Factor of each unit to that of the field, by lower-case unit; "" where no unit needs to be written.
        display_units: Units that amounts are shown in, the largest first.
        units_text: The units in words.
        smallest: The smallest amount that has a meaning.
        text: An amount of the field for people, with its unit.
        bounds_field: Whether the bound is on that field itself, and so on what a search chooses.
    """

    word: str
    field: str
    units: Mapping[str, Decimal] = dataclasses.field(default_factory=lambda: _DECIMAL)
    display_units: tuple[str, ...] = ("G", "M", "k")
    units_text: str = "k, M or G, or none"
    smallest: float = 1
    text: Callable[[float], str] = format_count
    bounds_field: bool = True


QUANTITIES = (
    Quantity("macs", "macs"),
    Quantity("params", "params"),
    Quantity("nonzero", "params", bounds_field=False),
    Quantity(
        "size", "size_bytes", _BYTES, ("GB", "MB", "kB", "B"), "B, kB, MB, GB, KiB, MiB or GiB", text=_format_bytes
    ),
    Quantity("latency", "latency_s", _SECONDS, ("s", "ms", "us"), "s, ms or us", 1e-9, _format_seconds),
)
"""Every quantity, in the order in which limits are shown. A new one is a row here and a field of `Budget` (and of
`Cost`, if it bounds one that is not there yet)."""
BY_WORD = {quantity.word: quantity for quantity in QUANTITIES}


def format_cost(field: str, value: float) -> str:
    """Format an amount of a field of `Cost` for people, with its unit: "4.2 ms", "1.25 MB", "40.9 M".

    Args:
        field: Name of the field.
        value: Not negative.
    """
    return next((quantity.text for quantity in QUANTITIES if quantity.field == field), format_count)(value)


_AMOUNT = re.compile(
    r"(?P<number>([0-9]+(_[0-9]+)*)?(\.[0-9]+)?(e[+-]?[0-9]{1,3})?)\s*(?P<unit>%|[a-zµ]*)", re.IGNORECASE
)
_CLAUSE = re.compile(r"(?P<word>[A-Za-z_]+)\s*(?P<sign>[<>=!]+)\s*(?P<amount>.*)")
_MAX_CHARACTERS, _MAX_SHOWN = 1_000, 80
_WORDS = " or ".join(BY_WORD)
_EXAMPLE = "Write, for example, 'macs=50%', 'macs<=20M, params<=200k', 'latency=4ms' or 'size<=2MB'"


@dataclass(frozen=True)
class Limit:
    """An upper bound on one field of `Cost`, or on the number of parameters that are not zero.

    Attributes:
        word: "macs", "params", "nonzero", "size" or "latency".
        value: Percent of the original if relative, else the count, bytes or seconds.
        relative: Whether ``value`` is percent of the original.
    """

    word: str
    value: float
    relative: bool

    @property
    def field(self) -> str:
        """The field of `Cost` that it refers to."""
        return BY_WORD[self.word].field

    def of(self, original: Cost) -> float:
        """Return the bound as a count, bytes or seconds, for a model whose whole cost is ``original``.

        Raises:
            BudgetError: If it is relative to a field that ``original`` does not have.
        """
        return self.value * amount_of(original, self.field) / 100 if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.word}<={self.amount}"

    @property
    def amount(self) -> str:
        """The bound as text that `Budget` reads as the same number."""
        quantity = BY_WORD[self.word]
        if self.relative:
            return f"{_shortest(self.value)}%"
        for unit in quantity.display_units:
            scale = quantity.units[unit.lower()]
            text = format((Decimal(repr(self.value)) / scale).normalize(), "f")
            if self.value >= float(scale) and len(text) < 8 and float(Decimal(text) * scale) == self.value:
                return f"{text}{unit}"
        whole = next((unit for unit in quantity.display_units if quantity.units[unit.lower()] == 1), "")
        return f"{_shortest(self.value)}{whole}"


@dataclass(frozen=True)
class Budget:
    """Upper bounds on the cost of an architecture; all of them hold.

    Values are counts (``20e6``, ``"20M"``), bytes (``2e6``, ``"2MB"``), seconds (``0.004``, ``"4ms"``) or percentages
    of the original model (``"50%"``). The units k, M, G are decimal and may be written in either case; sizes and times
    as text have their unit. Equal budgets are equal however they were written.

    Attributes:
        macs: Bound on multiply-accumulates at batch 1.
        params: Bound on the number of parameters.
        nonzero: Bound on the number of parameters that are not zero; a percentage refers to all parameters of the
            original. Channels are cut to the other bounds first; weight pruning meets this one.
        size: Bound on the bytes of the weights file.
        latency: Bound on the seconds of one forward pass on a target, see `secateur.cost.Target`.

    Raises:
        BudgetError: If nothing is limited or a value cannot be read.
    """

    macs: str | float | None = None
    params: str | float | None = None
    nonzero: str | float | None = None
    size: str | float | None = None
    latency: str | float | None = None

    def __repr__(self) -> str:
        return f"Budget({str(self)!r})"

    def __post_init__(self) -> None:
        found = self.parts
        if not found:
            raise BudgetError(f"`budget` must limit {_WORDS}; got no limit. {_EXAMPLE}.")
        for limit in found:
            object.__setattr__(self, limit.word, limit.amount if limit.relative else limit.value)

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read limits separated by commas, such as "macs=50%, latency<=4ms"; = and <= mean the same.

        Raises:
            BudgetError: If the text cannot be read, with the offending part.
        """
        if len(text) > _MAX_CHARACTERS:
            raise BudgetError(f"`budget` must have at most {_MAX_CHARACTERS} characters; got {len(text)}. {_EXAMPLE}.")
        values: dict[str, str] = {}
        for part in (part.strip() for part in text.split(",")):
            word, amount = _clause(part, text)
            if word in values:
                raise BudgetError(f"`budget` must limit {word} once; got {text!r}. Keep the smaller limit.")
            values[word] = amount
        return cls(**values)  # type: ignore[arg-type]

    @cached_property
    def parts(self) -> tuple[Limit, ...]:
        """The limits, in the order of the fields."""
        values = ((quantity, getattr(self, quantity.word)) for quantity in QUANTITIES)
        return tuple(_read(quantity, value) for quantity, value in values if value is not None)

    @property
    def of_cost(self) -> tuple[Limit, ...]:
        """The limits on fields of `Cost`: all except the one on parameters that are not zero."""
        return tuple(limit for limit in self.parts if BY_WORD[limit.word].bounds_field)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of `Cost` that are bounded."""
        return tuple(limit.field for limit in self.of_cost)

    def limits(self, original: Cost) -> dict[str, float]:
        """Return the bounds by field of `Cost`, in its units, for a model whose whole cost is ``original``.

        Raises:
            BudgetError: If one is relative to a field that ``original`` does not have.
        """
        return {limit.field: limit.of(original) for limit in self.of_cost}

    def nonzero_limit(self, original: Cost) -> float | None:
        """Return the bound on parameters that are not zero, as a count; None if there is none."""
        return next((limit.of(original) for limit in self.parts if limit.word == "nonzero"), None)

    def allows(self, cost: Cost, original: Cost) -> bool:
        """Whether ``cost`` is within every bound on a field of it (equal to it is within).

        Raises:
            BudgetError: If a bound is on a field that ``cost`` or ``original`` does not have.
        """
        return all(amount_of(cost, name) <= bound for name, bound in self.limits(original).items())

    def __str__(self) -> str:
        return ", ".join(map(str, self.parts))


def amount_of(cost: Cost, field: str) -> float:
    """Return a field of a cost.

    Raises:
        BudgetError: If it is not known.
    """
    value = getattr(cost, field)
    if value is None:
        word = next(quantity.word for quantity in QUANTITIES if quantity.field == field)
        raise BudgetError(
            f"`budget` must limit fields of the cost that are known; got a limit of {word}, "
            f"and a cost without {field}. Use a model that computes it: `secateur.search.fit_latency` for "
            "latency, `secateur.cost.FileSize` for size; secateur.compress does."
        )
    return value


def _clause(part: str, text: str) -> tuple[str, str]:
    """Split one "word=amount" into word and amount."""
    match = _CLAUSE.fullmatch(part)
    if match is None:
        raise BudgetError(f"`budget` must be limits separated by commas; got {part!r} in {text!r}. {_EXAMPLE}.")
    word, sign, amount = match["word"].lower(), match["sign"], match["amount"]
    if sign not in ("=", "<="):
        raise BudgetError(f"`budget` must use = or <=, both an upper bound; got {sign!r} in {part!r}. {_EXAMPLE}.")
    if word not in BY_WORD:
        raise BudgetError(f"`budget` must limit {_WORDS}; got the unknown field {word!r} in {part!r}.")
    return word, amount


def _read(quantity: Quantity, value: object) -> Limit:
    """Read one value in any accepted spelling."""
    word, plain = quantity.word, type(value) in (int, float)
    text = (repr(float(value)) if plain else value if isinstance(value, str) else "").strip()  # type: ignore[arg-type]
    match = _AMOUNT.fullmatch(text)
    if match is None or not re.match(r"\.?[0-9]", match["number"]) or float(match["number"]) == math.inf:
        units = "an optional unit %, k, M or G" if "" in quantity.units else f"the unit % or {quantity.units_text}"
        raise BudgetError(f"`{word}` must be a number with {units}; got {repr(value)[:_MAX_SHOWN]}. {_EXAMPLE}.")
    number, unit = Decimal(match["number"].replace("_", "")), match["unit"].lower()
    if unit == "%":
        if not 0 < number <= 100:
            raise BudgetError(f"`{word}` must be above 0% and at most 100% of the original; got {value!r}.")
        return Limit(word, float(number), relative=True)
    if unit not in quantity.units and not plain:
        raise BudgetError(
            f"`{word}` must have the unit %, {quantity.units_text}; got {unit!r} in {value!r}. {_EXAMPLE}."
        )
    amount = float(number * quantity.units.get(unit, Decimal(1)))
    if amount < quantity.smallest:
        if quantity.smallest < 1:
            raise BudgetError(f"`{word}` must be above 0; got {value!r}. {_EXAMPLE}.")
        hint = f" Write '{_shortest(amount * 100)}%' for a fraction of the original." if amount > 0 else ""
        raise BudgetError(f"`{word}` must be at least 1 when it is a count; got {value!r}.{hint}")
    return Limit(word, amount, relative=False)


def _shortest(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def limits_latency(budget: Budget) -> bool:
    """Whether a budget limits the latency."""
    return "latency_s" in budget.fields
