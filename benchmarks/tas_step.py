"""Measure the cost of a TAS search step against an ordinary training step of the same network, in turns.

    python benchmarks/tas_step.py

ResNet-56, batches of 64 images of CIFAR's shape, one thread, all precisions that this machine computes in. Times are
processor seconds, the median of rounds in which every kind of step runs once. An ordinary step is forward, backward and
SGD of the full network. A search alternates two kinds of step on separate batches: one of the weights (forward and
backward of the two widths that are drawn, SGD) and one of the choice (forward, backward to the logits, the expected
cost, Adam). Peak memory is the most memory that tensors occupy at once.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _record import surroundings, table, write_record
from torch.profiler import ProfilerActivity, profile

from secateur.cost import Budget, CostModel
from secateur.graph import trace
from secateur.models import cifar_resnet56
from secateur.nas import TAS, Interpolate, Supernet, WidthExpansion, ZeroPad, order_by_score
from secateur.nas.tas_sampler import WidthCandidates, WidthDistribution
from secateur.nas.tas_train import TASStep
from secateur.search import L2, ScoringInputs, SearchContext, SearchSpace
from secateur.train import (
    Precision,
    RunSettings,
    TrainConfig,
    best_precision,
    channels_last,
    copy_to_device,
    open_fabric,
)

BATCH = 64
TEMPERATURE = 5.0


class Steps:
    """One step of each kind, which can be called repeatedly."""

    def __init__(self, precision: Precision, blending: WidthExpansion):
        torch.manual_seed(0)
        self._fabric = open_fabric(precision, device=torch.device("cpu"))
        self._batch = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
        model = cifar_resnet56().eval()
        graph = trace(model, self._batch[0][:2])
        self._full = copy_to_device(model, self._fabric.device).train()
        self._sgd = TrainConfig(epochs=1).optimizer.build(self._full, 0.01)
        inputs = ScoringInputs(model, graph, ((self._batch),))
        space = SearchSpace(min_kept_fraction=0)
        problem = SearchContext(inputs, CostModel(graph), Budget(macs="50%"), space, lambda *_: None)
        supernet = Supernet(model, graph, order_by_score(L2().scores(inputs)))
        strategy = TAS(expansion=blending)
        candidates = WidthCandidates.of(problem, strategy.widths, strategy.depths, supernet.mixable)
        context = replace(problem, run=RunSettings(fabric=self._fabric))
        config = strategy.search_config(context, candidates, (_Images(), _Images()))
        self._step = TASStep(
            config, copy_to_device(supernet, self._fabric.device).train(), WidthDistribution(candidates)
        )
        self._step.noise.manual_seed(0)
        self._step.learners["supernet"].set_learning_rate(0.01)

    def ordinary(self) -> None:
        """Make a training step of the full network."""
        self._sgd.zero_grad()
        with self._fabric.autocast():
            logits = self._full(channels_last(self._batch[0]))
        self._fabric.backward(F.cross_entropy(logits.float(), self._batch[1]))
        self._sgd.step()

    def weights(self) -> None:
        """Make a search step of the weights."""
        self._step.update_weights(*self._batch, TEMPERATURE)

    def choice(self) -> None:
        """Make a search step of the choice."""
        self._step.update_alpha(*self._batch, TEMPERATURE)

    @property
    def kinds(self) -> dict[str, Callable[[], None]]:
        """Return every kind of step by name."""
        return {"ordinary": self.ordinary, "weights": self.weights, "choice": self.choice}


class _Images:
    """A data set of which only the length is used."""

    def __len__(self) -> int:
        return BATCH

    def batches(self, *_: Any, **__: Any) -> Any:
        """Yield nothing."""
        return iter(())


def times(steps: Steps, rounds: int) -> dict[str, list[float]]:
    """Return the processor seconds of each kind of step, in turns."""
    found: dict[str, list[float]] = {kind: [] for kind in steps.kinds}
    for number in range(rounds + 1):
        for kind, step in steps.kinds.items():
            began = time.process_time()
            step()
            if number:  # The first round warms up.
                found[kind].append(time.process_time() - began)
    return found


def peak(steps: Steps, kind: str) -> float:
    """Return the peak MiB of tensors during five steps, beyond those that existed before."""
    steps.kinds[kind]()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        for _ in range(5):
            steps.kinds[kind]()
    events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])
    return float(alive.max()) / 2**20


BLENDINGS: dict[str, WidthExpansion] = {"fade": ZeroPad(), "interpolate": Interpolate()}


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    records: list[dict[str, Any]] = []
    for precision in dict.fromkeys((best_precision(torch.device("cpu")), Precision.FLOAT32)):
        for name, blending in BLENDINGS.items():
            steps = Steps(precision, blending)
            found = times(steps, arguments.rounds)
            memory = {kind: peak(steps, kind) for kind in found}
            record = {"precision": precision.value, "blending": name, "seconds": found, "peak_mib": memory}
            records.append(record)
            rows.append(_row(record))
            print(rows[-1], flush=True)
    header = ["precision", "blending", "ordinary, s", "weights, s", "choice, s", "weights / ordinary",
              "choice / ordinary", "mean of the two", "peak memory, ratios"]  # fmt: skip
    path = write_record("tas_step", {"runs": records, "surroundings": surroundings()})
    title = "# A search step of TAS and an ordinary training step, ResNet-56, batch 64, one thread\n\n"
    path.with_suffix(".md").write_text(title + table(header, rows))
    print(table(header, rows))


def _row(record: dict[str, Any]) -> list[str]:
    medians = {kind: statistics.median(seconds) for kind, seconds in record["seconds"].items()}
    base, memory = medians["ordinary"], record["peak_mib"]
    ratios = [medians[kind] / base for kind in ("weights", "choice")]
    return [
        record["precision"],
        record["blending"],
        *(f"{seconds:.3f}" for seconds in medians.values()),
        *(f"{ratio:.2f}" for ratio in ratios),
        f"**{statistics.mean(ratios):.2f}**",
        ", ".join(f"{memory[kind] / memory['ordinary']:.2f}" for kind in ("weights", "choice")),
    ]


if __name__ == "__main__":
    main()
