"""The report's charts: positions of their marks in percent of the plot. The template draws them in HTML and SVG.

There are bars of widths, curves of training, heat maps of a search over its epochs, and the candidates of each stage of
a stage-wise search. plotly would add more than 4 MB and a script to a page of some 40 kB. Without it the report runs no
script, prints, follows light and dark through its style sheet, and its text does not shrink on a phone.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from secateur.report.run import LayerWidth, TrainedEpoch
from secateur.search.history import JudgedStage, SearchEpoch
from secateur.tasks.base import Metric

_MAX_GROUPS = 12
_MIN_SHARE = 0.07
"""A group narrower than this share of the plot has no room for its name."""


@dataclass(frozen=True)
class Tick:
    """A label on a scale at a position in percent."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """The bars of one axis, with heights in percent of the plot."""

    name: str
    before: int
    after: int
    before_height: float
    after_height: float


@dataclass(frozen=True)
class BarPlot:
    """The widths of all axes: bars, (label, number of bars) groups below them, and the scale."""

    bars: tuple[Bar, ...]
    groups: tuple[tuple[str, int], ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Point:
    """A measured value: its position in percent from the left and from the top, and its text."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class LinePlot:
    """One or two curves over epochs; ``reference`` is a horizontal line with its text, or None."""

    title: str
    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    reference: Point | None = None
    second: tuple[Point, ...] = ()

    @property
    def path(self) -> str:
        """SVG path data in a box of 100 by 100."""
        return _path(self.points)

    @property
    def second_path(self) -> str:
        """SVG path data of the second curve."""
        return _path(self.second)


def width_plot(widths: Sequence[LayerWidth]) -> BarPlot:
    """Make the bars of all axes on one scale from zero."""
    widest = max(max(width.before, width.after) for width in widths)
    steps = [widest * quarter / 4 for quarter in range(5)] if widest % 4 == 0 else round_steps(0.0, float(widest), 4)
    top = steps[-1]
    bars = tuple(Bar(w.name, w.before, w.after, 100 * w.before / top, 100 * w.after / top) for w in widths)
    return BarPlot(bars, _groups([w.name for w in widths]), tuple(Tick(100 * s / top, f"{s:g}") for s in steps))


def loss_plot(epochs: Sequence[TrainedEpoch]) -> LinePlot | None:
    """Plot the training loss by epoch; None with fewer than two finite values."""
    return line_plot("Training loss", _finite((e.epoch, e.loss) for e in epochs if e.loss is not None))


def score_plot(epochs: Sequence[TrainedEpoch], original: float | None, metric: Metric) -> LinePlot | None:
    """Plot the validation score by epoch, the original's as a horizontal line; None with fewer than two values."""
    factor = 100 if metric.unit == "%" else 1
    values = [(e.epoch, factor * e.score) for e in epochs if e.score is not None and math.isfinite(e.score)]
    title = f"Validation {metric.words} ({metric.unit})" if metric.unit else f"Validation {metric.words}"
    return line_plot(title, values, None if original is None else ("original", factor * original))


def line_plot(
    title: str,
    values: Sequence[tuple[int, float]],
    across: tuple[str, float] | None = None,
    second: Sequence[tuple[int, float]] = (),
    span: tuple[float, ...] = (),
) -> LinePlot | None:
    """Plot finite values by ascending epoch; None with fewer than two.

    Args:
        title: The title above the plot.
        values: (epoch, value) pairs.
        across: Name and value of a horizontal line.
        second: (epoch, value) pairs of a second curve, at epochs of the first.
        span: Values that the scale must include.
    """
    if len(values) < 2:
        return None
    first, last = values[0][0], values[-1][0]
    heights = [value for _, value in (*values, *second)] + [*span, *([] if across is None else [across[1]])]
    steps = round_steps(min(heights), max(heights), 4)
    low, high = steps[0], steps[-1]

    def left(epoch: float) -> float:
        return 100 * (epoch - first) / (last - first)

    def down(value: float) -> float:
        return 100 * (high - value) / (high - low)

    return LinePlot(
        title=title,
        points=tuple(Point(left(e), down(v), f"epoch {e}: {v:.4g}") for e, v in values),
        second=tuple(Point(left(e), down(v), f"epoch {e}: {v:.4g}") for e, v in second),
        x_ticks=tuple(Tick(left(epoch), str(epoch)) for epoch in epoch_ticks(first, last)),
        y_ticks=tuple(Tick(down(step), f"{step:g}") for step in steps),
        reference=None if across is None else Point(0, down(across[1]), f"{across[0]} {across[1]:.2f}"),
    )


def _path(points: Sequence[Point]) -> str:
    return "M" + " L".join(f"{point.x:.2f} {point.y:.2f}" for point in points)


def epoch_ticks(first: int, last: int) -> list[int]:
    """Choose the epochs to mark on a scale: both ends, and round ones between with enough distance."""
    every = max(1, round(round_steps(0, last - first, 5)[1]))
    between = range(first - first % every + every, last, every)
    return [first, *(e for e in between if min(e - first, last - e) > every * 0.45), last]


