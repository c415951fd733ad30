"""A long search says where it is; a short one does not."""

import time
from collections.abc import Iterator

import pytest
from noise_images import noise_data
from run_pipeline import run_compress
from torch import nn
from zoo import ZOO

from secateur.pipeline import search_and_cut as _paced
from secateur.pipeline.search_and_cut import ProgressLog
from secateur.search import RemoveBlocks, Uniform
from secateur.train import Silent, TrainConfig


def test_it_speaks_at_most_every_so_often() -> None:
    seconds: Iterator[float] = iter([100.0, 101.0, 119.9, 120.0, 139.0, 141.0])
    told: list[str] = []
    paced = ProgressLog(told.append, lambda: next(seconds))
    for done in range(5):
        paced(done / 5, f"step {done}")
    assert told == ["Searching, 40 % done: step 2.", "Searching, 80 % done: step 4."]


@pytest.mark.parametrize(("every", "spoken"), [(0.0, True), (1e9, False)])
def test_compress_passes_it_on(monkeypatch: pytest.MonkeyPatch, every: float, spoken: bool) -> None:
    monkeypatch.setattr(_paced, "_EVERY_S", every)
    told: list[str] = []
    model = nn.Sequential(ZOO["residual"]()[0], nn.Linear(5, 4))
    run_compress(
        model,
        noise_data(),
        budget="macs=70%",
        strategy=RemoveBlocks(Uniform()),
        train=TrainConfig(epochs=0),
        calibration_images=32,
        callbacks=Silent(),
        hear=told.append,
    )
    assert any(line.startswith("Searching, ") and "blocks fewer" in line for line in told) is spoken


def test_an_estimate_follows_from_what_is_done() -> None:
    seconds = iter([0.0, 5.0, 10.0, 21.0, 32.0, 43.0])
    told: list[str] = []
    paced = ProgressLog(told.append, lambda: next(seconds), estimating=True)
    for fraction in (0.0, 0.1, 0.1, 0.5, 0.4):
        paced(fraction, "timing")
    assert told == [
        "Searching, 10 % done, about 2 min left: timing.",
        # Half of a part says nothing about the speed: the time runs down.
        "Searching, 10 % done, about 79 s left: timing.",
        "Searching, 50 % done, about 32 s left: timing.",
        "Searching, 50 % done, about 21 s left: timing.",
    ]


def test_nothing_is_estimated_before_a_part_is_finished_and_a_late_part_is_not_about_to_end() -> None:
    seconds = iter([0.0, 1.0, 12.0, 20.0, 31.0, 70.0])
    told: list[str] = []
    paced = ProgressLog(told.append, lambda: next(seconds), estimating=True)
    for fraction in (0.0, 0.0, 0.5, 0.5, 0.5):
        paced(fraction, "timing")
    assert told == [
        "Searching, 0 % done: timing.",
        "Searching, 50 % done, about 11 s left: timing.",  # 20 s for the first half, 11 s of the second have passed.
        "Searching, 50 % done, about 50 s left: timing.",  # Later than expected, by how much nobody knows.
    ]


def test_a_long_step_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paced, "_ESTIMATED_EVERY_S", 0.05)
    told: list[str] = []
    paced = ProgressLog(told.append, estimating=True)
    with paced.beating():
        paced(0.5, "exporting")
        time.sleep(0.4)
    assert len(told) >= 3
    assert all(line.endswith("left: exporting.") for line in told)
    count = len(told)
    time.sleep(0.2)
    assert len(told) == count  # it ends with the search


def test_an_estimate_comes_after_three_seconds() -> None:
    seconds = iter([0.0, 2.0, 4.0, 8.0, 15.0])
    told: list[str] = []
    paced = ProgressLog(told.append, lambda: next(seconds), estimating=True)
    for fraction in (0.1, 0.2, 0.4, 0.6):
        paced(fraction, "timing")
    assert told == ["Searching, 20 % done, about 16 s left: timing.", "Searching, 60 % done, about 10 s left: timing."]
