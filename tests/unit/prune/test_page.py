"""The Python blocks of docs/sparsity.md run, one after the other."""

import re
from pathlib import Path

import torch
from small_runs import Blobs, small_config

from secateur.models import cifar_resnet20
from secateur.prune import prunable_weights

PAGE = Path(__file__).resolve().parents[3] / "docs" / "sparsity.md"


def test_the_page_runs() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names = {"model": cifar_resnet20(), "images": Blobs(32), "train": small_config(4)}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    weights = prunable_weights(names["sparse"], exclude=("conv1", "linear"))
    total = sum(weight.numel() for weight in weights.values())
    # From round(0.2 n) at first to round(0.1 n) at the end of the cubic schedule.
    assert sum(int((weight != 0).sum()) for weight in weights.values()) == round(0.1 * total)
    ordinary = prunable_weights(names["ordinary"], exclude=("conv1", "linear"))
    assert sum(int((weight != 0).sum()) for weight in ordinary.values()) == round(0.1 * total)
    assert bool((names["ordinary"].conv1.weight != 0).all())
