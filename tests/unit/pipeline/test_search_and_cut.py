"""What a run says about its repairs."""

from pathlib import Path

import pytest
from noise_images import noise_data
from run_pipeline import run_compress
from torch import nn

from secateur.pipeline.search_and_cut import describe_repair
from secateur.prune import RepairResult
from secateur.search import Uniform
from secateur.train import Silent, TrainConfig


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (
            RepairResult("Refit()", 0.98, 0.45, True),
            "Refit(): distance from the uncut outputs on held-out images 0.980 -> 0.450.",
        ),
        (
            RepairResult("Refit()", 0.45, 0.59, False),
            "Refit(): distance from the uncut outputs on held-out images 0.450 -> 0.590; undone, because it made "
            "things worse.",
        ),
        (
            RepairResult("Refit()", 0.98, 0.45, True, held_out=False, skipped=(("a", "all is zero"), ("b", "x"))),
            "Refit(): distance from the uncut outputs on the images it was fitted to (too few to hold any out) 0.980 "
            "-> 0.450; a and 1 more left as cut, because all is zero.",
        ),
    ],
)
def test_a_repair_is_described_with_the_images_that_judged_it(result, said):
    assert describe_repair(result) == said


def test_the_lines_of_a_run_are_sentences_without_settings(tmp_path: Path) -> None:
    told: list[str] = []
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    run_compress(
        model,
        noise_data(),
        budget="macs=60%",
        strategy=Uniform(),
        train=TrainConfig(epochs=0),
        calibration_images=32,
        callbacks=Silent(),
        hear=told.append,
        out=tmp_path / "out",
    )
    assert [line for line in told if line.startswith("Refit: distance from the uncut outputs")]
    assert sum(line.startswith("Cutting the network") for line in told) == 1  # Before a wait of minutes.
    checked = [line for line in told if line.startswith("Checked: ")]
    assert checked
    assert all(line.endswith((").", ".")) and ". in " not in line for line in checked)
    assert not [line for line in told if "Refit(" in line]
