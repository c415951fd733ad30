"""Measure what each distillation loss adds to labels alone in a short recovery, at its own best rate and weight.

All losses start from the same repaired cut of ResNet-20 at half of the MACs, and train on the first 10,000 training
images for one epoch. Learning rate and weight of every loss are searched together, beginning with the published weight
and until the best pair has a worse neighbor on all sides, with a separate seed, and are compared on the 5,000
validation images. With the best pair it is trained with three other seeds, and only these use the test images, once
each. The labels keep the weight that is published with the loss.

    OMP_NUM_THREADS=1 python benchmarks/losses.py [NAME...]
    python benchmarks/losses.py --summary

Every training writes results/losses_searched/<name>.json; existing ones are not repeated. results/losses.md and
results/losses were made by an earlier version of this script, with the former weights, and are not written any more.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from _record import CIFAR10, RESULTS, WEIGHTS, surroundings, table, write_record
from recover import ours
from torch import nn

from secateur.cli.distill import Pair, inferred_taps, to_objective
from secateur.cost import count_macs
from secateur.data import ImageData, Split, load_data
from secateur.distill import PUBLISHED, AlignedFeatures, Objective, published_label_weight
from secateur.models import load_model
from secateur.train import RunSettings, Silent, TrainConfig, evaluate, fit

MODEL = "cifar_resnet20"
IMAGES = 10_000
RATES = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)
FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Weights that are tried, as multiples of the published one."""
FIRST = ((0.003, 1.0), (0.01, 1.0))
FOLDER = "losses_searched"
ALIGNED_WEIGHT = 10.0
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


def of(*losses: str) -> Callable[[Recovery, float], Objective]:
    """Return an objective of losses and labels; a factor scales all weights but that of the labels."""

    def made(recovery: Recovery, factor: float) -> Objective:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return to_objective(
                {loss: factor * PUBLISHED[loss].weight for loss in losses},
                recovery.pair,
                inferred_taps(recovery.pair),
                temperature=4.0,
                label_weight=published_label_weight(losses),
                label_smoothing=0.0,
            )

    return made


def aligned(kd_weight: float, label_weight: float) -> Callable[[Recovery, float], Objective]:
    """Return an objective with aligned features, whose weight the factor scales."""
    return lambda _, factor: Objective(kd_weight, label_weight, factor * ALIGNED_WEIGHT)


WAYS: dict[str, Callable[[Recovery, float], Objective]] = {
    "labels": lambda *_: Objective.of_labels(),
    **{loss: of(loss) for loss in PUBLISHED},
    "aligned": aligned(0.0, 1.0),
    "kd and hint": of("kd", "hint"),
    "kd and aligned": aligned(0.9, 0.1),
}
Choice = tuple[float, float]


def trained(recovery: Recovery, name: str, choice: Choice, seed: int) -> dict[str, Any]:
    """Run one recovery; only the counted seeds use the test images."""
    (rate, factor), data = choice, recovery.data
    objective = WAYS[name](recovery, factor)
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
    settings = {"loss": name, "learning_rate": rate, "weight_factor": factor, "seed": seed}
    return {**settings, **accuracy, "cpu_s": round(spent, 1), **surroundings()}


def kept(recovery: Recovery, name: str, choice: Choice, seed: int) -> dict[str, Any]:
    """Read a record from disk, or train now and write it."""
    place = f"{FOLDER}/{name.replace(' ', '-')}-rate{choice[0]:g}-weight{choice[1]:g}-seed{seed}"
    if not (RESULTS / f"{place}.json").exists():
        record = trained(recovery, name, choice, seed)
        write_record(place, record)
        print(place, {key: record[key] for key in ("validation", "test", "cpu_s") if key in record}, flush=True)
    return json.loads((RESULTS / f"{place}.json").read_text())


def searched(recovery: Recovery, name: str) -> Choice:
    """Find the best rate and weight on validation images, with worse ones on all sides where possible."""
    tried = [kept(recovery, name, choice, CHOOSING) for choice in FIRST]
    while (choice := beside(name, tried)) is not None:
        tried.append(kept(recovery, name, choice, CHOOSING))
    return best_choice(tried)


def beside(name: str, tried: list[dict[str, Any]]) -> Choice | None:
    """Return a neighbor of the best pair that was not tried, rates first, or None."""
    rate, factor = best_choice(tried)
    known = {(record["learning_rate"], record["weight_factor"]) for record in tried}
    rates = [(other, factor) for other in _neighbors(RATES, rate)]
    factors = [] if name == "labels" else [(rate, other) for other in _neighbors(FACTORS, factor)]
    return next((choice for choice in (*rates, *factors) if choice not in known), None)