def round_steps(low: float, high: float, about: int) -> list[float]:
    """Choose round, evenly spaced numbers that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    rough = span / about
    scale = 10 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _groups(names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Group neighbors by the beginning of their names, the shortest one that gives several groups."""
    for depth in (1, 2):
        groups: list[tuple[str, int]] = []
        for name in names:
            key = ".".join(name.split(".")[:depth])
            if groups and groups[-1][0] == key:
                groups[-1] = (key, groups[-1][1] + 1)
            else:
                groups.append((key, 1))
        if 2 <= len(groups) <= _MAX_GROUPS:
            room = len(names) * _MIN_SHARE
            return tuple((name if number >= room else "", number) for name, number in groups)
    return (("layers in order of execution", len(names)),)


_MAX_COLUMNS = 120
"""With more epochs than this, several share a column: narrower ones could not be seen."""
_SHADES = 24
"""Steps between the palest and the deepest color; more cannot be told apart."""
_MAX_NAME = 34


@dataclass(frozen=True)
class HeatRow:
    """An axis or stage: its short and its full name, and what is kept at the end."""

    label: str
    name: str
    final: str


@dataclass(frozen=True)
class Shade:
    """The cells of one color: its depth, 0 to 1, and SVG path data in a box of columns by rows."""

    depth: float
    path: str


@dataclass(frozen=True)
class HeatMap:
    """A heat map: rows from top to bottom, epochs from left to right, kept fractions as colors.

    Attributes:
        rows: The rows, in order of execution.
        columns: Width of the box of the paths; its height is the number of rows.
        shades: The cells by color.
        ticks: Epochs, in percent from the left.
        low: The kept fraction of the palest color; the deepest color is 1.
    """

    rows: tuple[HeatRow, ...]
    columns: int
    shades: tuple[Shade, ...]
    ticks: tuple[Tick, ...]
    low: float


@dataclass(frozen=True)
class SearchPlots:
    """The charts of a search."""

    curves: tuple[LinePlot, ...]
    widths: HeatMap | None
    depths: HeatMap | None


def search_plots(epochs: Sequence[SearchEpoch], macs_limit: float | None) -> SearchPlots | None:
    """Make the charts of a search; None if there was none."""
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
    """Make a heat map of kept fractions, ``kept[e][row name]`` at epoch ``marks[e]``."""
    if not rows:
        return None
    columns = min(len(marks), _MAX_COLUMNS)
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
    """Put round epochs below the middle of their columns."""
    wanted = epoch_ticks(ends[0][0], ends[-1][0]) if len(ends) > 1 else [ends[0][0]]
    places = {epoch: next(column for end, column in ends if end >= epoch) for epoch in wanted}
    return tuple(Tick(100 * (column + 0.5) / len(ends), str(epoch)) for epoch, column in places.items())


def _runs(shades: Sequence[int | None]) -> Iterable[tuple[int, int, int]]:
    """Yield (shade, start, length) of runs of equal values."""
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
    """Keep the end of a long name, which distinguishes neighbors."""
    return name if len(name) <= _MAX_NAME else "…" + name[-_MAX_NAME + 1 :]


_MAX_POINTS = 400
"""More points could not be distinguished; the best ones are always drawn."""


@dataclass(frozen=True)
class StagePlot:
    """The candidates of one stage: cost from left to right, loss from bottom to top.

    Attributes:
        title: Name of the stage.
        points: Candidates that are dominated: another one is better in both.
        front: Candidates that are not dominated, ascending in cost.
        chosen: The chosen candidate.
        x_ticks: MACs in percent of the original's.
        y_ticks: Losses.
    """

    title: str
    points: tuple[Point, ...]
    front: tuple[Point, ...]
    chosen: Point
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]

    @property
    def path(self) -> str:
        """SVG path data of the front as steps, in a box of 100 by 100."""
        corners = [f"M{self.front[0].x:.2f} {self.front[0].y:.2f}"]
        corners += [f"H{point.x:.2f} V{point.y:.2f}" for point in self.front[1:]]
        return " ".join(corners)


def stage_plots(stages: Sequence[JudgedStage]) -> tuple[StagePlot, ...]:
    """Make one chart for each stage with more than one candidate."""
    return tuple(_plot(stage) for stage in stages if len(stage.losses) > 1)


def _plot(stage: JudgedStage) -> StagePlot:
    x_steps = round_steps(0.0, 100 * max(stage.macs) or 1.0, 4)
    y_steps = round_steps(0.0, max(stage.losses) or 1.0, 4)

    def at(number: int) -> Point:
        macs, loss = 100 * stage.macs[number], stage.losses[number]
        words = f"{macs:.3g} % of the MACs, loss {loss:.4g}"
        return Point(100 * macs / x_steps[-1], 100 - 100 * loss / y_steps[-1], words)

    front = _front(stage)
    others = [number for number in range(len(stage.losses)) if number not in set(front)]
    every = -(-len(others) // _MAX_POINTS) or 1
    return StagePlot(
        title=f"{stage.name}, ends at {stage.cut}" if stage.cut else f"{stage.name}, ends at the output",
        points=tuple(at(number) for number in others[::every]),
        front=tuple(at(number) for number in front),
        chosen=at(stage.chosen),
        x_ticks=tuple(Tick(100 * step / x_steps[-1], f"{step:g}") for step in x_steps),
        y_ticks=tuple(Tick(100 - 100 * step / y_steps[-1], f"{step:g}") for step in y_steps),
    )


def _front(stage: JudgedStage) -> list[int]:
    """Return the candidates that are not dominated, the cheapest first."""
    found: list[int] = []
    for number in sorted(range(len(stage.losses)), key=lambda n: (stage.macs[n], stage.losses[n])):
        if not found or stage.losses[number] < stage.losses[found[-1]]:
            found.append(number)
    return found
