"""Latency budgets of 75, 50 and 35 % on four networks: are they met, and what is the prediction worth?

Where there are trained weights and their images it is `secateur.pipeline.compress` as it comes, without the recovery.
Elsewhere weights are random: widths are uniform, channels are those of largest L2 norm, and the divisor of 8, 16 and 32
is the one that keeps most MACs within the bound by the table. Every bound is proved by a measurement of its own, in
alternating pairs.

    OMP_NUM_THREADS=1 python benchmarks/latency.py [NAME...]
"""

import json
import logging
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _record import CIFAR10, RESULTS, WEIGHTS, surroundings, table, write_record
from torch import Tensor, nn

from secateur.cost import Budget, OnnxRuntime, measure_pairs
from secateur.data import load_data
from secateur.export import eval_copy, feed, onnx_bytes, open_session
from secateur.graph import ChannelGraph, trace
from secateur.models import load_model
from secateur.pipeline import RecoveryConfig, RunConfig, compress
from secateur.prune import apply_architecture
from secateur.search import L2, SearchResult, SearchSpace, Uniform, WithinLatency, fit_latency, search_architecture
from secateur.search.latency import limit_of, spaces_of, used
from secateur.train import Silent, TrainConfig


@dataclass(frozen=True)
class Network:
    """One of them.

    Attributes:
        name: In the table.
        spec: See `load_model`.
        side: Of its input, in pixels.
        weights: Trained on CIFAR-10, or None for random ones.
    """

    name: str
    spec: str
    side: int
    weights: Path | None = None


