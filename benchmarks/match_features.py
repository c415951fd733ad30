"""Measure what `MatchFeatures` adds to the closed-form repairs, without labels and without a training loop.

For pretrained ResNets on CIFAR-10, budgets of MACs and two draws of calibration images: the accuracy on the 10,000 test
images after Knapsack, `Refit` and `RecalibrateBatchNorm`, and after `MatchFeatures` too, with the processor time. The
learning rate and the features that are compared were chosen by the distance from the original's outputs on training
images that no repair had seen (see docs/log.md), not by the accuracies of this table; that a rate of 2e-3 harms where
there is little to repair was first seen on test images, though.

    OMP_NUM_THREADS=1 python benchmarks/match_features.py --depth 56 --budgets 50% 35%

Every row is written to results/match_features.json as it is measured; rows that are there are not repeated.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from _record import CIFAR10, RESULTS, WEIGHTS, surroundings, table, write_record

from secateur.data import draw_calibration, load_data
from secateur.distill import MatchFeatures
from secateur.graph import trace
from secateur.models import load_model
from secateur.prune import RecalibrateBatchNorm, Refit, RepairContext, cut
from secateur.search import Knapsack, SearchSpace, search_architecture
from secateur.train import evaluate

IMAGES, MORE = 1024, 3072
SPACE = SearchSpace(divisor=1, min_kept_fraction=0.1)


def row_of(depth: int, budget: str, draw: int) -> dict[str, Any]:
    """Search, cut, repair and evaluate once."""
    weights = WEIGHTS / f"cifar10_resnet{depth}.safetensors"
    model, _ = load_model(f"cifar_resnet{depth}", weights=weights)
    data = load_data(str(CIFAR10), seed=0)
    batches = draw_calibration(data.train, IMAGES, device=torch.device("cpu"), seed=draw)
    images = tuple(x for x, _ in batches)
    graph = trace(model, images[0][:1])
    began = time.process_time()
    found = search_architecture(model, graph, Knapsack(), budget=f"macs={budget}", batches=batches, space=SPACE, seed=0)
    searched = time.process_time()
    done = cut(model, graph, found.architecture, calibration=images, repairs=(Refit(), RecalibrateBatchNorm()))
    closed = time.process_time()
    before = evaluate(done.model, data.test).value
    again = time.process_time()
    # Three quarters of the images, as the rest judges repairs in `cut`, and as many more as `compress` gives it.
    fitted = tuple(x[: 3 * len(x) // 4] for x in images)
    drawn = draw_calibration(data.train, IMAGES + MORE, device=torch.device("cpu"), seed=draw)
    more = torch.cat([x for x, _ in drawn])[IMAGES:].split(64)
    MatchFeatures(more=more).apply_(done.model, RepairContext(model, done.graph, done.architecture, fitted))
    matched = time.process_time()
    return {
        "model": f"ResNet-{depth}",
        "budget": budget,
        "draw": draw,
        "macs_kept": found.cost.macs / found.original.macs,
        "repaired": before,
        "matched": evaluate(done.model, data.test).value,
        "search_s": searched - began,
        "repair_s": closed - searched,
        "match_s": matched - again,
        "date": surroundings()["date"],
    }


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, choices=(20, 32, 44, 56), default=56)
    parser.add_argument("--budgets", nargs="+", default=["70%", "50%", "35%", "25%"])
    parser.add_argument("--draws", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "match_features.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    for draw in range(arguments.draws):
        for budget in arguments.budgets:
            key = (f"ResNet-{arguments.depth}", budget, draw)
            if any((row["model"], row["budget"], row["draw"]) == key for row in rows):
                continue
            rows.append(row_of(arguments.depth, budget, draw))
            write_record("match_features", {**surroundings(), "rows": rows})
            print(rows[-1], flush=True)
            (RESULTS / "match_features.md").write_text(as_text(rows))


def as_text(rows: list[dict[str, Any]]) -> str:
    """The table, with the mean and the values of all draws."""
    lines: list[list[str]] = []
    for key in dict.fromkeys((row["model"], row["budget"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["budget"]) == key]

        def percent(name: str, mine: list[dict[str, Any]] = mine) -> str:
            values = [100 * row[name] for row in mine]
            each = f" ({', '.join(f'{value:.2f}' for value in values)})" if len(values) > 1 else ""
            return f"{statistics.mean(values):.2f}{each}"

        def seconds(name: str, mine: list[dict[str, Any]] = mine) -> str:
            return f"{statistics.mean(row[name] for row in mine):.0f}"

        lines.append([*key, percent("repaired"), percent("matched"), seconds("repair_s"), seconds("match_s")])
    header = ["model", "MACs", "repaired, test %", "and features matched, test %", "repair, CPU s", "matching, CPU s"]
    title = f"CIFAR-10, no labels, no training loop, {IMAGES} calibration images, and {MORE} more to match features on"
    return f"# {title}\n\n{table(header, lines)}"


if __name__ == "__main__":
    main()
