"""Measure the accuracy after a short recovery, against Torch-Pruning fine-tuned by the same loop.

    python benchmarks/recover.py --models 20 56 --epochs 1 3 --seeds 0 1
    python benchmarks/recover.py --summary

Every run writes results/recover/<model>-<method>-<epochs>ep-seed<seed>.json; existing runs are not repeated. The test
set is used once per run, at the end. The best epoch is chosen on 5,000 training images that are held out.

Methods, all at macs=50 %:
    ours      Knapsack(Reconstruction()) + Refit(), then plain KD + labels + aligned features
    ours-kd   the same cut, then the same plain KD + labels without aligned features
    ours-ce   the same cut, then cross-entropy
    peer-ce   Torch-Pruning 1.6.1, GroupMagnitudeImportance on the blocks' inner convolutions, then cross-entropy
    peer-kd   the same cut, then the same plain KD + labels as ours, without aligned features
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _peer import prune_inner_convolutions
from _record import CIFAR10, RESULTS, WEIGHTS, surroundings, table, write_record
from torch import nn

from secateur.cost import count_macs
from secateur.data import ImageData, draw_calibration, load_data
from secateur.distill import AlignedFeatures, Objective
from secateur.graph import trace
from secateur.models import load_model
from secateur.prune import Refit, cut
from secateur.search import Knapsack, SearchSpace, search_architecture
from secateur.train import RunSettings, Silent, TrainConfig, evaluate, fit

KD = Objective(kd_weight=0.9, label_weight=0.1)
# Feature weight and rate were chosen on the validation images with ResNet-20, seed 2, one epoch (docs/log.md).
ALIGNED = Objective(kd_weight=0.9, label_weight=0.1, feature_weight=10.0)
SPACE = SearchSpace(min_kept_fraction=0.25)
Recipe = tuple[nn.Module, Objective, AlignedFeatures | None]


def ours(teacher: nn.Module, data: ImageData, seed: int) -> Recipe:
    """Cut, repair and distill with features."""
    batches = draw_calibration(data.train, 1024, device=torch.device("cpu"), seed=seed)
    graph = trace(teacher, batches[0][0][:1])
    found = search_architecture(teacher, graph, Knapsack(), budget="macs=50%", batches=batches, space=SPACE, seed=seed)
    done = cut(teacher, graph, found.architecture, calibration=[x for x, _ in batches], repairs=(Refit(),))
    return done.model, ALIGNED, AlignedFeatures.of(done.graph, done.architecture)


def ours_kd(teacher: nn.Module, data: ImageData, seed: int) -> Recipe:
    """Cut, repair and distill without features."""
    return ours(teacher, data, seed)[0], KD, None


def ours_ce(teacher: nn.Module, data: ImageData, seed: int) -> Recipe:
    """Cut, repair and train on labels."""
    return ours(teacher, data, seed)[0], Objective.of_labels(), None


def peer_ce(teacher: nn.Module, data: ImageData, seed: int) -> Recipe:
    """Train the peer's cut on labels."""
    return prune_inner_convolutions(teacher, torch.zeros(1, *data.size), kept_fraction=0.5), Objective.of_labels(), None


def peer_kd(teacher: nn.Module, data: ImageData, seed: int) -> Recipe:
    """Distill into the peer's cut."""
    return prune_inner_convolutions(teacher, torch.zeros(1, *data.size), kept_fraction=0.5), KD, None


METHODS: dict[str, Callable[[nn.Module, ImageData, int], Recipe]] = {
    "ours": ours,
    "ours-kd": ours_kd,
    "ours-ce": ours_ce,
    "peer-ce": peer_ce,
    "peer-kd": peer_kd,
}


def run(  # noqa: PLR0917
    depth: int, method: str, epochs: int, seed: int, rate: float, data: ImageData
) -> dict[str, Any]:
    """Run one recovery."""
    teacher, _ = load_model(f"cifar_resnet{depth}", weights=WEIGHTS / f"cifar10_resnet{depth}.safetensors")
    student, objective, alignment = METHODS[method](teacher, data, seed)
    example = torch.zeros(1, *data.size)
    train = TrainConfig(epochs=epochs, learning_rate=rate, seed=seed)
    trained = fit(
        student,
        data.train,
        train=train,
        objective=objective,
        teacher=teacher if objective.needs_teacher else None,
        alignment=alignment,
        augment=data.augment,
        validation=data.validation,
        run=RunSettings(callbacks=Silent()),
    )
    return {
        "model": f"cifar_resnet{depth}",
        "method": method,
        "epochs": epochs,
        "seed": seed,
        "learning_rate": rate,
        "kept_macs": count_macs(student, example) / count_macs(teacher, example),
        "test_before_training": evaluate(student, data.test).value,
        "test": evaluate(trained.model, data.test).value,
        "validation": trained.best_score,
        "best_epoch": trained.best_epoch,
        "seconds_per_epoch": [round(e.seconds, 1) for e in trained.history],
        "precision": str(trained.precision),
        "surroundings": surroundings(),
    }


def summary() -> str:
    """Write all records as one table: mean and every seed."""
    records = [json.loads(p.read_text()) for p in sorted((RESULTS / "recover").glob("*.json"))]
    groups: dict[tuple[str, int, str, float], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["model"], record["epochs"], record["method"], record["learning_rate"])
        groups.setdefault(key, []).append(record)
    rows = [
        [
            model,
            str(epochs),
            method,
            f"{rate:g}",
            f"{100 * found[0]['kept_macs']:.1f} %",
            ", ".join(f"{100 * r['test_before_training']:.2f}" for r in found),
            ", ".join(f"{100 * r['test']:.2f}" for r in found),
            f"{100 * statistics.mean(r['test'] for r in found):.2f}",
        ]
        for (model, epochs, method, rate), found in sorted(groups.items())
    ]
    header = ["model", "epochs", "method", "rate", "MACs kept", "test % before training", "test % per seed", "mean"]
    return table(header, rows)


def main() -> None:
    """Run missing records and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--summary", action="store_true", help="only print and write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.summary:
        data = load_data(str(CIFAR10), seed=0)
        for epochs in arguments.epochs:
            for depth in arguments.models:
                for seed in arguments.seeds:
                    for method in arguments.methods:
                        rate = "" if arguments.rate == 0.02 else f"-rate{arguments.rate:g}"
                        name = f"recover/resnet{depth}-{method}-{epochs}ep-seed{seed}{rate}"
                        if (RESULTS / f"{name}.json").exists():
                            continue
                        record = run(depth, method, epochs, seed, arguments.rate, data)
                        write_record(name, record)
                        print(name, f"{100 * record['test']:.2f}", record["seconds_per_epoch"], flush=True)
    (RESULTS / "recover.md").write_text("# Accuracy after a short recovery, CIFAR-10 test set\n\n" + summary())
    print(summary())


if __name__ == "__main__":
    main()