NETWORKS = (
    Network("ResNet-20", "cifar_resnet20", 32, WEIGHTS / "cifar10_resnet20.safetensors"),
    Network("ResNet-18", "torchvision:resnet18", 224),
    Network("MobileNetV2", "timm:mobilenetv2_100", 224),
    Network("EfficientNet-B0", "timm:efficientnet_b0", 224),
)
BUDGETS = (75, 50, 35)
SPACE = SearchSpace(min_kept_fraction=0.25)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was found within one bound.

    Attributes:
        found: The architecture.
        small: The cut network.
        divisor: Of its widths.
        trials: All searches, see `Trial.to_json`.
        repaired: Accuracy on the test images right after repairs, or None.
    """

    found: SearchResult
    small: nn.Module
    divisor: int
    trials: list[dict[str, Any]]
    repaired: float | None = None


@dataclass(frozen=True)
class Remembering(OnnxRuntime):
    """ONNX Runtime; a model that is measured again is not exported again."""

    files: dict[int, tuple[nn.Module, bytes]] = field(default_factory=dict, compare=False)

    @contextmanager
    def opened(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Generator:
        if id(model) not in self.files:
            self.files[id(model)] = (model, onnx_bytes(eval_copy(model), inputs))
        session = open_session(self.files[id(model)][1], threads=self.threads)
        fed = feed(session, inputs)
        yield lambda: session.run(None, fed)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    begun = surroundings()
    wanted = sys.argv[1:]
    for network in NETWORKS:
        if not wanted or network.name in wanted:
            found = of_network(network)
            kept = [row for row in known_rows() if row["model"] != network.name]
            order = [each.name for each in NETWORKS]
            rows = sorted([*kept, *found], key=lambda row: (order.index(row["model"]), -row["budget_percent"]))
            record = {**begun, "load_average_after": surroundings()["load_average"], "rows": rows}
            path = write_record("latency", record)
            (RESULTS / "latency.md").write_text(as_text(record))
            print(path, flush=True)


def known_rows() -> list[dict[str, Any]]:
    """Those of the last record: networks can be measured again one by one."""
    path = RESULTS / "latency.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def of_network(network: Network) -> list[dict[str, Any]]:
    """The rows of one network."""
    model, _ = load_model(network.spec, weights=network.weights, seed=0)
    model.eval()
    images = torch.randn(8, 3, network.side, network.side, generator=torch.Generator().manual_seed(0))
    graph = trace(model, images[:1])
    target = Remembering()
    fit = fit_latency(model, graph, target, images[:1], space=spaces_of(SPACE, graph)[0])
    rows = []
    for percent in BUDGETS:
        budget = Budget(latency=f"{percent}%")
        if network.weights is None:
            outcome = of_random(model, graph, target, images[:1], budget)
        else:
            outcome = of_trained(model, budget)
        proof = measure_pairs(model, outcome.small, target, images[:1], rounds=50)
        found, first = outcome.found, outcome.trials[0]
        limit = limit_of(budget, float(fit.measured[0]))
        rows.append(
            {
                "model": network.name,
                "date": surroundings()["date"],
                "input": network.side,
                "weights": "random" if network.weights is None else network.weights.name,
                "budget_percent": percent,
                "divisor": outcome.divisor,
                "searches": len(outcome.trials),
                "removed_blocks": len(found.architecture.removed_blocks),
                "macs_percent": 100 * found.cost.macs / found.original.macs,
                "healed_accuracy": outcome.repaired,
                "first_prediction_error": fit.scale * first["predicted_s"] / (first["of_the_bound"] * limit) - 1,
                "original_ms": 1e3 * proof.before.median,
                "proof_ms": 1e3 * proof.after.median,
                "proof_quartiles_ms": [1e3 * proof.after.lower, 1e3 * proof.after.upper],
                "speedup": proof.speedup.median,
                "speedup_quartiles": [proof.speedup.lower, proof.speedup.upper],
                "of_the_bound_percent": 100 * used(budget, proof),
                "speedup_per_macs_reduction": proof.speedup.median * found.cost.macs / found.original.macs,
                "load": proof.load,
                "fit_largest_error": fit.to_json()["largest_error"],
                "fit_mean_error": fit.to_json()["mean_error"],
                "trials": outcome.trials,
            }
        )
        print({key: value for key, value in rows[-1].items() if key != "trials"}, flush=True)
    return rows


def of_random(model: nn.Module, graph: ChannelGraph, target: Remembering, images: Tensor, budget: Budget) -> Outcome:
    """Search for uniform widths with one divisor."""
    strategy = WithinLatency(Uniform(L2()), target, one_divisor=True)
    batches = [(images, torch.zeros(len(images), dtype=torch.int64))]
    result = search_architecture(model, graph, strategy, budget=budget, batches=batches, space=SPACE)
    noted: Any = result.notes["latency"]
    small = apply_architecture(model, graph, result.architecture)
    return Outcome(result, small, noted["divisor"], noted["trials"])


def of_trained(model: nn.Module, budget: Budget) -> Outcome:
    """What the product makes of it, before any training."""
    data = load_data(str(CIFAR10), seed=0)
    recovery, run = RecoveryConfig(TrainConfig(epochs=0)), RunConfig(callbacks=Silent())
    result = compress(model, data, budget, recovery=recovery, run=run)
    noted: Any = result.search.notes["latency"]
    repaired = result.report.steps[-1].score.value
    return Outcome(result.search, result.model, noted["divisor"], noted["trials"], repaired)


def as_text(record: dict[str, Any]) -> str:
    rows = record["rows"]
    shown = [
        [
            f"{row['model']} ({row['input']})",
            f"{row['budget_percent']} %",
            f"{row['proof_ms']:.3g} of {row['original_ms']:.3g} ms",
            f"{row['proof_quartiles_ms'][0]:.3g} to {row['proof_quartiles_ms'][1]:.3g}",
            f"{row['of_the_bound_percent']:.1f} %",
            f"{row['speedup']:.2f}",
            f"{row['macs_percent']:.1f} %",
            f"{100 * row['speedup_per_macs_reduction']:.0f} %",
            f"{row['divisor']}" + (f", {row['removed_blocks']} blocks fewer" if row["removed_blocks"] else ""),
            f"{100 * row['healed_accuracy']:.1f} %" if row.get("healed_accuracy") else "",
            f"{row['searches']}",
            f"{100 * row['first_prediction_error']:+.1f} %",
        ]
        for row in rows
    ]
    header = ["Network (input)", "Budget", "Proven median", "Quartiles, ms", "Of the bound", "Speed-up", "MACs left",
              "Speed-up of what MACs promise", "Divisor", "Accuracy, repaired", "Searches",
              "First prediction off by"]  # fmt: skip
    models = {row["model"]: row for row in rows}
    errors = [
        [name, f"{100 * row['fit_largest_error']:.1f} %", f"{100 * row['fit_mean_error']:.1f} %"]
        for name, row in models.items()
    ]
    return "\n".join(
        [
            "# Latency budgets",
            "",
            f"{record['date']}, commit {record['commit']}, `{record['command']}`, {record['cpu']}, "
            f"{record['cores']} cores, ONNX Runtime on the CPU, one thread, batch 1, processor time. Load average "
            f"{record['load_average']} before, {record['load_average_after']} after. PyTorch "
            f"{record['versions']['torch']}. ResNet-20 is trained (91.7 % of the test images) and cut by "
            "`secateur.compress` without its recovery. The others have random weights, and uniform widths.",
            "",
            "Proven: 50 alternating pairs in sessions of their own, after the search. The speed-up that the MACs "
            "promise is MACs before / after.",
            "",
            table(header, shown),
            "Error of the table against five whole models each, every one predicted from a fit to the other four:",
            "",
            table(["Network", "Largest", "Mean"], errors),
        ]
    )


if __name__ == "__main__":
    main()
