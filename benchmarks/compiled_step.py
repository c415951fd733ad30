"""Measure the gain of `torch.compile`: a training step in eager mode and compiled, alternately, in one process.

    taskset -c 1 python benchmarks/compiled_step.py

The step is the student's part of a step of `secateur.train.fit`, without reading, augmentation and teacher:
cross-entropy with labels and SGD on random 32x32 images, one thread, channels-last, the best precision of the
processor. Times are processor times: for the steps that of the calling thread, which does all of the work, and for
compiling also that of the C++ compilers, with an empty cache. The tables contain medians of the rounds, and the
median of the ratios within a round. Writes results/compiled_step.json and .md.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from _record import surroundings, table, write_record
from torch import Tensor, nn
from torch.nn import functional

from secateur.models import load_model
from secateur.train import SGD, Compiled, Eager, Execution, autocast, best_precision, channels_last, copy_to_device

CPU = torch.device("cpu")
Step = Callable[[], object]


def step_of(execution: Execution, model: nn.Module, images: Tensor, labels: Tensor) -> Step:
    """Return a function that makes one optimizer step on a copy of a model."""
    student = copy_to_device(model, CPU).train()
    forward = execution.prepared(student)
    optimizer = SGD().build(student, 0.01)

    def step() -> None:
        optimizer.zero_grad()
        with execution.running():
            with autocast(best_precision(CPU), CPU):
                logits = forward(images)
            functional.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def spent() -> float:
    """Return the processor seconds of this process and its finished child processes."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(name: str, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Measure one network."""
    model, _ = load_model(name)
    generator = torch.Generator().manual_seed(0)
    images = channels_last(torch.randn(batch, 3, 32, 32, generator=generator))
    labels = torch.randint(0, 10, (batch,), generator=generator)
    arms = {
        "eager": step_of(Eager(), copy.deepcopy(model), images, labels),
        "compiled": step_of(Compiled(), copy.deepcopy(model), images, labels),
    }
    compiling: dict[str, float] = {}
    for arm, step in arms.items():
        before = spent()
        step()
        compiling[arm] = spent() - before
        step()
    rates: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(rounds):
        for arm in list(arms) if turn % 2 else reversed(arms):
            began = time.thread_time()
            for _ in range(steps):
                arms[arm]()
            rates[arm].append(batch * steps / (time.thread_time() - began))
    ratios = [fast / slow for slow, fast in zip(rates["eager"], rates["compiled"], strict=True)]
    gain, per_image = statistics.median(ratios), {arm: 1 / statistics.median(each) for arm, each in rates.items()}
    # The number of images after which compiling has paid.
    worth = compiling["compiled"] / (per_image["eager"] - per_image["compiled"]) if gain > 1 else None
    return {
        "model": name,
        "batch": batch,
        "steps": steps,
        "images_per_s": rates,
        "ratios": ratios,
        "ratio": gain,
        "compiling_s": compiling["compiled"],
        "images_to_win_back": worth,
    }


def main() -> None:
    """Measure all networks and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cifar_resnet20", "cifar_resnet56", "cifar_mobilenetv2"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4, help="steps of each variant per round")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        # The first use of torch.compile in a process imports it, which is not part of compiling a network.
        with Compiled().running():
            torch.compile(lambda values: values * 2 + 1)(torch.ones(8))
        found: list[dict[str, Any]] = []
        for name in arguments.models:
            found.append(measure(name, arguments.batch, arguments.steps, arguments.rounds))
            write(found, arguments.batch)  # Compiling takes minutes: what is measured is kept.


def write(found: list[dict[str, Any]], batch: int) -> None:
    """Write the record and the table."""
    precision = best_precision(CPU).name
    path = write_record("compiled_step", {"surroundings": surroundings(), "precision": precision, "found": found})
    rows = [
        [
            one["model"],
            *(f"{statistics.median(one['images_per_s'][arm]):,.0f}" for arm in ("eager", "compiled")),
            f"{one['ratio']:.2f}",
            f"{min(one['ratios']):.2f} to {max(one['ratios']):.2f}",
            f"{one['compiling_s']:.0f}",
            "never" if one["images_to_win_back"] is None else f"{one['images_to_win_back']:,.0f}",
        ]
        for one in found
    ]
    header = ["network", "eager images/s", "compiled", "ratio", "smallest to largest", "s of compiling", "pays after"]
    text = (
        f"# Compiled training steps, batch {batch}, {precision}, one thread\n\n"
        f"{table(header, rows)}\nPays after: images seen in training until the compiling is won back.\n"
    )
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
