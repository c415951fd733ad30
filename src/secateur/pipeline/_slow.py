"""Why a network with fewer multiply-accumulates is hardly faster."""

from collections.abc import Mapping
from typing import cast

from secateur.latency import LatencyRecord
from secateur.pipeline._result import Halfway

_NOTABLE = 0.1
"""Part of the MACs that must be gone before anybody expects a faster network."""
_PAID = 0.5
"""Part of that which the time must have fallen by."""
_ALIGNED = 8


def slow_because(half: Halfway, macs: float, record: LatencyRecord) -> tuple[str, ...]:
    """A sentence with the cause, if the MACs fell and the time did not; none otherwise.

    Args:
        half: Widths, and what the search noted of the latency.
        macs: Of the student / of the original.
        record: Both, measured.
    """
    time = 1 / record.speedup.median
    if 1 - macs < _NOTABLE or 1 - time >= _PAID * (1 - macs):
        return ()
    said = (
        f"The MACs fell by {100 * (1 - macs):.0f} %, the time on {record.runtime} by {100 * (1 - time):.0f} % only "
        f"({record.threads} thread{'s' if record.threads > 1 else ''}, batch {record.batch_size})."
    )
    return (f"{said} {_cause(half)}",)


def _cause(half: Halfway) -> str:
    widths = half.found.architecture.widths
    odd = [name for name, width in widths.items() if width % _ALIGNED]
    if 4 * len(odd) > len(widths):
        return (
            f"{len(odd)} of {len(widths)} widths are no multiple of {_ALIGNED}, for which kernels are made: set a "
            "divisor (--divisor 8), or bound the latency, and the divisor is found by measuring (--budget latency=50%)."
        )
    noted = half.found.notes.get("latency")
    parts = cast(Mapping[str, Mapping[str, float]], noted).get("parts", {}) if isinstance(noted, Mapping) else {}
    elsewhere = 1 - parts.get("layers", 1.0)
    if elsewhere > 0.4:
        return (
            f"About {100 * elsewhere:.0f} % of it is not spent in convolutions and linear layers, but in activations, "
            "sums and what every pass costs: fewer blocks (--remove-blocks) take that away, fewer channels hardly."
        )
    return (
        "Its layers are so small that what a layer costs whatever its width weighs most, or are bound by memory: fewer "
        "blocks (--remove-blocks), a larger batch or another runtime may gain more."
    )
