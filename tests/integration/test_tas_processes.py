"""A search by TAS on two processes (gloo) is that of one with the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tas_processes import NETS, STEPS, curve, found

from secateur.train import Precision, open_fabric

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("both")
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "tas_processes.py"), str(place)]
    both = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert both.returncode == 0, both.stderr
    return place


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the two processes are forked")
@pytest.mark.parametrize("name", NETS)
def test_two_processes_search_as_one_does(folder, name):
    """Batch norms are those of the whole batch, so that a net with them agrees as well as one without."""
    first, second = (json.loads((folder / f"{rank}.json").read_text())[name] for rank in (0, 1))
    one, tensors = curve(name, open_fabric(Precision.FLOAT32))
    assert len(one) == STEPS
    # Every process reports the losses of the whole batch: of the weights, of alpha, and the cost.
    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], one, rtol=1e-5, atol=1e-5)
    assert not np.allclose(one[0], one[-1], rtol=0.02)
    theirs, others = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert theirs.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(theirs[key], others[key])
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-4, atol=1e-5)
    if name == "unnormed":
        # Gradients travel once after each of the two updates of a step, and the losses after both.
        alpha = sum(tensors[key].numel() for key in ("widths", "depths"))
        weights = sum(tensor.numel() for tensor in tensors.values()) - alpha
        assert first["sent"] == second["sent"] == [weights, alpha, 3] * STEPS
    # And the whole search: the same architecture from the same numbers, with the checkpoints of one.
    alone = found(name, open_fabric(Precision.FLOAT32)).to_json()
    for result in (first["found"], second["found"]):
        assert result["architecture"] == alone["architecture"]
        for epoch, wanted in zip(result["notes"]["search"], alone["notes"]["search"], strict=True):
            losses, expected = (
                [noted["weight_loss"], noted["architecture_loss"], noted["expected"]["macs"]]
                for noted in (epoch, wanted)
            )
            np.testing.assert_allclose(losses, expected, rtol=1e-4)
            assert epoch["validation"] == wanted["validation"]
    names = sorted(path.name for path in (folder / f"{name}-checkpoints").iterdir())
    assert names == ["epoch-000001", "epoch-000002"]
