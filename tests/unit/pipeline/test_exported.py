"""Exported files are run where they lie: a wrong, foreign or broken one is a failed check, not a crash."""

from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.pipeline import Format, export_files
from secateur.pipeline._exported import check_exported

IMAGES = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def _model(classes: int = 3, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes)).eval()


@pytest.mark.parametrize("form", Format)
def test_same_model_passes_and_others_fail(tmp_path: Path, form: Format):
    written = export_files(_model(), IMAGES, tmp_path, [form])
    assert list(written) == [tmp_path / form.file]
    path = tmp_path / form.file
    good = check_exported(path, form, _model(), IMAGES)
    assert good.passed
    assert good.max_rel is not None
    assert good.max_rel <= good.tolerance
    assert not check_exported(path, form, _model(seed=1), IMAGES).passed
    other = check_exported(path, form, _model(classes=4), IMAGES)
    assert not other.passed
    assert "outputs have shape (2, 3), not (2, 4)" in other.detail


@pytest.mark.parametrize("form", Format)
def test_broken_file_fails(tmp_path: Path, form: Format):
    path = tmp_path / form.file
    path.write_bytes(b"not a model")
    found = check_exported(path, form, _model(), IMAGES)
    assert not found.passed
    assert "does not run" in found.detail
