"""Winners, their uncertainty, and records that are read back."""

import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from compared import comparison_of, failed_run, run_of

from secateur.report.comparison import ComparedRun, find_winner, unbeaten_runs
from secateur.tasks import Metric
from secateur.tasks.classification import TOP1


def test_the_best_mean_over_the_seeds_wins_and_the_interval_is_of_the_same_images():
    runs = [
        run_of("a", seed=0, right="1111111111", score=1.0),
        run_of("a", seed=1, right="1111111110", score=0.9),
        run_of("b", seed=0, right="1111111100", score=0.8),
        run_of("b", seed=1, right="1111111100", score=0.8),
    ]
    found = find_winner("macs<=50%", runs, TOP1)
    assert (found.strategy, found.runner_up, found.seeds) == ("a", "b", 2)
    assert (found.score, found.least, found.most) == (pytest.approx(0.95), 0.9, 1.0)
    # By hand: differences image by image, over both seeds, are eight times 0, once 1 and once 0.5.
    per_image = [0.0] * 8 + [1.0, 0.5]
    middle = sum(per_image) / 10
    images = sum((each - middle) ** 2 for each in per_image) / 9 / 10
    seeds = ((0.2 - 0.15) ** 2 + (0.1 - 0.15) ** 2) / 1 / 2
    half = 1.959964 * math.sqrt(images + seeds)
    assert (found.ahead, found.low, found.high) == pytest.approx((0.15, 0.15 - half, 0.15 + half))
    assert not found.clear
    assert "can be chance" in found.sentence(TOP1)
    assert "mean of 2 seeds, 90.00 % to 100.00 %" in found.sentence(TOP1)


def test_a_lead_on_every_image_is_clear():
    many = [run_of("a", right="1" * 10, score=1.0), run_of("b", right="0" * 9 + "1", score=0.1)]
    found = find_winner("macs<=50%", many, TOP1)
    assert found.clear
    assert "chance" not in found.sentence(TOP1)


def test_errors_are_better_when_lower():
    error = Metric("mean error", unit="", higher_is_better=False)
    found = find_winner("x", [run_of("a", score=0.4, right=""), run_of("b", score=0.3, right="")], error)
    assert (found.strategy, found.ahead) == ("b", pytest.approx(0.1))
    assert math.isnan(found.low)
    assert "nothing is known of the uncertainty" in found.sentence(error)


def test_a_strategy_with_a_failed_seed_does_not_win():
    runs = [run_of("a", seed=0, score=1.0), failed_run("a", seed=1), run_of("b", seed=0, score=0.5),
            run_of("b", seed=1, score=0.5)]  # fmt: skip
    assert find_winner("macs<=50%", runs, TOP1).strategy == "b"
    assert find_winner("macs<=50%", [failed_run("a")], TOP1).sentence(TOP1) == "macs<=50%: every run failed."
    assert find_winner("macs<=50%", [], TOP1).sentence(TOP1) == "macs<=50%: no run was made."
    assert "a alone has finished, 90.00 %" in find_winner("x", [run_of("a"), failed_run("b")], TOP1).sentence(TOP1)


def test_the_last_round_counts():
    runs = [run_of("a", score=0.9), run_of("b", score=0.8), run_of("a", score=0.9, round=1),
            run_of("b", score=0.95, round=1)]  # fmt: skip
    assert find_winner("macs<=50%", runs, TOP1).strategy == "b"


def test_records_are_read_back_and_written_as_a_table(tmp_path: Path):
    runs = (run_of("a", removed_blocks=("layer1.0",), warnings=("careful",)), failed_run("b"))
    for run in runs:
        again = ComparedRun.from_json(run.to_json())
        assert again.to_json() == run.to_json()
        assert again.ok == run.ok
    comparison_of(*runs).write_parquet(tmp_path / "records.parquet")
    table = pq.read_table(tmp_path / "records.parquet").to_pylist()
    assert [row["strategy"] for row in table] == ["a", "b"]
    assert (table[0]["score"], table[1]["score"], table[1]["error"]) == (0.9, None, runs[1].error)


def test_unbeaten_runs_are_found():
    runs = [run_of("a", macs=30, score=0.9), run_of("b", macs=10, score=0.5), run_of("c", macs=20, score=0.4),
            run_of("d", macs=40, score=0.95), failed_run("e")]  # fmt: skip
    assert unbeaten_runs(runs, "macs", TOP1) == (1, 0, 3)


def test_a_comparison_shows_itself():
    found = comparison_of(run_of("a", score=1.0), run_of("b", score=0.5), failed_run("c"))
    assert repr(found).startswith("Comparison of 3 runs of net, 1 of which failed:\n  macs<=50%: a is best")
    assert "<table>" in found._repr_html_()
