"""What a budget can limit, and the units it may be written in.

What an architecture costs: plain numbers with units.

Budgets: upper bounds on cost, absolute or relative to the original model."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property

from secateur.errors import BudgetError

_DECIMAL = {"": Decimal(1), "k": Decimal(10**3), "m": Decimal(10**6), "g": Decimal(10**9)}


@dataclass(frozen=True)
class Quantity:
    """A word of a budget.

    Attributes:
        word: As it is written.
        of: The field of `Cost` that a percentage refers to.
        limited: Whether the bound is one on that field.
        units: Factors to the unit of the field, in lower case; "" where none needs to be written.
        shown: Units that amounts are shown in, the largest first.
        said: The units in words.
        least: The smallest amount that has a meaning.
    """

    word: str
    of: str
    limited: bool
    units: Mapping[str, Decimal]
    shown: tuple[str, ...]
    said: str
    least: float


def _count(word: str, of: str, limited: bool) -> Quantity:
    return Quantity(word, of, limited, _DECIMAL, ("G", "M", "k"), "k, M or G, or none", 1)


QUANTITIES = (
    _count("macs", "macs", True),
    _count("params", "params", True),
    _count("nonzero", "params", False),
    Quantity(
        "size",
        "size_bytes",
        True,
        {
            **{f"{unit}b": factor for unit, factor in _DECIMAL.items()},
            **{f"{unit}ib": Decimal(2 ** (10 * power)) for power, unit in enumerate("kmg", 1)},
        },
        ("GB", "MB", "kB", "B"),
        "B, kB, MB, GB, KiB, MiB or GiB",
        1,
    ),
    Quantity(
        "latency",
        "latency_s",
        True,
        {"s": Decimal(1), "ms": Decimal("1e-3"), "us": Decimal("1e-6"), "µs": Decimal("1e-6")},
        ("s", "ms", "us"),
        "s, ms or us",
        1e-9,
    ),
)
"""Every word, in the order in which limits are shown."""
BY_WORD = {quantity.word: quantity for quantity in QUANTITIES}


FIELDS = ("macs", "params")
"""The fields of `Cost` that every cost has."""
MODELED = ("size_bytes", "latency_s")
"""The fields that a cost has if something computes them; see `CostModel`."""


@dataclass(frozen=True)
class Cost:
    """What one forward pass and one copy of a model cost.

    Attributes:
        macs: Multiply-accumulates of one forward pass at batch 1. Papers often call them FLOPs; a multiply-accumulate
            is two floating-point operations. Convolutions and matrix products only, no bias, norm or activation.
        params: Number of parameters; a shared one counts once, buffers do not count.
        size_bytes: Of the weights file, parameters and buffers in the precision they have; None if nobody asked.
        latency_s: Seconds of one forward pass on a target; None if nobody asked.
    """

    macs: int
    params: int
    size_bytes: int | None = None
    latency_s: float | None = None

    def to_json(self) -> dict[str, int | float]:
        """A JSON object with one number per field that is known."""
        found = {name: getattr(self, name) for name in (*FIELDS, *MODELED)}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Cost":
        """Inverse of `to_json`.

        Raises:
            BudgetError: If a field is missing, unknown or no number that it can have.
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


def format_count(value: float) -> str:
    """A count for people: three significant digits and a decimal unit, such as "125 M" or "12.3 k".

    Args:
        value: Not negative. k = 1e3, M = 1e6, G = 1e9, T = 1e12.
    """
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if float(f"{value:.3g}") >= scale:
            return f"{_three_digits(value / scale)} {unit}"
    return _three_digits(value)


def format_cost(field: str, value: float) -> str:
    """An amount of a field of `Cost` for people, with its unit: "4.2 ms", "1.25 MB", "40.9 M".

    Args:
        field: Name of the field.
        value: Not negative.
    """
    if field == "size_bytes":
        return f"{format_count(value)}B" if value >= 1000 else f"{format_count(value)} B"
    if field == "latency_s":
        unit, scale = next(((u, s) for u, s in (("s", 1), ("ms", 1e-3)) if float(f"{value:.3g}") >= s), ("us", 1e-6))
        return f"{_three_digits(value / scale)} {unit}"
    return format_count(value)


def _three_digits(value: float) -> str:
    rounded = float(f"{value:.3g}")
    decimals = 0 if rounded == 0 else max(0, 2 - math.floor(math.log10(rounded)))
    text = f"{rounded:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


