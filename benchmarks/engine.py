"""Compare training and data loading with a bare torch loop and with torchvision's and timm's loaders.

    python benchmarks/engine.py

There are four parts. Each has several rounds in which the variants take turns; the tables contain medians of the
rounds, and medians of the ratios within a round:

    loop     one epoch of `secateur.train.fit` without augmentation, against the same epoch written by hand; seconds of
             the steps alone, and of the whole call
    memory   the same two, each in its own process: peak resident memory, and its growth since before the training
    cifar    crop and flip of CIFAR-10 in memory: `MemorySplit.batches` against torchvision's CIFAR10 with a DataLoader
             of two workers; and a training epoch of ResNet-20 with each
    folder   JPEGs of 500 x 375 pixels and about 100 kB (generated) to 224 x 224: `FolderSplit.batches` against
             torchvision's ImageFolder and timm's loader, two workers each; with random resized crop and flip, and with
             each library's RandAugment at magnitude 9 in addition

Writes results/engine.json and .md. On an idle machine with two cores it takes about ten minutes.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _loaders import timm_folder, torchvision_cifar10, torchvision_folder
from _photographs import write_photographs
from _record import CIFAR10, surroundings, table, write_record
from torch import Tensor, nn
from torch.nn import functional

from secateur.data import Augment, FolderSplit, MemorySplit, Normalization, load_data
from secateur.distill import Objective
from secateur.models import load_model
from secateur.train import Precision, RunSettings, Silent, TrainConfig, fit

BATCH = 128
FOLDER_BATCH = 64
SIDE = 224
POLICY = "rand-m9-mstd0.5-inc1"
MODEL = "cifar_resnet20"
Arms = Mapping[str, Callable[[int], float]]
"""By name: runs one round, whose number it is given, and says how long it took, in seconds."""


def bare(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], steps: int) -> None:
    """Train one epoch with the usual hand-written loop, in channels-last order."""
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for images, labels in batches:
        loss = functional.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def bare_batches(source: MemorySplit, epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield batches of bytes in memory, shuffled and normalized by hand."""
    mean = torch.tensor(source.normalization.mean).view(3, 1, 1) * 255
    std = torch.tensor(source.normalization.std).view(3, 1, 1) * 255
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(epoch))
    for index in order.split(BATCH):
        if len(index) == BATCH:
            yield (source.images[index].float() - mean) / std, source.labels[index]


