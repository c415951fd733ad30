"""Format numbers with their units for reports. A no-break space joins each number and its unit."""

import math
from datetime import datetime

_SPACE = "\u00a0"
_MINUS = "\u2212"
_TIMES = "\u00d7"
_NOTHING = "\u2013"
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(value: float) -> str:
    """Format a count with an SI prefix: 125490000 is ``125.5 M``, 900 is ``900``."""
    for factor, prefix in _PREFIXES:
        if abs(value) >= factor * 0.9995:
            return f"{_digits(value / factor)}{_SPACE}{prefix}"
    return f"{value:g}"


def size(value: float) -> str:
    """Format bytes with an SI prefix (1 kB = 1000 bytes)."""
    return count(value) + ("B" if abs(value) >= 999.5 else f"{_SPACE}bytes")


def duration(seconds: float) -> str:
    """Format seconds as s, ms or µs with three digits."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor * 0.9995:
            return f"{_digits(seconds / factor)}{_SPACE}{unit}"
    return f"{_digits(seconds * 1e6)}{_SPACE}µs"


def percent(fraction: float, digits: int = 1) -> str:
    """Format a fraction as a percentage."""
    return f"{fraction * 100:.{digits}f}{_SPACE}%".replace("-", _MINUS)


def change(before: float, after: float) -> str:
    """Format the relative change from one number to another, signed: ``−48.7 %``."""
    if before == 0:
        return _NOTHING
    return signed((after / before - 1) * 100, 1) + f"{_SPACE}%"


def points(before: float, after: float) -> str:
    """Format the difference of two fractions in percentage points, signed."""
    return signed((after - before) * 100, 2) + " points"


def signed(value: float, digits: int) -> str:
    """Format a number with its sign, ± if it rounds to zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return f"±{text}"
    return ("+" if value > 0 else _MINUS) + text


def error(value: float | None) -> str:
    """Format a numerical difference: ``0``, or two digits in scientific notation."""
    if value is None:
        return _NOTHING
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", _MINUS)


def factor(value: float) -> str:
    """Format a ratio: ``1.94×``."""
    return f"{value:.2f}{_TIMES}"


def _digits(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 999.5 else f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def moment(date: str) -> str:
    """Format an ISO 8601 date: ``2026-01-31 09:05 UTC``; any other text is unchanged."""
    try:
        when = datetime.fromisoformat(date)
    except ValueError:
        return date
    return when.strftime("%Y-%m-%d %H:%M %Z").strip()
