"""Compare the ranking of networks by a supernet with that by retraining: Kendall's tau, for SWP and its ablations.

    python benchmarks/rank.py             # what is missing, then the table
    python benchmarks/rank.py --summary

The model is ResNet-20 on CIFAR-10, from trained weights. 24 networks are drawn from SWP's space, each with 49 to 50 %
of the MACs, so that size alone does not rank them. Each is cut from the original, repaired, and trained for two
epochs on 10,000 training images with distillation; its accuracy on 5,000 validation images is the truth. Every
supernet is trained for two epochs on the same 10,000 images, and scores the networks on 2,000 others. Intervals are
bootstrapped over the networks.

    swp               stages, sandwich, in-place distillation
    without stages    the same for the whole network: one stage, its output against that of the full network
    without sandwich  three random networks per step instead of the full, the smallest and two random ones
    without in-place  one stage, the labels
    autoslim          one stage, sandwich, soft labels of the full network: the training of AutoSlim
    untrained         the original's weights: stages, no training

Losses of stages are weighted by their effect at the output; results with plain sums are shown too. (The weights were
introduced when 15 networks had been retrained and the plain sum had ranked them badly; the other nine are shown too.)
"""

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from _record import CIFAR10, RESULTS, WEIGHTS, surroundings, table, write_record
from scipy.stats import kendalltau

from secateur.architecture import Architecture
from secateur.cost import Budget, CostModel
from secateur.data import ImageData, draw_calibration, load_data
from secateur.distill import AlignedFeatures, Objective
from secateur.graph import ChannelGraph, find_stages, trace
from secateur.models import load_model
from secateur.nas import SWP, Labels, RandomSampler, SoftLabels, Supernet, Widths, order_by_score
from secateur.nas.common import set_aside
from secateur.nas.swp import CandidateScorer, held_out_losses
from secateur.nas.swp_candidates import CandidateSpace
from secateur.nas.swp_train import SupernetStep, SWPSearchConfig
from secateur.prune import RecalibrateBatchNorm, Refit, cut
from secateur.search import Reconstruction, ScoringInputs, SearchContext, SearchSpace
from secateur.train import (
    RunSettings,
    Silent,
    TrainConfig,
    Trainer,
    copy_to_device,
    evaluate,
    open_fabric,
    train_with_teacher,
)

NETWORKS = 24
IMAGES = 10_000
EPOCHS = 2
SPACE = SearchSpace(min_kept_fraction=0.25)
ALIGNED = Objective(kd_weight=0.9, label_weight=0.1, feature_weight=10.0)
VARIANTS = {
    "swp": SWP(),
    "without stages": SWP(cuts=()),
    "without sandwich": SWP(sampler=RandomSampler(3)),
    "without in-place": SWP(cuts=(), supervision=Labels()),
    "autoslim": SWP(cuts=(), supervision=SoftLabels()),
    "untrained": SWP(),
}
TITLE = """# Supernets as judges: ResNet-20 at 50 % of its MACs, CIFAR-10

**What this does not show:** that SWP's training makes the proxy rank well, as the paper claims. The untrained proxy
ranks as well as SWP's, and whole networks better; the intervals overlap widely, and each kind is one supernet. The
benchmark is to be run again with the last weights and three supernets of each kind.

The weights of swp, without sandwich and untrained are those of the commit in their records, measured with the full
net's running statistics; the script now measures them with the batch's (docs/log.md) and writes these lines again."""
Batches = tuple[tuple[torch.Tensor, torch.Tensor], ...]


