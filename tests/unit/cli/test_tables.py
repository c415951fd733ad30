"""What the tables of the commands say."""

from dataclasses import replace

import pytest
import torch
from noise_images import noise_data
from run_pipeline import run_compress
from torch import Tensor, nn

from secateur.cli.tables import print_before_after, print_exports, print_report, print_speed
from secateur.models import cifar_resnet20
from secateur.pipeline import inspect_model
from secateur.report.run import ExportedFile, Measured, RunReport
from secateur.tasks.base import Score
from secateur.tasks.classification import TOP1
from secateur.train import TrainConfig


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x).relu()
        return (self.left(x) if x.size(2) < 20 else self.right(x)).mean((2, 3))


def test_layers_that_never_ran_are_named(capsys):
    found = inspect_model(Branching().eval(), torch.zeros(1, 3, 8, 8))
    assert found.to_json()["never_ran"] == ["right.weight", "right.bias"]
    print_report(found, "branching")
    said = " ".join(capsys.readouterr().out.split())
    assert "Never ran on this input, in evaluation or in training: right." in said
    print_report(inspect_model(Branching().eval(), torch.zeros(1, 3, 32, 32)), "branching")
    assert "in training: left." in " ".join(capsys.readouterr().out.split())


def test_stages_are_shown_with_where_they_end(capsys):
    found = inspect_model(cifar_resnet20(), torch.zeros(1, 3, 32, 32))
    stages = found.to_json()["stages"]
    assert [(stage["name"], stage["cut"], len(stage["axes"]), len(stage["blocks"])) for stage in stages] == [
        ("stage1", "layer1", 3, 3),
        ("stage2", "layer2", 3, 2),
        ("stage3", "", 5, 2),
    ]
    assert sum(stage["macs"] for stage in stages) == found.original.macs
    print_report(found, "resnet20")
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["stage1", "layer1", "3", "3", "36.0", "%"] in said
    assert ["stage3", "the", "output", "5", "2", "32.0", "%"] in said


def test_a_model_that_is_one_stage_has_no_table_of_them(capsys):
    print_report(inspect_model(Branching().eval(), torch.zeros(1, 3, 8, 8)), "branching")
    assert "Stages" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("speed", "words"), [(2.0, "2.00 x the speed"), (1.0, "1.00 x the speed"), (0.71, "41 % slower")]
)
def test_slower_is_called_slower(capsys: pytest.CaptureFixture[str], speed: float, words: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    report = run_compress(model, noise_data(), budget="macs=50%", train=TrainConfig(epochs=0)).report
    (first,) = report.latency
    changed = replace(report, latency=(replace(first, speedup=(speed, speed, speed)),))
    print_before_after(changed)
    assert words in " ".join(capsys.readouterr().out.split())
    print_speed(changed)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("With ")
    assert said.endswith(f"in pretend 1: {words}.")
    print_speed(replace(report, latency=()))
    assert capsys.readouterr().out == ""


def test_exported_files_have_no_empty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    plain, small = (
        ExportedFile("model.onnx", 2000, 3e-7),
        ExportedFile("model.int8.onnx", 900, accuracy=Score(0.5, 0.5, 10, TOP1)),
    )
    report = RunReport("net", Measured(2, 2), Measured(1, 1), exports=(plain,))
    print_exports(report)
    heads, values = (" ".join(capsys.readouterr().out.split()).split(" ─")[0], "3.0e-07")
    assert heads == "Files for other runtimes file size difference"
    print_exports(replace(report, exports=(plain, small)))
    said = " ".join(capsys.readouterr().out.split())
    assert "file size difference accuracy" in said
    assert "same answer" not in said
    assert f"model.onnx 2 kB {values} model.int8.onnx 900B 50.00 %" in said
