"""The Python blocks of docs/distillation.md run, one after the other, and its table names what there is."""

import re
from pathlib import Path

import torch
from small_runs import Blobs, small_config

import secateur.distill
from secateur.models import cifar_resnet20
from secateur.train import Trained

PAGE = Path(__file__).resolve().parents[3] / "docs" / "distillation.md"


class Data:
    train, validation, augment = Blobs(32), Blobs(16, seed=1), None


def test_the_page_runs() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        names = {
            "student": cifar_resnet20(),
            "teacher": cifar_resnet20(),
            "other_teacher": cifar_resnet20(),
            "assistant": cifar_resnet20(),
            "example": torch.zeros(1, 3, 8, 8),
            "data": Data(),
            "train": small_config(1),
        }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert isinstance(names["trained"], Trained)
    assert names["mine"].name == "mine"
    assert len(names["assisted"]) == len(names["generations"]) == 2


def test_the_table_names_all_losses() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    losses = {name for name in secateur.distill.__all__ if name.endswith("_loss")} - {
        "label_loss", "hcl_loss", "vid_loss", "contrastive_loss",
    }  # fmt: skip
    assert losses <= named
    assert named <= set(secateur.distill.__all__)