class Bench:
    """The model, the data, and the networks to rank."""

    def __init__(self) -> None:
        self.data: ImageData = load_data(str(CIFAR10), seed=0)
        self.model, _ = load_model("cifar_resnet20", weights=WEIGHTS / "cifar10_resnet20.safetensors")
        self.batches: Batches = draw_calibration(self.data.train, 1024, device=torch.device("cpu"), seed=0)
        self.graph: ChannelGraph = trace(self.model, self.batches[0][0][:1])
        inputs = ScoringInputs(self.model, self.graph, self.batches)
        self.problem = SearchContext(inputs, CostModel(self.graph), Budget(macs="50%"), SPACE, lambda *_: None)
        self.scores = self.problem.scores(Reconstruction())
        rest, self.aside = set_aside(self.data.train, 2000, 0)
        # About every fourth image: enough to train on, and none of those used for scoring.
        self.images = rest.subset(torch.arange(0, len(rest), len(rest) // IMAGES)[:IMAGES])  # type: ignore[attr-defined]
        self.options = CandidateSpace.of(self.problem, find_stages(self.model, self.graph), Widths(), None)
        self.networks = self._drawn()

    def _drawn(self) -> list[Any]:
        draw, found = np.random.default_rng(0), list[Any]()
        while len(found) < NETWORKS:
            rows = self.options.sample(draw)
            widths, _ = self.options.network_sizes(rows)
            if 0.98 <= float(self.problem.utilization(widths[None])[0]) <= 1:
                found.append(rows)
        return found

    def supernet(self) -> Supernet:
        """Return a supernet with the original's weights."""
        return Supernet(self.model, self.graph, order_by_score(self.scores))


def retrained(bench: Bench, number: int) -> dict[str, Any]:
    """Retrain one network and return its accuracy."""
    architecture: Architecture = bench.supernet().architecture(bench.options.subnet(bench.networks[number]))
    images = [images for images, _ in bench.batches]
    done = cut(bench.model, bench.graph, architecture, calibration=images, repairs=(Refit(), RecalibrateBatchNorm()))
    began = time.process_time()
    trained = train_with_teacher(
        done.model,
        teacher=bench.model,
        data=replace(bench.data, train=bench.images),  # type: ignore[arg-type]
        train=TrainConfig(epochs=EPOCHS, learning_rate=0.02, seed=number),
        objective=ALIGNED,
        alignment=AlignedFeatures.of(done.graph, done.architecture),
        run=RunSettings(callbacks=Silent()),
    )
    last = trained.history[-1].validation_score
    return {
        "number": number,
        "widths": dict(architecture.widths),
        "macs": bench.problem.costs.cost(architecture).macs / bench.problem.costs.original.macs,
        "repaired": evaluate(done.model, bench.data.validation).value,
        "retrained": last,
        "cpu_seconds": round(time.process_time() - began, 1),
        "surroundings": surroundings(),
    }


def judged(bench: Bench, variant: str) -> dict[str, Any]:
    """Train a supernet in one way and return its scores of all networks."""
    strategy, fabric = VARIANTS[variant], open_fabric(None, device=torch.device("cpu"))
    stages = find_stages(bench.model, bench.graph, strategy.cuts)
    options = CandidateSpace.of(bench.problem, stages, strategy.widths, strategy.depths)
    supernet = copy_to_device(bench.supernet(), fabric.device)
    train = replace(strategy.train, epochs=EPOCHS)
    step = SupernetStep(
        SWPSearchConfig(
            options, strategy.sampler, strategy.supervision, bench.images, bench.data.augment, train, fabric
        ),
        supernet,
    )
    trainer = Trainer(step)
    began = time.process_time()
    if variant != "untrained":
        with Silent().start("search", epochs=EPOCHS, steps=step.steps, done=0) as callbacks:
            while trainer.epoch < EPOCHS:
                trainer.train_epoch(callbacks)
    trained = time.process_time() - began
    began = time.process_time()
    judge = CandidateScorer.of(
        supernet,
        stages=stages,
        supervision=strategy.supervision,
        calibration=[images for images, _ in bench.batches[:4]],
        images=bench.aside,
        fabric=fabric,
    )
    draw = np.random.default_rng(1)
    judge = judge.weighted([options.subnet(options.sample(draw)) for _ in range(16)])
    losses = held_out_losses(judge, [bench.options.subnet(rows) for rows in bench.networks])
    return {
        "variant": variant,
        "losses": losses.sum(1).tolist(),
        "weights": np.asarray(judge.weights).tolist(),
        "stages": (losses / np.asarray(judge.weights)).tolist(),
        "fairness": step.counts.fairness,
        "training": trainer.history,
        "cpu_seconds_of_training": round(trained, 1),
        "cpu_seconds_of_judging": round(time.process_time() - began, 1),
        "surroundings": surroundings(),
    }


def tau_of(losses: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Return Kendall's tau of -loss and accuracy, and its 95 % interval by bootstrap."""
    draw = np.random.default_rng(0)
    samples: list[float] = []
    for _ in range(2000):
        taken = draw.integers(0, len(truth), len(truth))
        samples.append(float(kendalltau(-losses[taken], truth[taken]).statistic))
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return float(kendalltau(-losses, truth).statistic), float(low), float(high)


def _taus(losses: np.ndarray, truth: np.ndarray) -> list[str]:
    """Return tau for all networks with its interval, and tau for the last ones."""
    tau, low, high = tau_of(losses, truth)
    last, _, _ = tau_of(losses[_LAST], truth[_LAST])
    return [f"**{tau:.2f}**", f"{low:.2f} to {high:.2f}", f"{last:.2f}"]


_LAST = list(range(11, 20))
"""Retrained when all else had been decided."""


def read(name: str) -> dict[str, Any] | None:
    """Read an existing record."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def summary() -> str:
    """Write all records as one table."""
    found = [read(f"rank/network{number:02}") for number in range(NETWORKS)]
    known = [record for record in found if record is not None]
    truth = np.array([record["retrained"] for record in known])
    numbers = [record["number"] for record in known]
    rows: list[list[str]] = []
    for variant in VARIANTS:
        record = read(f"rank/{variant.replace(' ', '-')}")
        if record is not None:
            spent = [f"{record[f'cpu_seconds_of_{what}']:.0f}" for what in ("training", "judging")]
            fairness = f"{record['fairness']:.2f}"
            rows.append([variant, *_taus(np.array(record["losses"])[numbers], truth), fairness, *spent])
            stages = np.array(record["stages"])[numbers]
            if stages.shape[1] > 1:
                rows.append([f"{variant}, plain sum", *_taus(stages.sum(1), truth), "", "", ""])
    # Records of the first release spell "healed".
    repaired = np.array([record.get("repaired", record.get("healed")) for record in known])
    seconds = sum(record["cpu_seconds"] for record in known)
    rows.append(["each cut, repaired, validated", *_taus(-repaired, truth), "", "", ""])
    rows.append(["(each retrained: the truth)", "1", "", "", "", f"{seconds:.0f}", ""])
    of_last = f"of networks {', '.join(map(str, _LAST))}"
    header = ["proxy", "Kendall's tau", "95 % interval", of_last, "fairness", "training, CPU s", "judging, CPU s"]
    spread = f"Retrained accuracy of the {len(known)} networks: {100 * truth.min():.1f} to {100 * truth.max():.1f} %.\n"
    return table(header, rows) + "\n" + spread


def main() -> None:
    """Run missing records and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", action="store_true", help="only print and write the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.summary:
        bench = Bench()
        for variant in VARIANTS:
            name = f"rank/{variant.replace(' ', '-')}"
            if read(name) is None:
                write_record(name, judged(bench, variant))
                print(name, flush=True)
        for number in range(NETWORKS):
            name = f"rank/network{number:02}"
            if read(name) is None:
                record = retrained(bench, number)
                write_record(name, record)
                print(name, record["repaired"], record["retrained"], record["cpu_seconds"], flush=True)
    (RESULTS / "rank.md").write_text(f"{TITLE}\n\n{summary()}")
    print(summary())


if __name__ == "__main__":
    main()
