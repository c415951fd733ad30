"""The training loops in examples/ recover a cut model; those whose package is missing are skipped."""

import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import secateur
from secateur.pipeline import CutConfig, RunConfig
from secateur.tasks import Imitation
from secateur.train import Silent

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NEEDED = {
    "recover_plain": ("torch",),
    "recover_timm": ("timm",),
    "recover_lightning": ("lightning", "pytorch_lightning"),
    "recover_transformers": ("transformers",),
}
SETTINGS: dict[str, Any] = {
    "strategy": secateur.Knapsack(),
    "cut": CutConfig(calibration_images=32, space=secateur.SearchSpace(divisor=8)),
    "run": RunConfig(callbacks=Silent(), device=torch.device("cpu")),
    "export": (),
}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is timed, and what trainers set in the environment goes with the test."""
    before = dict(os.environ)
    monkeypatch.setattr("secateur.pipeline.finalize.latency_on", lambda *_: ((), ()))
    yield
    os.environ.clear()
    os.environ.update(before)


def example(name: str, *packages: str) -> ModuleType:
    """Load an example, or skip the test where its package is missing."""
    if not any(importlib.util.find_spec(package) for package in packages):
        pytest.skip(f"{' or '.join(packages)} is not installed")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_of_a_loop_is_run() -> None:
    names = {path.stem for path in EXAMPLES.glob("recover_*.py")}
    assert names == {*NEEDED, "recover_ultralytics"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NEEDED)
def test_the_loop_recovers_a_student(name: str, tmp_path: Path) -> None:
    recover = example(name, *NEEDED[name]).recover
    model, source = secateur.load_model("digits_resnet")
    data = secateur.load_data("digits", limit=256)
    found = secateur.compress(
        model, data, "macs=60%", recovery=recover, source=source, out=tmp_path / "small", **SETTINGS
    )
    assert [step.name for step in found.report.steps] == ["original", "cut and repaired", "recovered"]
    assert all(check.passed for check in found.report.checks)
    loaded = secateur.load(tmp_path / "small").model
    images, _ = next(data.test.batches(8))
    assert torch.equal(loaded(images), found.model(images))
    steps = json.loads((tmp_path / "small" / "secateur.json").read_text())["metrics"]["test_accuracy"]
    assert steps[1]["top1"] != steps[2]["top1"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cut_yolo_is_trained_by_its_own_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = example("recover_ultralytics", "ultralytics")
    from ultralytics.nn.tasks import DetectionModel  # pyright: ignore[reportMissingImports]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "SIZE", 64)
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / part).mkdir(parents=True)
        for number in range(16):
            pixels = draw.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / part / f"{number}.png")
            (tmp_path / "labels" / part / f"{number}.txt").write_text("0 0.5 0.5 0.3 0.3\n")
    dataset = tmp_path / "data.yaml"
    dataset.write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/val\nnames:\n  0: thing\n")
    model = DetectionModel("yolov8n.yaml", nc=1, verbose=False).float().eval()
    found = secateur.compress(
        model,
        module.images(tmp_path / "images" / "train"),
        "macs=60%",
        task=Imitation(),
        recovery=module.recover_on(str(dataset)),
        **SETTINGS,
    )
    assert [step.name for step in found.report.steps] == ["original", "cut and repaired", "recovered"]