def engine(model: nn.Module, source: MemorySplit, epoch: int, augment: Augment | None) -> float:
    """Train one epoch with Secateur; return the seconds of its steps."""
    train = TrainConfig(1, BATCH, learning_rate=0.05, precision=Precision.FLOAT32, seed=epoch)
    labels, run = Objective.of_labels(), RunSettings(callbacks=Silent())
    trained = fit(model, source, train=train, objective=labels, augment=augment, run=run)
    return trained.history[-1].seconds


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def drained(batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Read every batch; return the number of images."""
    return sum(len(labels) for images, labels in batches if images[0, 0, 0, 0].isfinite())


def in_turns(arms: Arms, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of every round after an uncounted one; the first variant changes every round."""
    for run in arms.values():
        run(0)
    found: dict[str, list[float]] = {name: [] for name in arms}
    for k in range(1, rounds + 1):
        for name in list(arms) if k % 2 else reversed(arms):
            found[name].append(arms[name](k))
    return found


def loop(source: MemorySplit, rounds: int) -> dict[str, list[float]]:
    """Compare Secateur with the bare loop, without augmentation."""
    model, steps = network(), len(source) // BATCH
    whole: list[float] = []

    def ours(k: int) -> float:
        began = time.perf_counter()
        seconds = engine(model, source, k, None)
        whole.append(time.perf_counter() - began)
        return seconds

    arms: Arms = {
        "ours": ours,
        "bare": lambda k: timed(lambda: bare(copy.deepcopy(model), bare_batches(source, k), steps)),
    }
    return in_turns(arms, rounds) | {"ours, with set-up": whole[1:]}


def cifar(source: MemorySplit, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Compare with torchvision, reading only and training."""
    model, steps, augment = network(), len(source) // BATCH, Augment()
    loader = torchvision_cifar10(source, BATCH)
    read: Arms = {
        "ours": lambda k: timed(lambda: drained(source.batches(BATCH, seed=k, augment=augment, drop_last=True))),
        "torchvision": lambda _: timed(lambda: drained(loader)),
    }
    trained: Arms = {
        "ours": lambda k: engine(model, source, k, augment),
        "torchvision": lambda _: timed(lambda: bare(copy.deepcopy(model), loader, steps)),
    }
    return {"read": in_turns(read, rounds), "trained": in_turns(trained, rounds)}


def folder(place: Path, images: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Compare with torchvision and timm, with and without RandAugment."""
    usual = Normalization.default(3)
    paths = tuple(sorted(place.rglob("*.jpg")))
    split = FolderSplit(paths, torch.tensor([int(path.parent.name) for path in paths]), (3, SIDE, SIDE), usual)
    found: dict[str, dict[str, list[float]]] = {}
    for name, policy in (("crop and flip", None), ("and RandAugment", POLICY)):
        augment = Augment(padding=0, flip=True, min_area=0.08, auto_augment=policy)
        loaders = [make(place, usual, SIDE, FOLDER_BATCH, policy) for make in (torchvision_folder, timm_folder)]
        arms: Arms = {
            "ours": lambda k, augment=augment: timed(
                lambda: drained(split.batches(FOLDER_BATCH, seed=k, augment=augment, drop_last=True))
            ),
            "torchvision": lambda _, loader=loaders[0]: timed(lambda: drained(loader)),
            "timm": lambda _, loader=loaders[1]: timed(lambda: drained(loader)),
        }
        found[name] = in_turns(arms, rounds)
        del loaders, arms  # Their workers end.
    assert images // FOLDER_BATCH * FOLDER_BATCH == drained(split.batches(FOLDER_BATCH, drop_last=True))
    return found


def network() -> nn.Module:
    """Return a ResNet-20 with random weights."""
    model, _ = load_model(MODEL)
    return model


def memory_of(arm: str, images: int, threads: int) -> dict[str, float]:
    """Return the peak MiB, and the increase since before the training, of a separate process."""
    words = [sys.executable, __file__, "--arm", arm, "--images", str(images), "--threads", str(threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one_arm(arm: str, source: MemorySplit) -> dict[str, float]:
    """Train one variant; this runs in the process that `memory_of` measures."""
    before = _resident("VmRSS")
    if arm == "ours":
        engine(network(), source, 0, None)
    else:
        bare(network(), bare_batches(source, 0), len(source) // BATCH)
    return {"peak": _resident("VmHWM"), "growth": _resident("VmHWM") - before}


def _resident(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def rows_of(what: str, images: int, found: Mapping[str, Sequence[float]], asked: str) -> list[list[str]]:
    """Return one row per other variant: images per second of both, the ratio and its spread."""
    rows: list[list[str]] = []
    for name, seconds in found.items():
        if name == "ours":
            continue
        ratios = [other / own for own, other in zip(found["ours"], seconds, strict=True)]
        rates = [f"{images / statistics.median(each):,.0f}" for each in (found["ours"], seconds)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append([what, name, *rates, f"{statistics.median(ratios):.2f}", spread, asked])
    return rows


def main() -> None:
    """Run all parts and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["loop", "memory", "cifar", "folder"])
    parser.add_argument("--images", type=int, default=2560, help="number of images of CIFAR-10")
    parser.add_argument("--photographs", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arm", choices=["ours", "bare"], help=argparse.SUPPRESS)
    parser.add_argument("--name", default="engine", help="name of the files in results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = load_data(str(CIFAR10), limit=arguments.images + 1000, validation_fraction=0.1).train
    assert isinstance(source, MemorySplit)
    source = source.subset(torch.arange(arguments.images))
    if arguments.arm:
        print(json.dumps(one_arm(arguments.arm, source)))
        return
    record, rows, memory = measured(arguments, source)
    header = ["part", "against", "ours images/s", "theirs", "ratio", "smallest to largest", "asked"]
    text = "# The engine and its data, against what users write by hand\n\n" + table(header, rows)
    if memory:
        text += "\n" + table(["memory of a training process, MiB", "ours", "bare", "ratio", "asked"], memory)
    path = write_record(arguments.name, {"surroundings": surroundings(), **record})
    path.with_suffix(".md").write_text(text)
    print(text)


def measured(
    arguments: argparse.Namespace, source: MemorySplit
) -> tuple[dict[str, Any], list[list[str]], list[list[str]]]:
    """Return the record, and the rows of both tables."""
    rounds, count = arguments.rounds, len(source) // BATCH * BATCH
    record: dict[str, Any] = {}
    rows: list[list[str]] = []
    memory: list[list[str]] = []
    if "loop" in arguments.parts:
        record["loop"] = loop(source, rounds)
        set_up = record["loop"].pop("ours, with set-up")
        rows += rows_of("one epoch of ResNet-20, no augmentation", count, record["loop"], "0.95")
        whole = {"ours": set_up, "bare": record["loop"]["bare"]}
        rows += rows_of("the same, with the set-up of a run", count, whole, "")
        record["loop"]["ours, with set-up"] = set_up
    if "memory" in arguments.parts:
        found = {arm: memory_of(arm, arguments.images, arguments.threads) for arm in ("ours", "bare")}
        record["memory"] = found
        for what in ("peak", "growth"):
            own, other = found["ours"][what], found["bare"][what]
            memory.append([what, f"{own:.0f}", f"{other:.0f}", f"{own / other:.2f}", "1.10"])
    if "cifar" in arguments.parts:
        record["cifar"] = cifar(source, rounds)
        rows += rows_of("CIFAR-10, crop and flip, read", count, record["cifar"]["read"], "1.3")
        rows += rows_of("the same, one epoch of ResNet-20", count, record["cifar"]["trained"], "")
    if "folder" in arguments.parts:
        with tempfile.TemporaryDirectory() as place:
            record["bytes per photograph"] = write_photographs(Path(place), source, arguments.photographs)
            record["folder"] = folder(Path(place), arguments.photographs, rounds)
        images = arguments.photographs // FOLDER_BATCH * FOLDER_BATCH
        for name, found in record["folder"].items():
            rows += rows_of(f"JPEG folder, {name}, read", images, found, "1.3")
    return record, rows, memory


if __name__ == "__main__":
    main()
