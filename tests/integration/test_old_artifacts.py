"""Artifacts of version 0.1 load, compute what they computed then, and are written again as they were."""

import json
from pathlib import Path

import pytest
import torch
from command_line import Run
from safetensors.torch import load_file

import secateur

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAMES = ("artifact_0_1", "artifact_0_1_sparse", "artifact_0_1_blocks", "artifact_0_1_untied")


def manifest(folder: Path) -> dict:
    return json.loads((folder / "secateur.json").read_text())


def test_each_kind_of_artifact_is_here():
    assert sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()) == sorted(NAMES)
    plain, sparse, blocks, untied = (manifest(GOLDEN / name) for name in NAMES)
    assert {data["schema"] for data in (plain, sparse, blocks, untied)} == {4}
    assert plain["architecture"]["kept"]
    assert plain["edits"]
    assert any(tensor.get("sparse") for tensor in sparse["weights"]["tensors"])
    assert sparse["weights"]["nonzero"] < sparse["cost"]["after"]["params"]
    assert blocks["architecture"]["removed_blocks"]
    assert blocks["replacements"]
    assert untied["widenings"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_of_then(name: str):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    loaded = secateur.load(GOLDEN / name)
    assert not loaded.model.training
    with torch.no_grad():
        logits = loaded.model(expected["input"])
    # Another processor adds float32 numbers in another order; logits are of size 1 to 10.
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_verify_passes(name: str, run: Run):
    found = run("verify", GOLDEN / name)
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize("name", NAMES)
def test_written_again_it_is_the_same(name: str, tmp_path: Path):
    """Every field of secateur.json keeps its name, place and value, and the file of the weights its bytes."""
    loaded = secateur.load(GOLDEN / name)
    secateur.export.save_artifact(tmp_path / name, loaded.model, loaded.manifest.recipe)
    before, after = manifest(GOLDEN / name), manifest(tmp_path / name)
    for data in (before, after):
        # While it is pruned, a layer lists its masked weight after its bias; a loaded one has no masks. So the order
        # of the tensors, and with it the digest of the whole manifest, may differ.
        data["weights"]["tensors"].sort(key=lambda tensor: tensor["name"])
        digest = data.pop("sha256")
        assert len(digest) == 64
    assert after == before
    weights = "model.safetensors"
    assert (tmp_path / name / weights).read_bytes() == (GOLDEN / name / weights).read_bytes()
