"""Measure what each distillation loss adds to labels alone in a short recovery, at its own best learning rate.

All losses start from the same repaired cut of ResNet-20 at half of the MACs, and train on the first 10,000 training
images for one epoch. Every loss is trained at several learning rates, until the best has a worse one on both sides,
with a separate seed, and is compared on the 5,000 validation images. With the best rate it is trained with three
other seeds, and only these use the test images, once each. The weights of the losses are the defaults of ``secateur
distill``; they were not tuned, except that of aligned features (docs/log.md).

    OMP_NUM_THREADS=1 python benchmarks/losses.py [NAME...]
    python benchmarks/losses.py --summary

Every training writes results/losses/<name>.json; existing ones are not repeated.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from _record import CIFAR10, RESULTS, WEIGHTS, surroundings, table, write_record
from recover import ALIGNED, KD, ours
from torch import nn

from secateur.cli.distill import DEFAULT_WEIGHTS, LOGIT_LOSSES, Pair, inferred_taps, to_objective
from secateur.cost import count_macs
from secateur.data import ImageData, Split, load_data
from secateur.distill import AlignedFeatures, Objective
from secateur.models import load_model
from secateur.train import RunSettings, Silent, TrainConfig, evaluate, fit

MODEL = "cifar_resnet20"
IMAGES = 10_000
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
FIRST = (0.003, 0.01)
CHOOSING, SEEDS = 9, (0, 1, 2)


@dataclass(frozen=True, eq=False)
class Recovery:
    """The data and models that all losses start from."""

    student: nn.Module
    teacher: nn.Module
    alignment: AlignedFeatures
    data: ImageData
    images: Split

    @property
    def pair(self) -> Pair:
        """Return the student and teacher for which adaptors are made."""
        return Pair(self.student, self.teacher, next(iter(self.images.batches(2, device="cpu")))[0], len(self.images))


def begin() -> Recovery:
    """Prepare the repaired cut."""
    data = load_data(str(CIFAR10), seed=0)
    teacher, _ = load_model(MODEL, weights=WEIGHTS / "cifar10_resnet20.safetensors")
    student, _, alignment = ours(teacher, data, 0)
    assert alignment is not None
    return Recovery(student, teacher, alignment, data, data.train.subset(torch.arange(IMAGES)))


def alone(loss: str) -> Callable[[Recovery], Objective]:
    """Return an objective of one loss at its default weight and the labels (1, or less beside probabilities)."""
    label_weight = 0.1 if loss in LOGIT_LOSSES else 1.0

    def made(recovery: Recovery) -> Objective:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return to_objective(
                {loss: DEFAULT_WEIGHTS[loss]},
                recovery.pair,
                inferred_taps(recovery.pair),
                temperature=4.0,
                label_weight=label_weight,
                label_smoothing=0.0,
            )

    return made


WAYS: dict[str, Callable[[Recovery], Objective]] = {
    "labels": lambda _: Objective.of_labels(),
    "kd": lambda _: KD,
    **{loss: alone(loss) for loss in DEFAULT_WEIGHTS if loss != "kd"},
    "aligned": lambda _: Objective(kd_weight=0.0, label_weight=1.0, feature_weight=10.0),
    "kd and hint": lambda recovery: replace(KD, terms=alone("hint")(recovery).terms),
    "kd and aligned": lambda _: ALIGNED,
}


def trained(recovery: Recovery, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Run one recovery; only the counted seeds use the test images."""
    objective, data = WAYS[name](recovery), recovery.data
    began = time.process_time()
    done = fit(
        recovery.student,
        recovery.images,
        train=TrainConfig(epochs=1, learning_rate=rate, seed=seed),
        objective=objective,
        teacher=recovery.teacher if objective.needs_teacher else None,
        alignment=recovery.alignment if objective.feature_weight else None,
        augment=data.augment,
        run=RunSettings(callbacks=Silent()),
    )
    spent, choosing = time.process_time() - began, seed == CHOOSING
    part = data.validation if choosing else data.test
    accuracy = {"validation" if choosing else "test": evaluate(done.model, part).value}
    return {"loss": name, "learning_rate": rate, "seed": seed, **accuracy, "cpu_s": round(spent, 1), **surroundings()}


