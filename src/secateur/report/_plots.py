"""Where the marks of the two pictures go, in percent of the plot. The template draws them with HTML and inline SVG.

Why not plotly: it would add more than 4 MB and a script to a page of some 40 kB, for bars and two lines. This way the
report runs no script at all, prints, follows light and dark through its style sheet, and its text never shrinks with
the picture on a phone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.report._run import LayerWidth, TrainedEpoch

_MOST_LABELS = 12
_LEAST_SHARE = 0.07
"""A group narrower than this share of the plot has no room for its name."""


@dataclass(frozen=True)
class Tick:
    """A label on a scale, at a position in percent."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """One axis: heights in percent of the plot."""

    name: str
    before: int
    after: int
    before_height: float
    after_height: float


@dataclass(frozen=True)
class BarPlot:
    """Widths of all axes: bars, (label, number of bars) groups below them, and the scale."""

    bars: tuple[Bar, ...]
    groups: tuple[tuple[str, int], ...]
    ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Point:
    """A measured value: position in percent from the left and from the top, and its words."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class LinePlot:
    """A curve over epochs, perhaps with a second one; ``reference`` is a line across with its words, or None."""

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
        """The same of the second curve."""
        return _path(self.second)


def width_plot(widths: Sequence[LayerWidth]) -> BarPlot:
    """Bars of all axes on one scale from zero."""
    widest = max(max(width.before, width.after) for width in widths)
    steps = [widest * quarter / 4 for quarter in range(5)] if widest % 4 == 0 else round_steps(0.0, float(widest), 4)
    top = steps[-1]
    bars = tuple(Bar(w.name, w.before, w.after, 100 * w.before / top, 100 * w.after / top) for w in widths)
    return BarPlot(bars, _groups([w.name for w in widths]), tuple(Tick(100 * s / top, f"{s:g}") for s in steps))


def loss_plot(epochs: Sequence[TrainedEpoch]) -> LinePlot | None:
    """Training loss by epoch, or None with fewer than two finite values."""
    return line_plot("Training loss", [(e.epoch, e.loss) for e in epochs if math.isfinite(e.loss)])


def accuracy_plot(epochs: Sequence[TrainedEpoch], original: float | None) -> LinePlot | None:
    """Validation accuracy by epoch, with the original's as a line across; None with fewer than two values."""
    values = [(e.epoch, 100 * e.accuracy) for e in epochs if e.accuracy is not None and math.isfinite(e.accuracy)]
    return line_plot("Validation accuracy (%)", values, None if original is None else ("original", 100 * original))


def line_plot(
    title: str,
    values: Sequence[tuple[int, float]],
    across: tuple[str, float] | None = None,
    second: Sequence[tuple[int, float]] = (),
    span: tuple[float, ...] = (),
) -> LinePlot | None:
    """Finite values by epoch, ascending; None with fewer than two.

    Args:
        title: Above the plot.
        values: (epoch, value) pairs.
        across: Name and value of a line across.
        second: Pairs of a second curve, at epochs of the first.
        span: Values that the scale must show, whatever the curves do.
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
    """Epochs to mark on a scale: both ends, and round ones between that leave them room."""
    every = max(1, round(round_steps(0, last - first, 5)[1]))
    between = range(first - first % every + every, last, every)
    return [first, *(e for e in between if min(e - first, last - e) > every * 0.45), last]


def round_steps(low: float, high: float, about: int) -> list[float]:
    """Round numbers, evenly spaced, that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    rough = span / about
    scale = 10 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, max(last, first + 1) + 1)]


def _groups(names: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Neighbours that share the beginning of their names, by the shortest beginning that tells a few groups apart."""
    for depth in (1, 2):
        groups: list[tuple[str, int]] = []
        for name in names:
            key = ".".join(name.split(".")[:depth])
            if groups and groups[-1][0] == key:
                groups[-1] = (key, groups[-1][1] + 1)
            else:
                groups.append((key, 1))
        if 2 <= len(groups) <= _MOST_LABELS:
            room = len(names) * _LEAST_SHARE
            return tuple((name if number >= room else "", number) for name, number in groups)
    return (("layers in order of execution", len(names)),)
