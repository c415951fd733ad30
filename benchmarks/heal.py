"""Measure the accuracy right after cut and repair, without training: every importance, with and without each repair.

    python benchmarks/heal.py

The model is the pretrained ResNet-56 on CIFAR-10, with all 10,000 test images and 512 calibration images from the
training set (repairs use no labels). Writes results/heal.json after every architecture (finished ones are not
repeated) and results/heal.md. Nothing is chosen on the test set: every combination is in the table.
"""

import argparse
import copy
import json
import time
from typing import Any

import torch
from _record import CIFAR10, RESULTS, WEIGHTS, surroundings, table, write_record
from torch import nn

from secateur.data import draw_calibration, load_data
from secateur.graph import trace
from secateur.models import load_model
from secateur.prune import RecalibrateBatchNorm, Refit, RepairContext, cut, output_distance
from secateur.search import (
    L1,
    L2,
    LAMP,
    BatchNormScale,
    GeometricMedian,
    Knapsack,
    PCASlimming,
    RandomImportance,
    Reconstruction,
    SearchSpace,
    Strategy,
    Taylor,
    Uniform,
    search_architecture,
)
from secateur.train import evaluate

SPACE = SearchSpace(min_kept_fraction=0.25)
STRATEGIES: dict[str, Strategy] = {
    "Knapsack(Reconstruction)": Knapsack(),
    "PCASlimming(Weights, Reconstruction)": PCASlimming(importance=Reconstruction()),
    "Uniform(Reconstruction)": Uniform(importance=Reconstruction()),
    "Uniform(L1)": Uniform(importance=L1()),
    "Uniform(L2)": Uniform(importance=L2()),
    "Uniform(GeometricMedian)": Uniform(importance=GeometricMedian()),
    "Uniform(BatchNormScale)": Uniform(importance=BatchNormScale()),
    "Uniform(Taylor)": Uniform(importance=Taylor()),
    "Uniform(LAMP)": Uniform(importance=LAMP()),
    "Uniform(RandomImportance)": Uniform(importance=RandomImportance()),
}
VARIANTS = ("cut", "cut + BN", "cut + refit", "cut + refit + BN", "default")


def variants(model: nn.Module, done: Any, images: tuple[torch.Tensor, ...]) -> dict[str, nn.Module]:
    """Return the cut model under every repair, and under the default (harmful repairs are undone)."""
    context = RepairContext(model, done.graph, done.architecture, images)
    found = {"cut": done.model}
    for base, repair, name in (
        ("cut", RecalibrateBatchNorm(), "cut + BN"),
        ("cut", Refit(), "cut + refit"),
        ("cut + refit", RecalibrateBatchNorm(), "cut + refit + BN"),
    ):
        found[name] = copy.deepcopy(found[base])
        repair.apply_(found[name], context)
    kept, distance = "cut", output_distance(model, found["cut"], images)
    for name in ("cut + refit", "cut + refit + BN"):
        after = output_distance(model, found[name], images)
        if after > distance:
            break
        kept, distance = name, after
    found["default"] = found[kept]
    return found


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=56)
    parser.add_argument("--budgets", nargs="+", default=["50%", "70%"])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = "heal" if arguments.depth == 56 else f"heal-resnet{arguments.depth}"
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    model, _ = load_model(
        f"cifar_resnet{arguments.depth}", weights=WEIGHTS / f"cifar10_resnet{arguments.depth}.safetensors"
    )
    data = load_data(str(CIFAR10), seed=0)
    batches = draw_calibration(data.train, 512, device=torch.device("cpu"), seed=0)
    images = tuple(x for x, _ in batches)
    graph = trace(model, images[0][:1])
    for strategy_name, strategy in STRATEGIES.items():
        for budget in arguments.budgets:
            if any(row["strategy"] == strategy_name and row["budget"] == budget for row in rows):
                continue
            began = time.process_time()
            found = search_architecture(
                model, graph, strategy, budget=f"macs={budget}", batches=batches, space=SPACE, seed=0
            )
            searched = time.process_time() - began
            done = cut(model, graph, found.architecture)
            began = time.process_time()
            models = variants(model, done, images)
            accuracy: dict[int, float] = {}
            for small in models.values():
                if id(small) not in accuracy:
                    accuracy[id(small)] = evaluate(small, data.test).value
            row = {
                "strategy": strategy_name,
                "budget": budget,
                "kept_macs": found.cost.macs / found.original.macs,
                "kept_params": found.cost.params / found.original.params,
                "search_cpu_s": round(searched, 1),
                "accuracy": {variant: accuracy[id(small)] for variant, small in models.items()},
                "widths": dict(found.architecture.widths),
            }
            rows.append(row)
            record = {"surroundings": surroundings(), "model": f"cifar_resnet{arguments.depth}", "rows": rows}
            write_record(name, record)
            print(strategy_name, budget, {k: f"{100 * v:.2f}" for k, v in row["accuracy"].items()}, flush=True)
    lines = [
        [r["strategy"], r["budget"], f"{100 * r['kept_macs']:.1f} %", f"{100 * r['kept_params']:.1f} %"]
        + [f"{100 * r['accuracy'][v]:.2f}" for v in VARIANTS]
        for r in sorted(rows, key=lambda r: (r["budget"], -r["accuracy"]["default"]))
    ]
    header = ["strategy", "budget", "MACs kept", "parameters kept", *VARIANTS]
    text = f"# ResNet-{arguments.depth} on CIFAR-10, test %, no training\n\n" + table(header, lines)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