def kept(recovery: Recovery, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Read a record from disk, or train now and write it."""
    place = f"losses/{name.replace(' ', '-')}-rate{rate:g}-seed{seed}"
    if not (RESULTS / f"{place}.json").exists():
        record = trained(recovery, name, rate, seed)
        write_record(place, record)
        print(place, {key: record[key] for key in ("validation", "test", "cpu_s") if key in record}, flush=True)
    return json.loads((RESULTS / f"{place}.json").read_text())


def searched_rate(recovery: Recovery, name: str) -> float:
    """Find the best rate on validation images, with a worse one on both sides where possible."""
    tried = [kept(recovery, name, rate, CHOOSING) for rate in FIRST]
    while (rate := beside(tried)) is not None:
        tried.append(kept(recovery, name, rate, CHOOSING))
    return chosen_rate(tried)


def beside(tried: list[dict[str, Any]]) -> float | None:
    """Return the neighbor of the best rate that was not tried, or None."""
    at, known = RATES.index(chosen_rate(tried)), {record["learning_rate"] for record in tried}
    return next((rate for rate in RATES[max(0, at - 1) : at + 2] if rate not in known), None)


def chosen_rate(tried: list[dict[str, Any]]) -> float:
    """Return the best rate on the validation images; of equal ones the lowest."""
    return max(tried, key=lambda record: (record["validation"], -record["learning_rate"]))["learning_rate"]


def started(recovery: Recovery) -> None:
    """Measure the accuracies before any training."""
    if not (RESULTS / "losses" / "start.json").exists():
        example = torch.zeros(1, *recovery.data.size)
        facts = {
            "start": evaluate(recovery.student, recovery.data.test).value,
            "teacher": evaluate(recovery.teacher, recovery.data.test).value,
            "kept_macs": count_macs(recovery.student, example) / count_macs(recovery.teacher, example),
            "images": IMAGES,
        }
        write_record("losses/start", {**facts, **surroundings()})


def rows() -> Iterator[list[str]]:
    """Return one row per loss, the largest gain first."""
    records = [json.loads(path.read_text()) for path in sorted((RESULTS / "losses").glob("*-seed*.json"))]
    tried = {name: [r for r in records if r["loss"] == name and "validation" in r] for name in WAYS}
    rates = {name: chosen_rate(found) for name, found in tried.items() if len(found) > 1 and beside(found) is None}
    found = {
        name: {r["seed"]: r for r in records if r["loss"] == name and "test" in r and r["learning_rate"] == rate}
        for name, rate in rates.items()
    }
    base = found["labels"]
    for name, runs in sorted(((name, runs) for name, runs in found.items() if runs), key=lambda pair: -_mean(pair[1])):
        gains = [100 * (runs[seed]["test"] - base[seed]["test"]) for seed in runs]
        error = f" ± {statistics.stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 and name != "labels" else ""
        validated = sorted((r["learning_rate"], r["validation"]) for r in tried[name])
        yield [
            name,
            ", ".join(f"{rate:g}: {100 * accuracy:.2f}" for rate, accuracy in validated),
            f"{rates[name]:g}",
            ", ".join(f"{100 * runs[seed]['test']:.2f}" for seed in sorted(runs)),
            f"{100 * _mean(runs):.2f}",
            f"{statistics.mean(gains):+.2f}{error}",
            f"{statistics.median(r['cpu_s'] for r in runs.values()):.0f}",
        ]


def _mean(runs: dict[int, dict[str, Any]]) -> float:
    return statistics.mean(record["test"] for record in runs.values())


def summary() -> str:
    """Write all records as one page."""
    start = json.loads((RESULTS / "losses" / "start.json").read_text())
    header = ["loss", "validation % by rate", "rate taken", "test % per seed", "mean"]
    return (
        "# What each loss adds to labels alone\n\n"
        f"{MODEL} at {100 * start['kept_macs']:.1f} % of the MACs (Knapsack, Refit), {start['images']} images of "
        f"CIFAR-10 once, batch {TrainConfig(1).batch_size}. Accuracy before training {100 * start['start']:.2f} %, "
        f"of the teacher {100 * start['teacher']:.2f} %. {start['date']}, {start['cpu']}, {start['threads']} thread, "
        f"`python {start['command']}`.\n\n"
        "Rates were chosen on 5,000 validation images with a seed that is not in the table; gains are points of test "
        "accuracy over labels alone with the same seed, mean and standard error.\n\n"
        + table([*header, "gain over labels", "processor s"], list(rows()))
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(WAYS), help="losses; all by default")
    parser.add_argument("--summary", action="store_true", help="only write the table")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not asked.summary:
        recovery = begin()
        started(recovery)
        rates = {name: searched_rate(recovery, name) for name in asked.names}
        for seed in SEEDS:  # In rounds, so that an interrupted benchmark has something of every loss.
            for name, rate in rates.items():
                kept(recovery, name, rate, seed)
    (RESULTS / "losses.md").write_text(summary())
    print(summary())


if __name__ == "__main__":
    main()
