"""Latency budgets of 75, 50 and 35 % on four networks: are they met, and what is the prediction worth?

Only latency is measured, so weights are random and nothing is trained: widths are uniform, channels are those of
largest L2 norm, and the divisor of 8, 16 and 32 is the one that keeps most MACs within the bound by the table. Where
widths alone cannot meet a bound, residual blocks go too. Every bound is proved by a measurement of its own, in
alternating pairs.

    OMP_NUM_THREADS=1 python benchmarks/latency.py [NAME...]
"""

import json
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from _record import RESULTS, surroundings, table, write_record
from torch import Tensor, nn

from secateur.cost import Budget
from secateur.errors import BudgetError
from secateur.export import eval_copy, feed, onnx_bytes, open_session
from secateur.graph import trace
from secateur.importance import L2
from secateur.latency import LatencyFit, OnnxRuntime, measure_pairs
from secateur.models import load_model
from secateur.pipeline._on_time import _roomiest
from secateur.pipeline._timed import Timed, Trial, limit_of, spaces_of, used
from secateur.search import Found, SearchSpace, Shallower, Strategy, Uniform, search
from secateur.surgery import apply_architecture

MODELS = (
    ("ResNet-20", "cifar_resnet20", 32),
    ("ResNet-18", "torchvision:resnet18", 224),
    ("MobileNetV2", "timm:mobilenetv2_100", 224),
    ("EfficientNet-B0", "timm:efficientnet_b0", 224),
)
BUDGETS = (75, 50, 35)
SPACE = SearchSpace(min_kept_fraction=0.25)
WIDTHS, DEPTH = Uniform(L2()), Shallower(Uniform(L2()), images=8, heal=())


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
    torch.set_num_threads(1)
    begun = surroundings()
    wanted = sys.argv[1:]
    for name, spec, size in MODELS:
        if not wanted or name in wanted:
            found = of_model(name, spec, size)
            kept = [row for row in known_rows() if row["model"] != name]
            order = [model for model, _, _ in MODELS]
            rows = sorted([*kept, *found], key=lambda row: (order.index(row["model"]), -row["budget_percent"]))
            record = {**begun, "load_average_after": surroundings()["load_average"], "weights": "random", "rows": rows}
            path = write_record("latency", record)
            (RESULTS / "latency.md").write_text(as_text(record))
            print(path, flush=True)


def known_rows() -> list[dict[str, Any]]:
    """Those of the last record: networks can be measured again one by one."""
    path = RESULTS / "latency.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def of_model(name: str, spec: str, size: int) -> list[dict[str, Any]]:
    model, _ = load_model(spec, seed=0)
    model.eval()
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    graph = trace(model, images[:1])
    target = Remembering()
    began = time.perf_counter()
    spaces = spaces_of(SPACE, graph)
    fit = Timed(model, graph, target, images[:1], Budget(latency="50%"), None, print).fit(spaces[0])
    seconds = time.perf_counter() - began
    rows = []
    for percent in BUDGETS:
        budget = Budget(latency=f"{percent}%")
        timed = Timed(model, graph, target, images[:1], budget, None, print)
        within = Budget(latency=limit_of(budget, float(fit.measured[0])))
        space = _roomiest(model, graph, within, spaces, fit)
        trials, strategy = found_within(timed, images, space, within, fit)
        fitting = [trial for trial in trials if trial.used <= 1]
        best = max(fitting or trials, key=lambda trial: trial.used)
        small = apply_architecture(model, graph, best.found.architecture)
        proof = measure_pairs(model, small, target, images[:1], rounds=50)
        first = trials[0]
        scale = float(fit.measured[0]) / float(fit.model.of_widths(fit.model.sizes[None])[0])
        rows.append(
            {
                "model": name,
                "date": surroundings()["date"],
                "input": size,
                "budget_percent": percent,
                "strategy": strategy,
                "divisor": best.space.divisor,
                "searches": len(trials),
                "removed_blocks": len(best.found.architecture.removed_blocks),
                "macs_percent": 100 * best.found.cost.macs / best.found.original.macs,
                "first_prediction_error": scale * first.predicted / (first.used * limit_of(within, 0)) - 1,
                "original_ms": 1e3 * proof.before.median,
                "proof_ms": 1e3 * proof.after.median,
                "proof_quartiles_ms": [1e3 * proof.after.lower, 1e3 * proof.after.upper],
                "speedup": proof.speedup.median,
                "speedup_quartiles": [proof.speedup.lower, proof.speedup.upper],
                "of_the_bound_percent": 100 * used(budget, proof),
                "speedup_per_macs_reduction": proof.speedup.median * best.found.cost.macs / best.found.original.macs,
                "load": proof.load,
                "fit_largest_error": fit.to_json()["largest_error"],
                "fit_mean_error": fit.to_json()["mean_error"],
                "fit_seconds": seconds,
                "trials": [trial.to_json() for trial in trials],
            }
        )
        print({key: value for key, value in rows[-1].items() if key != "trials"}, flush=True)
    return rows


def found_within(
    timed: Timed, images: Tensor, space: SearchSpace, within: Budget, fit: LatencyFit
) -> tuple[list[Trial], str]:
    """Searches over widths, or, where they cannot meet the bound, over blocks too."""
    batches = [(images, torch.zeros(len(images), dtype=torch.int64))]

    def trials(strategy: Strategy) -> list[Trial]:
        def again(space: SearchSpace, latency: Any) -> Found:
            return search(
                timed.original, timed.graph, strategy, budget=within, batches=batches, space=space, latency=latency
            )

        return list(timed.within(space, fit, again))

    try:
        return trials(WIDTHS), "widths"
    except BudgetError as error:
        print(error)
        return trials(DEPTH), "widths and blocks"


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
            f"{row['searches']}",
            f"{100 * row['first_prediction_error']:+.1f} %",
        ]
        for row in rows
    ]
    header = ["Network (input)", "Budget", "Proven median", "Quartiles, ms", "Of the bound", "Speed-up", "MACs left",
              "Speed-up of what MACs promise", "Divisor", "Searches", "First prediction off by"]  # fmt: skip
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
            f"{record['versions']['torch']}. Weights are random: nothing is trained and no accuracy measured.",
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
