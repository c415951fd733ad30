"""Pictures of what a stage-wise search chose from."""

from dataclasses import replace

import pytest

from secateur.report import Measured, RunReport, write_report
from secateur.report.charts import stage_plots
from secateur.search import JudgedStage

STAGE = JudgedStage("stage1", "layer1", 3.2, 7, (0.0, 0.5, 0.2, 0.4, 0.1), (0.4, 0.1, 0.2, 0.3, 0.2), 4)


def test_candidates_that_no_other_one_beats_are_the_front():
    (plot,) = stage_plots([STAGE])
    assert [point.text for point in plot.front] == [
        "10 % of the MACs, loss 0.5",
        "20 % of the MACs, loss 0.1",
        "40 % of the MACs, loss 0",
    ]
    assert sorted(point.text for point in plot.points) == ["20 % of the MACs, loss 0.2", "30 % of the MACs, loss 0.4"]
    assert plot.chosen == plot.front[1]
    assert plot.path.count("H") == plot.path.count("V") == 2


def test_marks_lie_where_the_scales_say():
    (plot,) = stage_plots([STAGE])
    left = {tick.text: tick.at for tick in plot.x_ticks}
    down = {tick.text: tick.at for tick in plot.y_ticks}
    assert (left["0"], down["0"]) == (0, 100)
    assert plot.front[-1].x == pytest.approx(left["40"])
    assert plot.front[0].y == pytest.approx(100 - 0.5 * (100 - down["0.2"]) / 0.2)


def test_a_stage_without_a_choice_has_no_picture():
    assert stage_plots([replace(STAGE, losses=(0.1,), macs=(0.2,), chosen=0)]) == ()


def test_many_candidates_are_thinned_but_the_front_is_whole():
    falling = tuple(1 / (1 + n) for n in range(50))
    above = tuple(loss + 1 for loss in falling for _ in range(40))
    macs = tuple(0.01 * n for n in range(50))
    stage = replace(STAGE, losses=falling + above, macs=macs + tuple(m for m in macs for _ in range(40)), chosen=3)
    (plot,) = stage_plots([stage])
    assert len(plot.front) == 50
    assert 300 <= len(plot.points) <= 400


def test_the_page_shows_every_stage(tmp_path):
    before, after = Measured(macs=100, params=10), Measured(macs=50, params=5)
    run = RunReport("net", before, after, stages=(STAGE, replace(STAGE, name="stage2", cut="")), fairness=0.26)
    page = write_report(tmp_path / "report.html", run).read_text()
    assert "stage1, ends at layer1" in page
    assert "stage2, ends at the output" in page
    assert "0.26 times as often" in page
    assert page.count('class="dot taken"') == 2
    without = write_report(tmp_path / "other.html", replace(run, stages=())).read_text()
    assert "What the search chose from" not in without
