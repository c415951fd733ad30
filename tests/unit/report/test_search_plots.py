"""The pictures of a search: where each color lies, and what is left out."""

import re
from dataclasses import replace

import pytest

from secateur.report import Measured, RunReport
from secateur.report.charts import HeatMap, search_plots
from secateur.report.html import render
from secateur.search import SearchedDepth, SearchedWidth, SearchEpoch


def searched(epoch: int, *kept: float, entropy: float = 0.5, macs: float | None = 0.6) -> SearchEpoch:
    widths = tuple(SearchedWidth(f"axis{n}", part, round(16 * part), 16) for n, part in enumerate(kept))
    return SearchEpoch(epoch, entropy, 1.0, macs, macs, widths)


def cells(drawn: HeatMap) -> dict[tuple[int, int], float]:
    """(row, column) to the kept fraction that its color stands for: the paths, read back."""
    found: dict[tuple[int, int], float] = {}
    for shade in drawn.shades:
        for x, y, length in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", shade.path):
            for column in range(int(x), int(x) + int(length)):
                assert (int(y), column) not in found
                found[int(y), column] = drawn.low + (1 - drawn.low) * shade.depth
    return found


def test_every_cell_has_the_color_of_its_fraction() -> None:
    kept = [(0.9, 0.3), (0.9, 0.45), (1.0, 0.34)]
    plots = search_plots([searched(n, *parts) for n, parts in enumerate(kept, 1)], None)
    assert plots is not None
    assert plots.widths is not None
    assert plots.widths.low == 0.3
    wanted = {(row, column): kept[column][row] for row in range(2) for column in range(3)}
    found = cells(plots.widths)
    assert found.keys() == wanted.keys()
    half_a_shade = 0.5 * 0.7 / 24
    assert all(abs(found[cell] - wanted[cell]) <= half_a_shade + 1e-9 for cell in wanted)
    assert [(row.name, row.final) for row in plots.widths.rows] == [("axis0", "16 of 16"), ("axis1", "5 of 16")]
    assert plots.depths is None


def test_many_epochs_share_columns_and_the_last_is_at_the_right() -> None:
    epochs = [searched(n, n / 1000) for n in range(1, 1001)]
    plots = search_plots(epochs, None)
    assert plots is not None
    assert plots.widths is not None
    assert plots.widths.columns == 120
    found = cells(plots.widths)
    assert found[0, 119] == 1.0
    assert [found[0, column] for column in range(120)] == sorted(found.values())
    assert [tick.text for tick in plots.widths.ticks] == ["8", "200", "400", "600", "800", "1000"]
    assert plots.widths.ticks[-1].at == pytest.approx(100 * 119.5 / 120)
    # Read from the picture at a tick: the color there is that of its epoch, within a column and half a shade.
    for tick in plots.widths.ticks:
        assert found[0, int(tick.at / 100 * 120)] == pytest.approx(int(tick.text) / 1000, abs=1 / 120 + 0.5 / 24)


def test_axes_that_an_epoch_does_not_name_stay_blank() -> None:
    plots = search_plots([searched(1, 0.5), searched(2, 0.5, 0.7)], None)
    assert plots is not None
    assert plots.widths is not None
    assert cells(plots.widths).keys() == {(0, 0), (0, 1), (1, 1)}


def test_curves_show_entropy_and_both_costs_with_the_budget() -> None:
    epochs = [replace(searched(n, 0.5, entropy=1 - 0.1 * n, macs=0.8 - 0.1 * n), current_macs=0.5) for n in (1, 2, 3)]
    plots = search_plots(epochs, 0.45)
    assert plots is not None
    entropy, cost = plots.curves
    assert [point.text for point in entropy.points] == ["epoch 1: 0.9", "epoch 2: 0.8", "epoch 3: 0.7"]
    assert entropy.reference is None
    # Always from 0 to 1: a scale of its own would make nothing look like much.
    assert [tick.text for tick in entropy.y_ticks] == ["0", "0.25", "0.5", "0.75", "1"]
    assert [point.y for point in entropy.points] == pytest.approx([10, 20, 30])
    assert [point.text for point in cost.points] == ["epoch 1: 70", "epoch 2: 60", "epoch 3: 50"]
    assert [point.text for point in cost.second] == ["epoch 1: 50", "epoch 2: 50", "epoch 3: 50"]
    assert cost.reference is not None
    assert cost.reference.text == "budget 45.00"
    # The scale is linear: the budget lies as far below 50 as 50 does below 55.
    heights = {point.text: point.y for point in (*cost.points, *cost.second)}
    assert heights["epoch 3: 50"] == cost.points[2].y
    per_point = (cost.points[1].y - cost.points[0].y) / 10
    assert cost.reference.y == pytest.approx(cost.points[2].y + 5 * per_point)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), None])
def test_numbers_that_are_missing_are_not_drawn(odd: float | None) -> None:
    epochs = [searched(1, 0.5), searched(2, 0.5, macs=odd), searched(3, 0.5)]
    plots = search_plots(epochs, None)
    assert plots is not None
    assert [len(curve.points) for curve in plots.curves] == [3, 2]
    without = search_plots([searched(n, 0.5, macs=odd) for n in (1, 2)], 0.5)
    assert without is not None
    assert [curve.title for curve in without.curves] == ["Entropy of the choices"]


def test_one_epoch_is_a_picture_without_curves() -> None:
    depths = (SearchedDepth("layer1.0", 2.0, 2, 4),)
    plots = search_plots([replace(searched(1, 0.5), depths=depths)], 0.5)
    assert plots is not None
    assert plots.curves == ()
    assert plots.depths is not None
    assert cells(plots.depths) == {(0, 0): pytest.approx(0.5, abs=0.01)}
    assert [tick.text for tick in plots.depths.ticks] == ["1"]


def test_long_names_keep_the_end_that_tells_them_apart() -> None:
    name = "features.denseblock1.denselayer12.conv1.deeper.still"
    epoch = replace(searched(1), widths=(SearchedWidth(name, 0.5, 4, 8),))
    plots = search_plots([epoch], None)
    assert plots is not None
    assert plots.widths is not None
    row = plots.widths.rows[0]
    assert row.label == "…yer12.conv1.deeper.still"[:1] + name[-33:]
    assert row.name == name


def test_a_large_search_stays_a_small_page_and_no_search_shows_nothing() -> None:
    run = RunReport("net", Measured(10, 10), Measured(5, 5))
    assert search_plots((), 0.5) is None
    assert "search" not in render(run)
    kept = [0.3 + 0.7 * ((7 * axis) % 11) / 11 for axis in range(150)]
    large = render(replace(run, search=tuple(searched(n, *kept) for n in range(1, 601))))
    assert large.count("6 of 16") > 1
    assert len(large) < 600_000
    assert '<details class="picture-box">' in large  # so many rows are shown when asked for
    assert '<details class="picture-box" open>' in render(replace(run, search=(searched(1, 0.5),)))
