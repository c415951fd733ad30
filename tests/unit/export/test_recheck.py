"""Exported files are run where they lie: a wrong, foreign or broken one is told apart from the model."""

from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.errors import ExportError
from secateur.export import compare_file, export_onnx, export_pt2

IMAGES = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
FORMATS = pytest.mark.parametrize(
    ("export", "name"), [(export_onnx, "model.onnx"), (export_pt2, "model.pt2")], ids=["onnx", "pt2"]
)


def _model(classes: int = 3, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes)).eval()


@FORMATS
def test_same_model_agrees_and_others_do_not(tmp_path: Path, export, name: str):
    path = tmp_path / name
    export(_model(), IMAGES, path)
    same = compare_file(path, _model(), IMAGES)
    assert same.max_rel <= same.tolerance == 1e-4
    assert same.batch_sizes == (2,)
    assert same.format == path.suffix[1:]
    other = compare_file(path, _model(seed=1), IMAGES)
    assert other.max_rel > 0.01
    with torch.no_grad():
        difference = (_model(seed=1)(IMAGES) - _model()(IMAGES)).abs().max()
    assert other.max_abs == pytest.approx(float(difference), rel=1e-4)
    with pytest.raises(ExportError, match=r"outputs have shape \(2, 3\), not \(2, 4\)"):
        compare_file(path, _model(classes=4), IMAGES)


@FORMATS
def test_broken_file_says_so(tmp_path: Path, export, name: str):
    path = tmp_path / name
    path.write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"it does not run \(.*\): export it again"):
        compare_file(path, _model(), IMAGES)


def test_file_of_another_kind_is_refused(tmp_path: Path):
    with pytest.raises(ExportError, match=r"`path` must end in \.onnx or \.pt2 or \.xml or \.pte; got .*model\.tflite"):
        compare_file(tmp_path / "model.tflite", _model(), IMAGES)
