"""ResNet-20 at 55 % of its MACs on CIFAR-10: TAS and SWP against other strategies with the same total compute.

    python benchmarks/tas_cifar10.py --seeds 0 1 2
    python benchmarks/tas_cifar10.py --summary

Every method gets passes over the training images worth three epochs of recovery, and starts from the same trained
weights. A search step of TAS costs about an ordinary training step (see tas_step.py), an epoch of it passes each image
once. Random search draws widths, cuts and heals each network as all methods do, and takes the one that is best on the
validation images; it draws as many as take the processor time of the search of TAS.

    tas        1 epoch of search, 2 of recovery
    swp        1 epoch of training the supernet (full, tiny and one drawn network in a step), 48 candidates of every
               stage judged, 2 epochs of recovery; boundary axes (the residual streams) stay whole
    random     random search, 2 epochs of recovery
    uniform    3 epochs of recovery
    pca        PCASlimming, 3 epochs of recovery
    knapsack   the default of `compress`, 3 epochs of recovery

Every run writes results/tas_cifar10/<method>-seed<seed>.json; runs that are there are not repeated. The test set is
looked at once per run, at the end; all choices are made on 5,000 training images set aside.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _record import CIFAR10, RESULTS, WEIGHTS, surroundings, table, write_record
from torch import Tensor, nn

from secateur.architecture import Architecture
from secateur.cost import Budget, CostModel, counted_macs
from secateur.data import ImageData, calibration, load_data
from secateur.distill import AlignedFeatures, Objective
from secateur.graph import ChannelGraph, trace
from secateur.importance import Evidence, Reconstruction
from secateur.models import load_model
from secateur.search import (
    SWP,
    TAS,
    Knapsack,
    PCASlimming,
    Problem,
    Sandwich,
    SearchSpace,
    Uniform,
    fit,
    keep_best,
    search,
)
from secateur.surgery import Cut, RecalibrateBatchNorm, Refit, cut
from secateur.train import Schedule, Silent, distill, evaluate, open_fabric

BUDGET = "macs=55%"
ALIGNED = Objective(kd_weight=0.9, label_weight=0.1, feature_weight=10.0)
SPACE = SearchSpace(min_kept_fraction=0.25)
EPOCHS = 3
SEARCH_EPOCHS = 1
SECONDS_OF_RANDOM_SEARCH = 115.0
"""Processor time of the search of TAS on the machine of the records."""
Batches = tuple[tuple[Tensor, Tensor], ...]
Method = Callable[[nn.Module, ChannelGraph, Batches, ImageData, int], tuple[Architecture, dict[str, Any]]]


def tas(
    model: nn.Module, graph: ChannelGraph, batches: Batches, data: ImageData, seed: int
) -> tuple[Architecture, dict[str, Any]]:
    """One epoch of search, everything else as it comes."""
    strategy = TAS(schedule=Schedule(epochs=SEARCH_EPOCHS, batch_size=64, learning_rate=0.02))
    found = search(
        model,
        graph,
        strategy,
        budget=BUDGET,
        batches=batches,
        space=SPACE,
        seed=seed,
        data=data,
        fabric=open_fabric(None, device=torch.device("cpu")),
    )
    return found.architecture, {"search": found.notes["search"], "strategy": found.strategy}


def swp(
    model: nn.Module, graph: ChannelGraph, batches: Batches, data: ImageData, seed: int
) -> tuple[Architecture, dict[str, Any]]:
    """One epoch of training, with one drawn network in a step, and few candidates, to cost about what TAS does."""
    found = search(
        model,
        graph,
        SWP(nets=Sandwich(random=1), candidates=48, rounds=3, held_out=1000),
        budget=BUDGET,
        batches=batches,
        space=SPACE,
        seed=seed,
        data=data,
        fabric=open_fabric(None, device=torch.device("cpu")),
    )
    return found.architecture, {"strategy": found.strategy, **found.notes}


def random(
    model: nn.Module, graph: ChannelGraph, batches: Batches, data: ImageData, seed: int
) -> tuple[Architecture, dict[str, Any]]:
    """The best of many random architectures that fill the budget, each one healed and validated."""
    problem = Problem(Evidence(model, graph, batches, seed), CostModel(graph), Budget.parse(BUDGET), SPACE, _silent)
    scores = problem.scores(Reconstruction())
    draw = np.random.default_rng(seed)
    began, tried = time.process_time(), list[float]()
    best: tuple[float, Architecture] | None = None
    while time.process_time() - began < SECONDS_OF_RANDOM_SEARCH:
        # Sorted, the random keys of an axis make its width uniform among the allowed ones, as far as the budget goes.
        widths = fit(problem, [np.sort(draw.random(len(levels) - 1)) for levels in problem.levels]).widths
        architecture = keep_best(problem, widths, scores)
        accuracy = evaluate(healed(model, graph, architecture, batches).model, data.validation).top1
        tried.append(accuracy)
        if best is None or accuracy > best[0]:
            best = accuracy, architecture
    assert best is not None
    return best[1], {"tried": tried}


def _silent(fraction: float, what: str) -> None:
    """Show nothing."""


def of(strategy: Uniform | PCASlimming | Knapsack) -> Method:
    """A strategy that needs no training."""

    def method(
        model: nn.Module, graph: ChannelGraph, batches: Batches, data: ImageData, seed: int
    ) -> tuple[Architecture, dict[str, Any]]:
        found = search(model, graph, strategy, budget=BUDGET, batches=batches, space=SPACE, seed=seed)
        return found.architecture, {"strategy": found.strategy}

    return method


METHODS: dict[str, tuple[Method, int]] = {
    "tas": (tas, EPOCHS - SEARCH_EPOCHS),
    "swp": (swp, EPOCHS - SEARCH_EPOCHS),
    "random": (random, EPOCHS - SEARCH_EPOCHS),
    "uniform": (of(Uniform(importance=Reconstruction())), EPOCHS),
    "pca": (of(PCASlimming(importance=Reconstruction())), EPOCHS),
    "knapsack": (of(Knapsack()), EPOCHS),
}
"""The method and its epochs of recovery. All keep the channels that the same importance names."""


def healed(model: nn.Module, graph: ChannelGraph, architecture: Architecture, batches: Batches) -> Cut:
    """Cut and healed as `compress` does it."""
    images = [images for images, _ in batches]
    return cut(model, graph, architecture, calibration=images, heal=(Refit(), RecalibrateBatchNorm()))


def run(method: str, seed: int, data: ImageData) -> dict[str, Any]:
    """One search and recovery."""
    teacher, _ = load_model("cifar_resnet20", weights=WEIGHTS / "cifar10_resnet20.safetensors")
    batches = calibration(data.train, 1024, device=torch.device("cpu"), seed=seed)
    graph = trace(teacher, batches[0][0][:1])
    find, epochs = METHODS[method]
    began = time.process_time()
    architecture, notes = find(teacher, graph, batches, data, seed)
    searched = time.process_time() - began
    done = healed(teacher, graph, architecture, batches)
    began = time.process_time()
    trained = distill(
        done.model,
        teacher=teacher,
        data=data,
        schedule=Schedule(epochs=epochs, learning_rate=0.02, seed=seed),
        objective=ALIGNED,
        alignment=AlignedFeatures.of(done.graph, done.architecture),
        progress=Silent(),
    )
    recovered = time.process_time() - began
    example = torch.zeros(1, *data.size)
    return {
        "method": method,
        "seed": seed,
        "epochs_of_recovery": epochs,
        "kept_macs": counted_macs(done.model, example) / counted_macs(teacher, example),
        "widths": dict(architecture.widths),
        "validation_before_recovery": evaluate(done.model, data.validation).top1,
        "validation": trained.best_accuracy,
        "test": evaluate(trained.model, data.test).top1,
        "cpu_seconds_of_search": round(searched, 1),
        "cpu_seconds_of_recovery": round(recovered, 1),
        "notes": notes,
        "surroundings": surroundings(),
    }


def summary() -> str:
    """All records as one table."""
    records = [json.loads(path.read_text()) for path in sorted((RESULTS / "tas_cifar10").glob("*.json"))]
    rows: list[list[str]] = []
    for method in METHODS:
        found = sorted((r for r in records if r["method"] == method), key=lambda r: r["seed"])
        if not found:
            continue
        tests = [100 * r["test"] for r in found]
        spread = statistics.stdev(tests) if len(tests) > 1 else float("nan")
        rows.append([
            method,
            f"{100 * statistics.mean(r['kept_macs'] for r in found):.1f} %",
            ", ".join(f"{100 * r['validation_before_recovery']:.1f}" for r in found),
            ", ".join(f"{test:.2f}" for test in tests),
            f"**{statistics.mean(tests):.2f}** (sd {spread:.2f}, n {len(tests)})",
            f"{statistics.mean(r['cpu_seconds_of_search'] for r in found):.0f}",
            f"{statistics.mean(r['cpu_seconds_of_recovery'] for r in found):.0f}",
        ])  # fmt: skip
    header = [
        "method",
        "MACs kept",
        "validation % healed",
        "test % per seed",
        "test %",
        "search, CPU s",
        "recovery, CPU s",
    ]
    return table(header, rows)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="only print and write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.summary:
        data = load_data(str(CIFAR10), seed=0)
        for seed in arguments.seeds:
            for method in arguments.methods:
                name = f"tas_cifar10/{method}-seed{seed}"
                if (RESULTS / f"{name}.json").exists():
                    continue
                record = run(method, seed, data)
                write_record(name, record)
                print(name, f"{100 * record['test']:.2f}", record["cpu_seconds_of_search"], flush=True)
    title = "# ResNet-20 at 55 % of its MACs, CIFAR-10, same total compute (base 91.73 %)\n\n"
    (RESULTS / "tas_cifar10.md").write_text(title + summary())
    print(summary())


if __name__ == "__main__":
    main()
