"""A convolutional network and a transformer, compressed from the command line in the window of tested versions."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_line import Run
from image_sets import encode
from safetensors.torch import save_file

import secateur

pytestmark = pytest.mark.window

SIZE = 160


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of noise, dark and bright, in folders by class."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for part, n in (("train", 16), ("test", 8)):
        for name, brightest in (("bright", 256), ("dark", 128)):
            (folder / part / name).mkdir(parents=True)
            for number in range(n):
                pixels = draw.integers(0, brightest, (SIZE, SIZE, 3), dtype=np.uint8)
                (folder / part / name / f"{number}.png").write_bytes(encode(pixels))
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", pytest.param("vit_tiny_patch16_224", marks=pytest.mark.slow)]
)
def test_timm_networks_are_compressed_and_every_check_passes(name: str, images: Path, run: Run, tmp_path: Path):
    out, weights = tmp_path / "out", tmp_path / "weights.safetensors"
    size = 224 if name.endswith("224") else SIZE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model(name, num_classes=2).state_dict(), weights)
    found = run(
        *("compress", "--model", f"timm:{name}", "--weights", weights, "--data", images, "--image-size", size),
        *("--budget", "macs=60%", "--epochs", 1, "--batch-size", 8, "--threads", 1, "--calibration", 16),
        # Comparing strategies and divisors takes minutes; the slow test does.
        *("--export", "onnx,pt2", "--out", out, *(() if size == 224 else ("--strategy", "knapsack", "--divisor", 1))),
    )
    assert found.exit_code == 0, found.output
    assert "FAILED" not in found.stdout
    manifest = json.loads((out / "secateur.json").read_text())
    cost = manifest["cost"]
    assert 0.5 * cost["before"]["macs"] < cost["after"]["macs"] <= 0.6 * cost["before"]["macs"]
    assert manifest["provenance"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    again = secateur.verify(out)
    assert [check.name for check in again.checks if not check.passed] == []
    assert any("model.onnx" in check.name for check in again.checks)
