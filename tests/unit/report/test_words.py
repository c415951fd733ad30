"""Numbers become words with the right unit; intervals and scales agree with their definitions."""

import itertools
import math

import pytest

from secateur.report import LayerWidth, TrainedEpoch
from secateur.report import units as _format
from secateur.report.charts import loss_plot, round_steps, score_plot, width_plot
from secateur.tasks import Score
from secateur.tasks.classification import TOP1


def plain(text: str) -> str:
    """The same words with the characters of a keyboard."""
    return text.translate({0xA0: " ", 0x2212: "-", 0xD7: "x", 0x2013: "--"})


@pytest.mark.parametrize(
    ("function", "value", "words"),
    [
        (_format.count, 0, "0"),
        (_format.count, 999, "999"),
        (_format.count, 999_999, "1.00 M"),
        (_format.count, 125_485_706, "125.5 M"),
        (_format.count, 4.1e9, "4.10 G"),
        (_format.size, 12, "12 bytes"),
        (_format.size, 3_453_000, "3.45 MB"),
        (_format.size, 999.9, "1.00 kB"),
        (_format.duration, 0.0021, "2.10 ms"),
        (_format.duration, 0.9999, "1.00 s"),
        (_format.duration, 42e-6, "42.0 µs"),
        (_format.percent, 0.507, "50.7 %"),
        (_format.percent, -0.1, "-10.0 %"),
        (_format.error, None, "--"),
        (_format.error, 0.0, "0"),
        (_format.error, 1.23e-7, "1.2e-7"),
        (_format.error, math.inf, "inf"),
        (_format.moment, "2026-01-31T09:05:00+00:00", "2026-01-31 09:05 UTC"),
        (_format.moment, "yesterday", "yesterday"),
    ],
)
def test_words(function, value: float, words: str) -> None:
    assert plain(function(value)) == words


@pytest.mark.parametrize(
    ("before", "after", "words"), [(100, 49.3, "-50.7 %"), (1, 1, "±0.0 %"), (0, 1, "--"), (2, 3, "+50.0 %")]
)
def test_changes(before: float, after: float, words: str) -> None:
    assert plain(_format.change(before, after)) == words


def test_points() -> None:
    assert plain(_format.points(0.9339, 0.9305)) == "-0.34 points"
    assert _format.points(0.5, 0.500001) == "±0.00 points"


@pytest.mark.parametrize(("top1", "n"), [(0.9, 10_000), (0.0, 10), (1.0, 10), (0.33, 7)])
def test_interval_solves_the_wilson_equation(top1: float, n: int) -> None:
    """Its ends are the p with (top1 - p)^2 = z^2 p (1 - p) / n."""
    for p in Score(top1, None, n, TOP1).interval:
        assert (top1 - p) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / n, abs=1e-12)


def test_interval_of_no_images_is_everything() -> None:
    assert Score(0.0, None, 0, TOP1).interval == (0.0, 1.0)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.31, 2.4), (88.1, 93.4), (5, 5), (0, 0), (-1e-9, 1e9), (1e-7, 2e-7)]
)
def test_scales_enclose_the_values_evenly(low: float, high: float) -> None:
    steps = round_steps(low, high, 4)
    gap = steps[1] - steps[0]
    assert steps[0] <= low + 1e-9 * abs(gap)
    assert steps[-1] >= high - 1e-9 * abs(gap)
    assert 2 <= len(steps) <= 8
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert gaps == pytest.approx([gap] * len(gaps))


def test_curves_need_two_values() -> None:
    assert loss_plot([TrainedEpoch(1, 1.0)]) is None
    assert score_plot([TrainedEpoch(1, 1.0), TrainedEpoch(2, 1.0, 0.5)], None, TOP1) is None


def test_curve_positions_and_labels() -> None:
    plot = loss_plot([TrainedEpoch(epoch, 2.0 - epoch / 40) for epoch in range(1, 41)])
    assert plot is not None
    assert (plot.points[0].x, plot.points[-1].x) == (0, 100)
    assert [tick.text for tick in plot.x_ticks] == ["1", "10", "20", "30", "40"]
    assert all(0 <= point.y <= 100 for point in plot.points)
    assert plot.points[0].y < plot.points[-1].y


def test_the_original_is_inside_the_plot() -> None:
    plot = score_plot([TrainedEpoch(1, 1.0, 0.5), TrainedEpoch(2, 1.0, 0.6)], 0.9, TOP1)
    assert plot is not None
    assert plot.reference is not None
    assert 0 <= plot.reference.y < plot.points[1].y


def test_groups_follow_the_names() -> None:
    names = ["stem", *(f"blocks.0.fc{n}" for n in range(9)), *(f"blocks.1.fc{n}" for n in range(10))]
    assert width_plot([LayerWidth(n, 8, 4) for n in names]).groups == (("", 1), ("blocks", 19))
    inner = [LayerWidth(n, 8, 4) for n in names[1:]]
    assert width_plot(inner).groups == (("blocks.0", 9), ("blocks.1", 10))
    assert width_plot([LayerWidth("a", 8, 4)]).groups == (("layers in order of execution", 1),)
