"""Measure the time to find the channel graph and cut half of every width, against Torch-Pruning.

    python benchmarks/graph_speed.py

Times are processor seconds of one thread, both sides alternately in one process, medians. Ours is trace + search
(Uniform, L2) + cut *with* its verification (forward passes that Torch-Pruning does not make); the share of the
verification is shown. Torch-Pruning is its constructor + step with GroupMagnitudeImportance, the classifier ignored and
the heads of attention named, as in its own README and examples. Writes results/graph_speed.json and .md.
"""

import argparse
import copy
import itertools
import statistics
import time
import warnings
from collections.abc import Callable

import timm
import torch
import torchvision
from _peer import name_heads_
from _record import surroundings, table, write_record
from torch import nn

from secateur.architecture import Architecture
from secateur.graph import ChannelGraph, trace
from secateur.prune import apply_architecture, cut
from secateur.search import L2, ScoringInputs

MODELS: dict[str, Callable[[], nn.Module]] = {
    "torchvision resnet50": lambda: torchvision.models.resnet50(weights=None),
    "torchvision densenet121": lambda: torchvision.models.densenet121(weights=None),
    "torchvision mobilenet_v2": lambda: torchvision.models.mobilenet_v2(weights=None),
    "timm efficientnet_b0": lambda: timm.create_model("efficientnet_b0", pretrained=False),
    "torchvision convnext_tiny": lambda: torchvision.models.convnext_tiny(weights=None),
    "timm vit_small_patch16_224": lambda: timm.create_model("vit_small_patch16_224", pretrained=False),
}
EXAMPLE = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def half(model: nn.Module, graph: ChannelGraph) -> Architecture:
    """Choose the half of every axis with the largest L2 norms."""
    scores = L2().scores(ScoringInputs(model, graph))
    return Architecture.of({a.name: (-scores[a.name]).argsort()[: max(1, a.size // 2)] for a in graph.prunable})


def ours(model: nn.Module) -> dict[str, float]:
    """Return the seconds of each step."""
    times = [time.process_time()]
    graph = trace(model, EXAMPLE)
    times.append(time.process_time())
    architecture = half(model, graph)
    times.append(time.process_time())
    apply_architecture(model, graph, architecture)
    times.append(time.process_time())
    done = cut(model, graph, architecture)
    times.append(time.process_time())
    assert not done.verification.frozen
    steps = [after - before for before, after in itertools.pairwise(times)]
    return {
        "trace": steps[0],
        "score": steps[1],
        "slice": steps[2],
        "slice and verify": steps[3],
        "total": steps[0] + steps[1] + steps[3],
        "total without verification": steps[0] + steps[1] + steps[2],
    }


def peer(model: nn.Module) -> float:
    """Run Torch-Pruning's constructor and step."""
    import torch_pruning as tp  # type: ignore[import-not-found]

    model = copy.deepcopy(model)
    heads = name_heads_(model)
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            model,
            EXAMPLE,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=0.5,
            ignored_layers=last,
            num_heads=heads,
        )
        pruner.step()
    return time.process_time() - began


def main() -> None:
    """Measure all models and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record, rows = {}, []
    ratios: dict[str, list[float]] = {"total": [], "total without verification": []}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build().eval()
        ours(model), peer(model)
        mine, other = [], []
        for _ in range(arguments.rounds):
            mine.append(ours(model))
            other.append(peer(model))
        medians = {step: statistics.median(m[step] for m in mine) for step in mine[0]}
        theirs = statistics.median(other)
        for kind, found in ratios.items():
            found.append(statistics.median(m[kind] / o for m, o in zip(mine, other, strict=True)))
        record[name] = {"ours": mine, "peer": other}
        rows.append(
            [
                name,
                *(f"{medians[s]:.2f}" for s in ("trace", "score", "slice", "slice and verify", "total")),
                f"{theirs:.2f}",
                *(f"{found[-1]:.2f}" for found in ratios.values()),
            ]
        )
    means = {kind: statistics.geometric_mean(found) for kind, found in ratios.items()}
    rows.append(["**geometric mean**", *[""] * 6, *(f"**{means[kind]:.2f}**" for kind in ratios)])
    header = ["model", "trace s", "score s", "slice s", "slice + verify s", "total s"]
    header += ["Torch-Pruning s", "ratio", "ratio without verification"]
    text = "# Trace and cut, processor seconds of one thread\n\n" + table(header, rows)
    path = write_record("graph_speed", {"surroundings": surroundings(), "ratios": means, "rounds": record})
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
