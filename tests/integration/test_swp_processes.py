"""The training of a supernet on two processes (gloo) is that of one with the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from swp_processes import STEPS, curve, found

from secateur.train import Precision, open_fabric

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the two processes are forked")
def test_two_processes_train_what_one_does(tmp_path):
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "swp_processes.py"), str(tmp_path)]
    both = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert both.returncode == 0, both.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    one, weights = curve(open_fabric(Precision.FLOAT32))
    assert len(one) == STEPS
    # Every process tells the losses of the whole batch: full net and two stages, and their sum.
    assert first["losses"] == second["losses"]
    np.testing.assert_allclose(first["losses"], one, rtol=1e-5, atol=1e-5)
    assert not np.allclose(one[0], one[-1], rtol=0.05)
    # Gradients travel once in a step, after the backward passes of all four networks. So do means and variances of the
    # features of both stages, before them, and the losses.
    parameters = sum(tensor.numel() for tensor in weights.values())
    assert first["sent"] == second["sent"] == [4, parameters, 3] * STEPS
    theirs, others = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert theirs.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(theirs[name], others[name])
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-4, atol=1e-5)
    # And the whole search: the same architecture from the same numbers, with the checkpoints of one.
    alone = found(open_fabric(Precision.FLOAT32)).to_json()
    for result in (first["found"], second["found"]):
        assert result["architecture"] == alone["architecture"]
        assert result["notes"]["fairness"] == alone["notes"]["fairness"]
        for epoch, wanted in zip(result["notes"]["training"], alone["notes"]["training"], strict=True):
            np.testing.assert_allclose(
                [epoch["full"], *epoch["stages"]], [wanted["full"], *wanted["stages"]], rtol=1e-4
            )
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch-000004", "epoch-000005"]
