"""Measure candidates scored per second: all stages in one pass, against whole subnets built and scored one by one.

    python benchmarks/swp_scoring.py

Both use the same images of CIFAR-10 (batch norms are measured on some of them, the loss on others) in the same
precision, with one thread, in turns; times are medians of rounds, in processor seconds. One by one: the subnet is cut
out as a separate model, its batch norms are measured, and it is evaluated. In one pass: `held_out_losses`, which needs
the full network once for every eight networks. A network is one candidate of every stage, so that one pass scores as
many candidates as the model has stages. The stages are those that are found, and finer ones, one for every residual
block or group of blocks (`--stage-end`).
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from _record import CIFAR10, WEIGHTS, surroundings, table, write_record
from torch import Tensor, nn

from secateur.cost import Budget, CostModel
from secateur.data import ImageData, draw_calibration, load_data
from secateur.graph import ChannelGraph, find_stages, trace
from secateur.models import load_model
from secateur.nas import InPlace, Subnet, Supernet, Widths, order_by_score
from secateur.nas.swp import CandidateScorer, held_out_losses
from secateur.nas.swp_candidates import CandidateSpace
from secateur.search import L2, ScoringInputs, SearchContext, SearchSpace
from secateur.train import Precision, channels_last, copy_to_device, open_fabric

NETWORKS = 8
Pair = tuple[Tensor, Tensor]


def model_of(name: str) -> nn.Module:
    """Return a network for images of 32 x 32 pixels and ten classes; the CIFAR ResNets are trained."""
    if name.startswith("cifar_"):
        model, _ = load_model(name, weights=WEIGHTS / f"{name.replace('cifar_', 'cifar10_')}.safetensors")
        return model.eval()
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=10).eval()


def blockwise(model: nn.Module, graph: ChannelGraph) -> tuple[str, ...]:
    """List the modules that end a residual block or a stage and can end a stage of the search."""
    named = dict(model.named_modules())
    wanted = [block.name for block in graph.blocks if block.name in named]
    found: list[str] = []
    for name in wanted:
        try:
            find_stages(model, graph, (*found, name))
        except Exception:
            continue
        found.append(name)
    return tuple(found[:-1])


def one_by_one(judge: CandidateScorer, subnets: list[Subnet]) -> list[float]:
    """Return the cross-entropy of every subnet on the held-out images."""
    losses: list[float] = []
    for subnet in subnets:
        model = judge.supernet.extract(subnet)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=judge.precision is Precision.BF16_MIXED):
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.reset_running_stats()
                    module.momentum = None
            model.train()
            for images in judge.calibration:
                model(images)
            model.eval()
            parts = [float(F.cross_entropy(model(images).float(), labels)) for images, labels in judge.held_out]
        losses.append(statistics.mean(parts))
    return losses


class _Held:
    """Batches of a fixed split, in the form that the scorer reads."""

    def __init__(self, batches: tuple[Pair, ...]):
        self._images = torch.cat([images for images, _ in batches])
        self._labels = torch.cat([labels for _, labels in batches])

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, size: int, **_: Any) -> Any:
        return zip(self._images.split(size), self._labels.split(size), strict=True)


def run(name: str, fine: bool, data: ImageData, precision: Precision, rounds: int) -> dict[str, Any]:
    """Measure both ways to score the same networks, in turns."""
    model = model_of(name)
    batches = draw_calibration(data.train, 1500, device=torch.device("cpu"), seed=0, batch_size=250)
    graph = trace(model, batches[0][0][:1])
    stages = find_stages(model, graph, blockwise(model, graph) if fine else None)
    inputs = ScoringInputs(model, graph, batches)
    space = SearchSpace(min_kept_fraction=0)
    problem = SearchContext(inputs, CostModel(graph), Budget(macs="50%"), space, lambda *_: None)
    options = CandidateSpace.of(problem, stages, Widths(), None)
    supernet = copy_to_device(Supernet(model, graph, order_by_score(L2().scores(inputs))), torch.device("cpu"))
    fabric = open_fabric(precision, device=torch.device("cpu"))
    images = [channels_last(images) for images, _ in batches[:2]]
    held: Any = _Held(batches[2:])
    judge = CandidateScorer.of(
        supernet, stages=stages, supervision=InPlace(), calibration=images, images=held, fabric=fabric
    )
    draw = np.random.default_rng(0)
    subnets = [options.subnet(options.sample(draw)) for _ in range(NETWORKS)]
    ways = {"in one pass": lambda: held_out_losses(judge, subnets), "one by one": lambda: one_by_one(judge, subnets)}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, judged in ways.items():
            began = time.process_time()
            judged()
            seconds[way].append(time.process_time() - began)
    free = sum(len(stage.max_numbers) > 0 for stage in options.of_stage)
    medians = {way: statistics.median(found) for way, found in seconds.items()}
    rates = {"in one pass": free * NETWORKS / medians["in one pass"], "one by one": NETWORKS / medians["one by one"]}
    return {
        "model": name,
        "stages": len(stages),
        "stages_with_a_choice": free,
        "precision": precision.name,
        "seconds": seconds,
        "candidates_per_second": rates,
        "ratio": rates["in one pass"] / rates["one by one"],
        "ends": [stage.cut for stage in stages],
    }


def main() -> None:
    """Run everything and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cifar_resnet20", "cifar_resnet56", "mobilenetv2_050"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data(str(CIFAR10), limit=3000, seed=0)
    records: list[dict[str, Any]] = []
    for name in arguments.models:
        for fine in (False, True):
            record = run(name, fine, data, Precision.BF16_MIXED, arguments.rounds)
            records.append(record)
            print({key: value for key, value in record.items() if key not in ("seconds", "ends")}, flush=True)
    path = write_record("swp_scoring", {"runs": records, "surroundings": surroundings()})
    header = ["model", "stages", "with a choice", "candidates/s in one pass", "subnets/s one by one", "ratio"]
    rows = [
        [
            r["model"],
            str(r["stages"]),
            str(r["stages_with_a_choice"]),
            f"{r['candidates_per_second']['in one pass']:.1f}",
            f"{r['candidates_per_second']['one by one']:.1f}",
            f"**{r['ratio']:.1f}**",
        ]
        for r in records
    ]
    title = "# Candidates judged per second, 1,500 images of CIFAR-10, bfloat16, one thread\n\n"
    path.with_suffix(".md").write_text(title + table(header, rows))
    print(table(header, rows))


if __name__ == "__main__":
    main()
