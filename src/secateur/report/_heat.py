"""A search over its epochs: what it still kept of every axis as a picture of colours, and how decided it was."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from secateur.report._plots import LinePlot, Tick, epoch_ticks, line_plot
from secateur.report._run import SearchEpoch

_MOST_COLUMNS = 120
"""More epochs than this share columns: a narrower one could not be seen."""
_SHADES = 24
"""Steps between the palest and the deepest colour; more cannot be told apart."""
_MOST_LETTERS = 34


@dataclass(frozen=True)
class HeatRow:
    """One axis or stage: its name (shortened, and whole), and what is kept at the end."""

    label: str
    name: str
    final: str


@dataclass(frozen=True)
class Shade:
    """All cells of one colour: its depth, 0 to 1, and SVG path data in a box of columns by rows."""

    depth: float
    path: str


@dataclass(frozen=True)
class HeatMap:
    """Rows from top to bottom, epochs from left to right, kept fractions as colours.

    Attributes:
        rows: In order of execution.
        columns: Width of the box of the paths; its height is the number of rows.
        shades: The cells by colour.
        ticks: Epochs, in percent from the left.
        low: The kept fraction of the palest colour; the deepest is everything kept.
    """

    rows: tuple[HeatRow, ...]
    columns: int
    shades: tuple[Shade, ...]
    ticks: tuple[Tick, ...]
    low: float


@dataclass(frozen=True)
class SearchPlots:
    """All pictures of a search."""

    curves: tuple[LinePlot, ...]
    widths: HeatMap | None
    depths: HeatMap | None


def search_plots(epochs: Sequence[SearchEpoch], macs_limit: float | None) -> SearchPlots | None:
    """The pictures of a search, or None if there was none."""
    if not epochs:
        return None
    ends = epochs[-1]
    widths = [HeatRow(_short(w.axis), w.axis, f"{w.width} of {w.size}") for w in ends.widths]
    depths = [HeatRow(_short(d.stage), d.stage, f"{d.blocks} of {d.size} blocks") for d in ends.depths]
    marks = [epoch.epoch for epoch in epochs]
    curves = (_entropy_plot(epochs), _cost_plot(epochs, macs_limit))
    return SearchPlots(
        curves=tuple(curve for curve in curves if curve is not None),
        widths=_heat_map(widths, marks, [{w.axis: w.kept_fraction for w in e.widths} for e in epochs]),
        depths=_heat_map(depths, marks, [{d.stage: d.kept / max(d.size, 1) for d in e.depths} for e in epochs]),
    )


def _entropy_plot(epochs: Sequence[SearchEpoch]) -> LinePlot | None:
    return line_plot("Entropy of the choices", _finite((e.epoch, e.entropy) for e in epochs), span=(0.0, 1.0))


def _cost_plot(epochs: Sequence[SearchEpoch], limit: float | None) -> LinePlot | None:
    expected = _finite((e.epoch, _percent(e.expected_macs)) for e in epochs)
    current = _finite((e.epoch, _percent(e.current_macs)) for e in epochs)
    known = {epoch for epoch, _ in expected}
    across = None if limit is None else ("budget", 100 * limit)
    return line_plot("MACs (% of the original)", expected, across, [pair for pair in current if pair[0] in known])


def _percent(fraction: float | None) -> float:
    return math.nan if fraction is None else 100 * fraction


def _finite(values: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(epoch, value) for epoch, value in values if math.isfinite(value)]


def _heat_map(rows: Sequence[HeatRow], marks: Sequence[int], kept: Sequence[dict[str, float]]) -> HeatMap | None:
    """Colours of the kept fractions: ``kept[e][row name]`` at epoch ``marks[e]``."""
    if not rows:
        return None
    columns = min(len(marks), _MOST_COLUMNS)
    # A column of several epochs shows the last of them, so that the right edge is the end of the search.
    shown = [kept[(column + 1) * len(marks) // columns - 1] for column in range(columns)]
    grid = [[_unit(column.get(row.name)) for column in shown] for row in rows]
    values = [value for line in grid for value in line if value is not None]
    low = min(math.floor(10 * min(values, default=0.0) + 1e-9) / 10, 0.9)
    cells: dict[int, list[str]] = {}
    for y, line in enumerate(grid):
        shades = [None if value is None else round(_SHADES * (value - low) / (1 - low)) for value in line]
        for shade, start, length in _runs(shades):
            cells.setdefault(shade, []).append(f"M{start} {y}h{length}v1h-{length}z")
    ends = [(marks[(column + 1) * len(marks) // columns - 1], column) for column in range(columns)]
    return HeatMap(
        rows=tuple(rows),
        columns=columns,
        shades=tuple(Shade(shade / _SHADES, "".join(paths)) for shade, paths in sorted(cells.items())),
        ticks=_ticks(ends),
        low=low,
    )


def _ticks(ends: Sequence[tuple[int, int]]) -> tuple[Tick, ...]:
    """Round epochs below the middle of their columns."""
    wanted = epoch_ticks(ends[0][0], ends[-1][0]) if len(ends) > 1 else [ends[0][0]]
    places = {epoch: next(column for end, column in ends if end >= epoch) for epoch in wanted}
    return tuple(Tick(100 * (column + 0.5) / len(ends), str(epoch)) for epoch, column in places.items())


def _runs(shades: Sequence[int | None]) -> Iterable[tuple[int, int, int]]:
    """(shade, start, length) of neighbours that are equal."""
    start = 0
    for end in range(1, len(shades) + 1):
        if end == len(shades) or shades[end] != shades[start]:
            shade = shades[start]
            if shade is not None:
                yield shade, start, end - start
            start = end


def _unit(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else min(max(value, 0.0), 1.0)


def _short(name: str) -> str:
    """The end of a long name: it tells neighbours apart."""
    return name if len(name) <= _MOST_LETTERS else "…" + name[-_MOST_LETTERS + 1 :]
