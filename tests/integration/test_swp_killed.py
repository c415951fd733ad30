"""The command with --strategy swp, killed in the middle of its search, and started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import compress_words, secateur
from safetensors.torch import load_file

FINISH = 240.0
"""Seconds in which a checkpoint must have come, on any machine."""


def words(weights: Path, out: Path) -> list[str]:
    usual = compress_words(weights, out)
    more = ("--epochs", 0, "--export", "", "--limit", 600, "--strategy", "swp", "--search-epochs", 2)
    return [str(word) for word in (*usual, *more, "--search-candidates", 16)]


def killed(command: list[str], mark: Path) -> None:
    """Start it; kill -9 as soon as a checkpoint is there."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from secateur.cli import main; main()", *command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    began = time.monotonic()
    try:
        while not mark.exists():
            assert process.poll() is None, process.communicate()[0].decode()
            assert time.monotonic() - began < FINISH
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9 is POSIX")
def test_a_killed_command_finds_the_same_to_the_last_bit(digits_weights, tmp_path):
    """SIGKILL while the second epoch of the supernet is trained, or later: no handler runs, nothing is flushed."""
    out, search = tmp_path / "out", tmp_path / "out.work" / "search-0"
    killed(words(digits_weights, out), search / "epoch-000001")
    assert not out.exists()
    done = len(list(search.glob("epoch-*")))
    assert done
    again = secateur(*words(digits_weights, out), "--resume")
    assert again.exit_code == 0, again.output
    assert not (tmp_path / "out.work").exists()
    whole = secateur(*words(digits_weights, tmp_path / "whole"))
    assert whole.exit_code == 0, whole.output
    assert "epoch 1/2" in whole.output
    assert "epoch 1/2" not in again.output
    one, other = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
