"""What a budget can limit, and the units it may be written in."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

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
