"""The commands that train, as two processes that torchrun starts: what one process gives, written once."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import secateur

pytestmark = pytest.mark.slow

RUN = (
    "--data digits --limit 320 --batch-size 32 --lr 0.002 --epochs 2 --precision 32 --threads 1 --seed 3 "
    "--checkpoint-steps 4 --export onnx"
)
# Aligned features are measured in units of their spread in the batch, of which a process sees a part.
COMPRESS = (
    "compress --model digits_resnet --budget macs=50%,nonzero=40% --calibration 64 --feature-weight 0 "
    f"--strategy knapsack --divisor 1 {RUN}"
)
DISTILL = f"distill --teacher digits_resnet --student digits_resnet --loss kd --loss hint {RUN}"


def started(processes: int, words: str, out: Path, *more: str) -> "subprocess.CompletedProcess[str]":
    """A command in so many processes."""
    program = ["-m", "secateur"]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", port]
        program = ["-m", "torch.distributed.run", *group, *program]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *program, *words.split(), "--out", str(out), *more]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


def losses(out: Path) -> list[float]:
    with (out / "history.csv").open(newline="") as file:
        return [float(row["mean_loss"]) for row in csv.DictReader(file) if row["mean_loss"]]


@pytest.mark.parametrize("words", [COMPRESS, DISTILL], ids=["compress", "distill"])
def test_two_processes_give_what_one_gives(words: str, tmp_path: Path) -> None:
    for processes in (1, 2):
        done = started(processes, words, tmp_path / str(processes))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("history.csv") == 1, "only the first process speaks"
    one, two = (json.loads((tmp_path / name / "secateur.json").read_text()) for name in "12")
    assert one["architecture"] == two["architecture"]
    assert len(losses(tmp_path / "2")) == 2
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "2"), rel=1e-4)
    weights = [secateur.load(tmp_path / name).model.state_dict() for name in "12"]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-2, atol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    # Bad input ends all of them, and nothing hangs.
    bad = started(2, words, tmp_path / "3", "--device", "cuda:7")
    assert bad.returncode != 0
    assert "`--device` must be a device that this machine has" in bad.stderr.replace("\n", " ")
    assert not (tmp_path / "3").exists()
