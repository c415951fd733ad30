"""A training on two processes (gloo) is that of one with the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fit_processes import EPOCHS, NETS, STEPS, Losses, trained
from safetensors.torch import load_file

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the two processes are forked")
    place = tmp_path_factory.mktemp("both")
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "fit_processes.py"), str(place)]
    both = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert both.returncode == 0, both.stderr
    return place


def said(folder: Path) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`teacher` is right on")
@pytest.mark.parametrize("name", NETS)
def test_two_processes_train_what_one_does(folder, name):
    """Batch norms are those of the whole batch, so that nets with them agree as well as nets with group norms."""
    seen = Losses()
    alone = trained(name, seen)
    first, second = (found[name] for found in said(folder))
    assert len(seen.found) == EPOCHS * STEPS == 50
    # Progress is shown by the first one only.
    assert (second["losses"], second["shown"]) == ([], [])
    assert first["shown"] == seen.epochs == list(range(EPOCHS + 1))
    np.testing.assert_allclose(first["losses"], seen.found, rtol=0, atol=1e-5)
    assert seen.found[-1] < 0.8 * seen.found[0]
    # The 33 validation images are seen once each: one process has 17 of them, the other 16.
    for one, other, mine in zip(first["history"], second["history"], alone.history, strict=True):
        assert one["validation_score"] == other["validation_score"] == mine.validation_score
        assert one["validation_loss"] == pytest.approx(mine.validation_loss, abs=1e-5)
        assert one["train_loss"] == other["train_loss"]
    assert first["best"] == second["best"] == alone.best_epoch
    weights = alone.model.state_dict()
    theirs, others = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert theirs.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(theirs[key], others[key])
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-4, atol=1e-5)


def test_a_request_to_one_process_stops_both_and_they_go_on_bit_for_bit(folder):
    for found in said(folder):
        assert found["stopped"] == ["epoch-000002", "epoch-000002-step-000002"]
    whole, *resumed = (load_file(folder / f"{name}.safetensors") for name in ("normed-0", "resumed-0", "resumed-1"))
    for weights in resumed:
        assert all(torch.equal(weights[key], tensor) for key, tensor in whole.items())


def test_what_several_processes_cannot_do_is_refused_in_all_of_them(folder):
    for other_folder, cache, few in (found["refused"] for found in said(folder)):
        assert "`checkpoint` must be one folder that all processes see" in other_folder
        assert "`teacher_cache` must go with one process; got 2" in cache
        assert "got 3 images for 2 process(es) and `accumulate` 2" in few


def test_two_processes_begin_a_training_that_diverges_again_together(folder):
    first, second = (found["again"] for found in said(folder))
    assert first == second
    assert 1 <= len(first["divergences"]) <= 2
    assert len(first["losses"]) == 3
