"""What an architecture costs: plain numbers with units."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from secateur.errors import BudgetError

FIELDS = ("macs", "params")
"""The fields of `Cost` that a budget can limit, in the order they are shown."""


@dataclass(frozen=True)
class Cost:
    """What one forward pass and one copy of a model cost.

    Attributes:
        macs: Multiply-accumulates of one forward pass at batch 1. Papers often call them FLOPs; a multiply-accumulate
            is two floating-point operations. Convolutions and matrix products only, no bias, norm or activation.
        params: Number of parameters; a shared one counts once, buffers do not count.
    """

    macs: int
    params: int

    def to_json(self) -> dict[str, int]:
        """A JSON object with one number per field."""
        return {"macs": self.macs, "params": self.params}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> "Cost":
        """Inverse of `to_json`.

        Raises:
            BudgetError: If a field is missing, unknown or not a whole number.
        """
        if set(data) != set(FIELDS) or not all(type(value) is int and value >= 0 for value in data.values()):
            raise BudgetError(
                f"`cost` must hold the whole numbers {', '.join(FIELDS)}, not negative; got {dict(data)!r}."
            )
        return cls(**data)  # type: ignore[arg-type]


def format_count(value: float) -> str:
    """A count for people: three significant digits and a decimal unit, such as "125 M" or "12.3 k".

    Args:
        value: Not negative. k = 1e3, M = 1e6, G = 1e9, T = 1e12.
    """
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if float(f"{value:.3g}") >= scale:
            return f"{_three_digits(value / scale)} {unit}"
    return _three_digits(value)


def _three_digits(value: float) -> str:
    rounded = float(f"{value:.3g}")
    decimals = 0 if rounded == 0 else max(0, 2 - math.floor(math.log10(rounded)))
    text = f"{rounded:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
