"""Compare TAS and SWP with other strategies at equal compute: ResNet-20 at 55 % or 50 % of its MACs on CIFAR-10.

    python benchmarks/tas_cifar10.py --seeds 0 1 2
    python benchmarks/tas_cifar10.py --seeds 0 1 2 --setting 50
    python benchmarks/tas_cifar10.py --summary

At 55 % every method gets passes over the training images worth three epochs of recovery, and starts from the same
trained weights. A search step of TAS costs about as much as an ordinary training step (see tas_step.py); an epoch of
it passes each image once. Random search draws widths, cuts and repairs each network as all methods do, and takes the
one that is best on the validation images; it draws as many as take the processor time of the search of TAS.

    tas        1 epoch of search, 2 of recovery
    swp        1 epoch of training the supernet (full, smallest and one random network per step), 48 candidates of every
               stage scored, 2 epochs of recovery; boundary axes (the residual streams) stay whole
    random     random search, 2 epochs of recovery
    uniform    3 epochs of recovery
    pca        PCASlimming, 3 epochs of recovery
    knapsack   the default of `compress`, 3 epochs of recovery

At 50 % the compute is equal in processor time: methods with a cheaper search get more epochs of recovery, and there
are half as many training images; see `SETTINGS`.

Every run writes results/<setting>/<method>-seed<seed>.json; existing runs are not repeated. The test set is used once
per run, at the end; all choices are made on a tenth of the training images, which is held out.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _record import CIFAR10, RESULTS, WEIGHTS, surroundings, table, write_record
from torch import Tensor, nn

from secateur.architecture import Architecture
from secateur.cost import Budget, CostModel, count_macs
from secateur.data import ImageData, draw_calibration, load_data
from secateur.distill import AlignedFeatures, Objective
from secateur.graph import ChannelGraph, trace
from secateur.models import load_model
from secateur.nas import SWP, TAS, SandwichSampler
from secateur.prune import Cut, RecalibrateBatchNorm, Refit, cut
from secateur.search import (
    Knapsack,
    PCASlimming,
    Reconstruction,
    ScoringInputs,
    SearchContext,
    SearchSpace,
    Uniform,
    keep_best,
    search_architecture,
    widen_to_budget,
)
from secateur.train import RunSettings, Silent, TrainConfig, evaluate, open_fabric, train_with_teacher

ALIGNED = Objective(kd_weight=0.9, label_weight=0.1, feature_weight=10.0)
SPACE = SearchSpace(min_kept_fraction=0.25)
SEARCH_EPOCHS = 1
SECONDS_OF_RANDOM_SEARCH = 115.0
"""Processor time of the search of TAS on the machine of the records."""
Batches = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Setting:
    """The settings that all methods share.

    Attributes:
        title: Of the table.
        folder: Of the records.
        budget: Of the search.
        images: Training images, those set aside included.
        epochs: Of recovery, by method.
    """

    title: str
    folder: str
    budget: str
    images: int
    epochs: Mapping[str, int]


SETTINGS = {
    "55": Setting(
        "ResNet-20 at 55 % of its MACs, CIFAR-10, same total compute (base 91.73 %)",
        "tas_cifar10",
        "macs=55%",
        50_000,
        {"tas": 2, "swp": 2, "random": 2, "uniform": 3, "pca": 3, "knapsack": 3},
    ),
    "50": Setting(
        "ResNet-20 at 50 % of its MACs, half of CIFAR-10, same processor time (base 91.73 %)",
        "swp_cifar10",
        "macs=50%",
        25_000,
        {"tas": 4, "swp": 2, "uniform": 5, "pca": 5},
    ),
}
Found = tuple[Architecture, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Case:
    """The inputs of a method."""

    model: nn.Module
    graph: ChannelGraph
    batches: Batches
    data: ImageData
    seed: int
    budget: str


Method = Callable[[Case], Found]


def tas(case: Case) -> Found:
    """Search for one epoch, with defaults otherwise."""
    strategy = TAS(train=TrainConfig(epochs=SEARCH_EPOCHS, batch_size=64, learning_rate=0.02))
    found = search_architecture(
        case.model,
        case.graph,
        strategy,
        budget=case.budget,
        batches=case.batches,
        space=SPACE,
        seed=case.seed,
        data=case.data,
        run=RunSettings(fabric=open_fabric(None, device=torch.device("cpu")), callbacks=Silent()),
    )
    return found.architecture, {"search": found.notes["search"], "strategy": found.strategy}


def swp(case: Case) -> Found:
    """Train for one epoch with one random network per step and few candidates, at about the cost of TAS."""
    found = search_architecture(
        case.model,
        case.graph,
        SWP(sampler=SandwichSampler(random=1), candidates=48, rounds=3, held_out=1000),
        budget=case.budget,
        batches=case.batches,
        space=SPACE,
        seed=case.seed,
        data=case.data,
        run=RunSettings(fabric=open_fabric(None, device=torch.device("cpu")), callbacks=Silent()),
    )
    return found.architecture, {"strategy": found.strategy, **found.notes}


def random(case: Case) -> Found:
    """Find the best of many random architectures that fill the budget, each one repaired and validated."""
    problem = SearchContext(
        ScoringInputs(case.model, case.graph, case.batches, case.seed),
        CostModel(case.graph),
        Budget.parse(case.budget),
        SPACE,
        _silent,
    )
    scores = problem.scores(Reconstruction())
    draw = np.random.default_rng(case.seed)
    began, tried = time.process_time(), list[float]()
    best: tuple[float, Architecture] | None = None
    while time.process_time() - began < SECONDS_OF_RANDOM_SEARCH:
        # Sorted, the random keys of an axis make its width uniform among the allowed ones, as far as the budget goes.
        widths = widen_to_budget(problem, [np.sort(draw.random(len(levels) - 1)) for levels in problem.levels]).widths
        architecture = keep_best(problem, widths, scores)
        accuracy = evaluate(
            repaired(case.model, case.graph, architecture, case.batches).model, case.data.validation
        ).value
        tried.append(accuracy)
        if best is None or accuracy > best[0]:
            best = accuracy, architecture
    assert best is not None
    return best[1], {"tried": tried}


def _silent(fraction: float, what: str) -> None:
    """Ignore progress."""


def of(strategy: Uniform | PCASlimming | Knapsack) -> Method:
    """Search with a strategy that needs no training."""

    def method(case: Case) -> Found:
        found = search_architecture(
            case.model, case.graph, strategy, budget=case.budget, batches=case.batches, space=SPACE, seed=case.seed
        )
        return found.architecture, {"strategy": found.strategy}

    return method


METHODS: dict[str, Method] = {
    "tas": tas,
    "swp": swp,
    "random": random,
    "uniform": of(Uniform(importance=Reconstruction())),
    "pca": of(PCASlimming(importance=Reconstruction())),
    "knapsack": of(Knapsack()),
}
"""All keep the channels that the same importance names."""


def repaired(model: nn.Module, graph: ChannelGraph, architecture: Architecture, batches: Batches) -> Cut:
    """Cut and repair a model like `compress`."""
    images = [images for images, _ in batches]
    return cut(model, graph, architecture, calibration=images, repairs=(Refit(), RecalibrateBatchNorm()))


def run(method: str, seed: int, data: ImageData, setting: Setting) -> dict[str, Any]:
    """Run one search and recovery."""
    teacher, _ = load_model("cifar_resnet20", weights=WEIGHTS / "cifar10_resnet20.safetensors")
    batches = draw_calibration(data.train, 1024, device=torch.device("cpu"), seed=seed)
    graph = trace(teacher, batches[0][0][:1])
    epochs = setting.epochs[method]
    began = time.process_time()
    architecture, notes = METHODS[method](Case(teacher, graph, batches, data, seed, setting.budget))
    searched = time.process_time() - began
    done = repaired(teacher, graph, architecture, batches)
    began = time.process_time()
    trained = train_with_teacher(
        done.model,
        teacher=teacher,
        data=data,
        train=TrainConfig(epochs=epochs, learning_rate=0.02, seed=seed),
        objective=ALIGNED,
        alignment=AlignedFeatures.of(done.graph, done.architecture),
        run=RunSettings(callbacks=Silent()),
    )
    recovered = time.process_time() - began
    example = torch.zeros(1, *data.size)
    return {
        "method": method,
        "seed": seed,
        "epochs_of_recovery": epochs,
        "kept_macs": count_macs(done.model, example) / count_macs(teacher, example),
        "widths": dict(architecture.widths),
        "validation_before_recovery": evaluate(done.model, data.validation).value,
        "validation": trained.best_score,
        "test": evaluate(trained.model, data.test).value,
        "cpu_seconds_of_search": round(searched, 1),
        "cpu_seconds_of_recovery": round(recovered, 1),
        "notes": notes,
        "surroundings": surroundings(),
    }


def summary(setting: Setting) -> str:
    """Write all records as one table."""
    records = [json.loads(path.read_text()) for path in sorted((RESULTS / setting.folder).glob("*.json"))]
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
        "validation % repaired",
        "test % per seed",
        "test %",
        "search, CPU s",
        "recovery, CPU s",
    ]
    return table(header, rows)


def main() -> None:
    """Run missing records and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--setting", choices=list(SETTINGS), default="55")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="only print and write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = SETTINGS[arguments.setting]
    if not arguments.summary:
        data = load_data(str(CIFAR10), limit=setting.images, seed=0)
        for seed in arguments.seeds:
            for method in arguments.methods or setting.epochs:
                name = f"{setting.folder}/{method}-seed{seed}"
                if (RESULTS / f"{name}.json").exists():
                    continue
                record = run(method, seed, data, setting)
                write_record(name, record)
                print(name, f"{100 * record['test']:.2f}", record["cpu_seconds_of_search"], flush=True)
    (RESULTS / f"{setting.folder}.md").write_text(f"# {setting.title}\n\n{summary(setting)}")
    print(summary(setting))


if __name__ == "__main__":
    main()
