"""A search whose process is killed in the middle of an epoch, and started again."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tas_runs import net, quick, run

TESTS = Path(__file__).resolve().parents[1]


def search(folder: Path, graph: str, *kill: int) -> subprocess.CompletedProcess[str]:
    """Run a search of three epochs in a process of its own; it kills itself where it is told to."""
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / "tas_runs.py"), str(folder), graph, *map(str, kill)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.long
@pytest.mark.parametrize(
    ("graph", "epoch", "batch"), [("tied", 1, 1), pytest.param("untied", 2, 0, marks=pytest.mark.slow)]
)
def test_a_killed_search_finds_the_same_to_the_last_bit(graph, epoch, batch, tmp_path):
    """SIGKILL while images of the second or third epoch are read; the checkpoints before it are complete."""
    dead = search(tmp_path, graph, epoch, batch)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert not (tmp_path / "found.json").exists()
    newest = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())[-1]
    assert newest == f"epoch-{epoch:06d}"
    again = search(tmp_path, graph)
    assert again.returncode == 0, again.stderr
    whole = run(net(untied=graph == "untied"), quick(3), seed=4)
    assert json.loads((tmp_path / "found.json").read_text()) == whole.architecture.to_json()
    weights = load_file(tmp_path / "weights.safetensors")
    assert whole.weights is not None
    assert weights.keys() == whole.weights.keys()
    assert all(torch.equal(weights[name], whole.weights[name]) for name in weights)
