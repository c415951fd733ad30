"""Run TAS on networks it was not written for: a short search on CIFAR-10, and how close to its budget it ends.

    python benchmarks/tas_models.py

Images have 32 x 32 pixels. The CIFAR ResNets have trained weights, the others (timm, 10 classes) random ones: the
result shows that the same search runs on them, not how accurate they become. It searches widths alone, depths alone,
both, and widths with untied branches, where the network has residual blocks.
"""

import argparse
import time
from typing import Any

import timm
import torch
from _record import CIFAR10, WEIGHTS, surroundings, table, write_record
from torch import nn

from secateur.cost import count_macs
from secateur.data import ImageData, draw_calibration, load_data
from secateur.graph import ChannelGraph, trace, untie
from secateur.models import load_model
from secateur.nas import TAS, Depths, Widths
from secateur.prune import cut
from secateur.search import L2, SearchSpace, search_architecture
from secateur.train import TrainConfig

MODELS = ("cifar_resnet20", "cifar_resnet56", "mobilenetv2_050", "densenet121", "efficientnet_b0", "convnext_atto")
SPACES: dict[str, tuple[Widths | None, Depths | None]] = {
    "widths": (Widths(), None),
    "depths": (None, Depths()),
    "both": (Widths(), Depths()),
    "untied": (Widths(), None),
}


def model_of(name: str) -> nn.Module:
    """Return a network for images of 32 x 32 pixels and ten classes."""
    if name.startswith("cifar_"):
        model, _ = load_model(name, weights=WEIGHTS / f"{name.replace('cifar_', 'cifar10_')}.safetensors")
        return model.eval()
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).eval()


def run(name: str, space: str, percent: int, epochs: int, data: ImageData) -> dict[str, Any] | None:
    """Run one search and cut the result; None if there is nothing to search."""
    model = model_of(name)
    batches = draw_calibration(data.train, 256, device=torch.device("cpu"))
    graph: ChannelGraph = trace(model, batches[0][0][:2])
    if space == "untied":
        graph = untie(model, graph)
    widths, depths = SPACES[space]
    if (depths and not graph.chains) or (space == "untied" and not any(axis.residual_axis for axis in graph.prunable)):
        return None
    train = TrainConfig(epochs=epochs, batch_size=32, learning_rate=0.01)
    strategy = TAS(widths=widths, depths=depths, train=train, importance=L2())
    began = time.process_time()
    bounds = SearchSpace(min_kept_fraction=0)
    found = search_architecture(
        model, graph, strategy, budget=f"macs={percent}%", batches=batches, space=bounds, data=data
    )
    seconds = time.process_time() - began
    small = cut(model, graph, found.architecture)
    example = torch.zeros(1, *data.size)
    return {
        "model": name,
        "space": space,
        "budget_percent": percent,
        "utilization": found.cost.macs / (found.original.macs * percent / 100),
        "counted_percent": 100 * count_macs(small.model, example) / count_macs(model, example),
        "removed_blocks": len(found.architecture.removed_blocks),
        "blocks": len(graph.removable),
        "verified_max_rel": small.verification.max_rel,
        "cpu_seconds": round(seconds, 1),
        "search": found.notes["search"],
    }


def main() -> None:
    """Run everything and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument("--images", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(str(CIFAR10), limit=arguments.images, seed=0)
    records: list[dict[str, Any]] = []
    for name in arguments.models:
        for space in arguments.spaces:
            # With all widths whole, removing blocks can save only a limited fraction.
            record = run(name, space, 80 if space == "depths" else 55, arguments.epochs, data)
            if record is not None:
                records.append(record)
                print({key: value for key, value in record.items() if key != "search"}, flush=True)
    path = write_record("tas_models", {"runs": records, "surroundings": surroundings()})
    header = ["model", "searched", "budget", "MACs kept (counted)", "of the budget", "blocks removed"]
    header += ["sliced = masked", "CPU s"]
    rows = [
        [
            r["model"],
            r["space"],
            f"{r['budget_percent']} %",
            f"{r['counted_percent']:.2f} %",
            f"{100 * r['utilization']:.2f} %",
            f"{r['removed_blocks']} of {r['blocks']}",
            f"{r['verified_max_rel']:.0e}",
            f"{r['cpu_seconds']:.0f}",
        ]
        for r in records
    ]
    title = "# Short TAS searches on CIFAR-10, unchanged on every network\n\n"
    path.with_suffix(".md").write_text(title + table(header, rows))
    print(table(header, rows))


if __name__ == "__main__":
    main()
