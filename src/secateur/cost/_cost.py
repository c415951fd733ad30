"""What an architecture costs: plain numbers with units."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from secateur.errors import BudgetError

FIELDS = ("macs", "params")
"""The fields of `Cost` that every cost has."""
MODELLED = ("size_bytes", "latency_s")
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
        found = {name: getattr(self, name) for name in (*FIELDS, *MODELLED)}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Cost":
        """Inverse of `to_json`.

        Raises:
            BudgetError: If a field is missing, unknown or no number that it can have.
        """
        whole = all(type(data[name]) is int for name in (*FIELDS, "size_bytes") if name in data)
        if not set(FIELDS) <= set(data) <= {*FIELDS, *MODELLED} or not whole or not all(map(_amount, data.values())):
            raise BudgetError(
                f"`cost` must hold the whole numbers {', '.join(FIELDS)}, not negative, and may hold "
                f"{' and '.join(MODELLED)}; got {dict(data)!r}."
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