_AMOUNT = re.compile(
    r"(?P<number>([0-9]+(_[0-9]+)*)?(\.[0-9]+)?(e[+-]?[0-9]{1,3})?)\s*(?P<unit>%|[a-zµ]*)", re.IGNORECASE
)
_CLAUSE = re.compile(r"(?P<word>[A-Za-z_]+)\s*(?P<sign>[<>=!]+)\s*(?P<amount>.*)")
_LONGEST, _SHOWN = 1_000, 80
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
        return BY_WORD[self.word].of

    def of(self, original: Cost) -> float:
        """The bound as a count, bytes or seconds, for a model whose whole cost is ``original``.

        Raises:
            BudgetError: If it is relative to what ``original`` does not say.
        """
        return self.value * amount_of(original, self.field) / 100 if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.word}<={self.amount}"

    @property
    def amount(self) -> str:
        """The bound as text that `Budget` reads back to the same number."""
        quantity = BY_WORD[self.word]
        if self.relative:
            return f"{_shortest(self.value)}%"
        for unit in quantity.shown:
            scale = quantity.units[unit.lower()]
            text = format((Decimal(repr(self.value)) / scale).normalize(), "f")
            if self.value >= float(scale) and len(text) < 8 and float(Decimal(text) * scale) == self.value:
                return f"{text}{unit}"
        whole = next((unit for unit in quantity.shown if quantity.units[unit.lower()] == 1), "")
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
        nonzero: Bound on the number of parameters that are not zero, a percentage being of all of the original's.
            Channels are cut to the other bounds first; weight pruning sees to this one.
        size: Bound on the bytes of the weights file.
        latency: Bound on the seconds of one forward pass on a target, see `secateur.latency`.

    Raises:
        BudgetError: If nothing is limited or a value cannot be read.
    """

    macs: str | float | None = None
    params: str | float | None = None
    nonzero: str | float | None = None
    size: str | float | None = None
    latency: str | float | None = None

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
        if len(text) > _LONGEST:
            raise BudgetError(f"`budget` must have at most {_LONGEST} characters; got {len(text)}. {_EXAMPLE}.")
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
        """The limits on fields of `Cost`: all but that on parameters that are not zero."""
        return tuple(limit for limit in self.parts if BY_WORD[limit.word].limited)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of `Cost` that are bounded."""
        return tuple(limit.field for limit in self.of_cost)

    def limits(self, original: Cost) -> dict[str, float]:
        """The bounds by field of `Cost`, in its units, for a model whose whole cost is ``original``.

        Raises:
            BudgetError: If one is relative to what ``original`` does not say.
        """
        return {limit.field: limit.of(original) for limit in self.of_cost}

    def nonzero_limit(self, original: Cost) -> float | None:
        """The bound on parameters that are not zero, as a count; None if there is none."""
        return next((limit.of(original) for limit in self.parts if limit.word == "nonzero"), None)

    def allows(self, cost: Cost, original: Cost) -> bool:
        """Whether ``cost`` is within every bound on a field of it (equal to it is within).

        Raises:
            BudgetError: If a bound is on what ``cost`` or ``original`` does not say.
        """
        return all(amount_of(cost, name) <= bound for name, bound in self.limits(original).items())

    def __str__(self) -> str:
        return ", ".join(map(str, self.parts))


def amount_of(cost: Cost, field: str) -> float:
    """A field of a cost.

    Raises:
        BudgetError: If the cost does not say it.
    """
    value = getattr(cost, field)
    if value is None:
        word = next(quantity.word for quantity in QUANTITIES if quantity.of == field)
        raise BudgetError(
            f"`budget` must limit what is known of the model; got a limit of {word}, and a cost without {field}. "
            "Give the search something that computes it: `secateur.latency.fit_latency` for latency, "
            "`secateur.cost.FileSize` for size; secateur.compress does."
        )
    return value


def _clause(part: str, text: str) -> tuple[str, str]:
    """Word and amount of one "word=amount"."""
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
    """One value in any accepted spelling."""
    word, plain = quantity.word, type(value) in (int, float)
    text = (repr(float(value)) if plain else value if isinstance(value, str) else "").strip()  # type: ignore[arg-type]
    match = _AMOUNT.fullmatch(text)
    if match is None or not re.match(r"\.?[0-9]", match["number"]) or float(match["number"]) == math.inf:
        units = "an optional unit %, k, M or G" if "" in quantity.units else f"the unit % or {quantity.said}"
        raise BudgetError(f"`{word}` must be a number with {units}; got {repr(value)[:_SHOWN]}. {_EXAMPLE}.")
    number, unit = Decimal(match["number"].replace("_", "")), match["unit"].lower()
    if unit == "%":
        if not 0 < number <= 100:
            raise BudgetError(f"`{word}` must be above 0% and at most 100% of the original; got {value!r}.")
        return Limit(word, float(number), relative=True)
    if unit not in quantity.units and not plain:
        raise BudgetError(f"`{word}` must have the unit %, {quantity.said}; got {unit!r} in {value!r}. {_EXAMPLE}.")
    amount = float(number * quantity.units.get(unit, Decimal(1)))
    if amount < quantity.least:
        if quantity.least < 1:
            raise BudgetError(f"`{word}` must be above 0; got {value!r}. {_EXAMPLE}.")
        hint = f" Write '{_shortest(amount * 100)}%' for a fraction of the original." if amount > 0 else ""
        raise BudgetError(f"`{word}` must be at least 1 when it is a count; got {value!r}.{hint}")
    return Limit(word, amount, relative=False)


def _shortest(value: float) -> str:
    return str(int(value)) if value.is_integer() else repr(value)


def is_timed(budget: Budget) -> bool:
    """Whether a budget limits the latency."""
    return "latency_s" in budget.fields
