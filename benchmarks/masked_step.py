"""Measure what masks cost: CPU seconds of a training step with and without them, alternately, in one process.

    python benchmarks/masked_step.py

The step is SGD with momentum on random 32x32 images, one thread, channels-last. A fifth of every prunable weight is
kept. Times are process times; the ratio is that of the lower quartiles, because other work on the machine only adds
time. Writes results/masked_step.json.
"""

import argparse
import statistics
import time
from typing import Any

import timm
import torch
from _record import surroundings, table, write_record
from torch import nn
from torch.nn import functional as F

from secateur.models import cifar_resnet20
from secateur.prune import apply_masks, keep_largest, magnitude_scores, prunable_weights, uniform_counts

CASES = (("cifar_resnet20", 32), ("cifar_resnet20", 128), ("mobilenetv3_small_100", 32), ("mobilenetv3_small_100", 128))


def measure(name: str, batch: int, rounds: int) -> dict[str, Any]:
    """Measure one network at one batch size."""
    dense = model_of(name).to(memory_format=torch.channels_last).train()
    weights = prunable_weights(dense)
    sparse = apply_masks(dense, keep_largest(magnitude_scores(weights), uniform_counts(weights, 0.2)))
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,))
    pairs = [(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)) for model in (dense, sparse)]
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            model, optimizer = pairs[which]
            began = time.process_time()
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            seconds[which].append(time.process_time() - began)
    lower = [statistics.quantiles(one[1:], n=4)[0] for one in seconds]
    return {
        "model": name,
        "batch": batch,
        "weights": sum(weight.numel() for weight in weights.values()),
        "dense_s": lower[0],
        "masked_s": lower[1],
        "ratio": lower[1] / lower[0],
    }


def model_of(name: str) -> nn.Module:
    """Return a network with random weights and ten classes."""
    return cifar_resnet20() if name == "cifar_resnet20" else timm.create_model(name, num_classes=10)


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [measure(name, batch, rounds) for name, batch in CASES]
    cells = [
        [r["model"], str(r["batch"]), f"{1e3 * r['dense_s']:.0f}", f"{1e3 * r['masked_s']:.0f}", f"{r['ratio']:.3f}"]
        for r in rows
    ]
    print(table(["model", "batch", "dense, ms", "masked, ms", "ratio"], cells))
    print(write_record("masked_step", {"surroundings": surroundings(), "rounds": rounds, "rows": rows}))


if __name__ == "__main__":
    main()