def _neighbors(values: tuple[float, ...], value: float) -> tuple[float, ...]:
    at = values.index(value)
    return values[max(0, at - 1) : at + 2]


def best_choice(tried: list[dict[str, Any]]) -> Choice:
    """Return the best rate and weight on the validation images; of equal ones the lowest."""
    best = max(tried, key=lambda record: (record["validation"], -record["learning_rate"], -record["weight_factor"]))
    return best["learning_rate"], best["weight_factor"]


def started(recovery: Recovery) -> None:
    """Measure the accuracies before any training."""
    if not (RESULTS / FOLDER / "start.json").exists():
        example = torch.zeros(1, *recovery.data.size)
        facts = {
            "start": evaluate(recovery.student, recovery.data.test).value,
            "teacher": evaluate(recovery.teacher, recovery.data.test).value,
            "kept_macs": count_macs(recovery.student, example) / count_macs(recovery.teacher, example),
            "images": IMAGES,
        }
        write_record(f"{FOLDER}/start", {**facts, **surroundings()})


def rows() -> Iterator[list[str]]:
    """Return one row per loss, the largest gain first."""
    records = [json.loads(path.read_text()) for path in sorted((RESULTS / FOLDER).glob("*-seed*.json"))]
    tried = {name: [r for r in records if r["loss"] == name and "validation" in r] for name in WAYS}
    choices = {name: best_choice(found) for name, found in tried.items() if len(found) > 1 and not beside(name, found)}
    found = {
        name: {
            r["seed"]: r
            for r in records
            if r["loss"] == name and "test" in r and (r["learning_rate"], r["weight_factor"]) == choice
        }
        for name, choice in choices.items()
    }
    base = found["labels"]
    for name, runs in sorted(((name, runs) for name, runs in found.items() if runs), key=lambda pair: -_mean(pair[1])):
        gains = [100 * (runs[seed]["test"] - base[seed]["test"]) for seed in runs]
        error = f" ± {statistics.stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 and name != "labels" else ""
        validated = sorted((r["learning_rate"], r["weight_factor"], r["validation"]) for r in tried[name])
        taken_rate, taken_factor = choices[name]
        yield [
            name,
            ", ".join(f"{rate:g} x{factor:g}: {100 * accuracy:.2f}" for rate, factor, accuracy in validated),
            f"{taken_rate:g}",
            f"{taken_factor:g}",
            ", ".join(f"{100 * runs[seed]['test']:.2f}" for seed in sorted(runs)),
            f"{100 * _mean(runs):.2f}",
            f"{statistics.mean(gains):+.2f}{error}",
            f"{statistics.median(r['cpu_s'] for r in runs.values()):.0f}",
        ]


def _mean(runs: dict[int, dict[str, Any]]) -> float:
    return statistics.mean(record["test"] for record in runs.values())


def summary() -> str:
    """Write all records as one page."""
    start = json.loads((RESULTS / FOLDER / "start.json").read_text())
    header = ["loss", "validation % by rate and weight", "rate", "weight / published", "test % per seed", "mean"]
    return (
        "# What each loss adds to labels alone\n\n"
        f"{MODEL} at {100 * start['kept_macs']:.1f} % of the MACs (Knapsack, Refit), {start['images']} images of "
        f"CIFAR-10 once, batch {TrainConfig(1).batch_size}. Accuracy before training {100 * start['start']:.2f} %, "
        f"of the teacher {100 * start['teacher']:.2f} %. {start['date']}, {start['cpu']}, {start['threads']} thread, "
        f"`python {start['command']}`.\n\n"
        "Rates and weights were chosen on 5,000 validation images, which the pretrained network was trained on, with a "
        "seed that is not in the table; gains are points of test accuracy over labels alone with the same seed, mean "
        "and standard error.\n\n" + table([*header, "gain over labels", "processor s"], list(rows()))
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
        choices = {name: searched(recovery, name) for name in asked.names}
        for seed in SEEDS:  # In rounds, so that an interrupted benchmark has something of every loss.
            for name, choice in choices.items():
                kept(recovery, name, choice, seed)
    (RESULTS / f"{FOLDER}.md").write_text(summary())
    print(summary())


if __name__ == "__main__":
    main()
