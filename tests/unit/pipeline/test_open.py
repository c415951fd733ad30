"""Models by name or folder, and the size of image they were made for."""

from pathlib import Path

import pytest
import torch

from secateur.errors import ArtifactError, ModelError
from secateur.pipeline import default_size, load_any


@pytest.mark.parametrize(
    ("spec", "size"),
    [
        ("digits_resnet", (1, 8, 8)),
        ("cifar_resnet20", (3, 32, 32)),
        ("torchvision:resnet18", (3, 224, 224)),
        ("timm:test_resnet", (3, 160, 160)),
    ],
)
def test_usual_size_is_one_the_model_runs(spec: str, size: tuple[int, int, int]):
    opened = load_any(spec)
    assert default_size(opened) == size
    with torch.no_grad():
        assert opened.model(torch.zeros(1, *size)).ndim == 2
    assert opened.manifest is None


def test_classes_and_channels_are_asked_for_except_of_the_users_own_factory():
    opened = load_any("timm:test_resnet", num_classes=7, in_channels=1)
    assert default_size(opened) == (1, 160, 160)
    assert opened.model(torch.zeros(1, 1, 160, 160)).shape == (1, 7)
    own = load_any("python:torch.nn:Identity", num_classes=7, in_channels=1, trust_source=True)
    assert own.source.arguments == {}


def test_weights_beside_an_artifact_are_refused(tmp_path: Path):
    (tmp_path / "secateur.json").write_text("{}")
    with pytest.raises(ModelError, match="`weights` must not be given with an artifact"):
        load_any(str(tmp_path), weights=tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match="secateur-artifact"):
        load_any(str(tmp_path))
