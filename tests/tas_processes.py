"""A search by TAS in one process or in two: what both must agree on."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from slow_search import data as noise
from small_runs import launch_two
from swp_processes import count_messages, unnormed
from tas_runs import Net, quick, run, without_dropout
from torch import Tensor

from secateur.cost import Budget, CostModel
from secateur.nas import TAS, OriginalWeights, Supernet, order_by_score
from secateur.nas.common import split_in_half
from secateur.nas.tas_sampler import WidthCandidates, WidthDistribution
from secateur.nas.tas_train import TASStep
from secateur.search import ScoringInputs, SearchContext, SearchSpace
from secateur.train import RunSettings, Trainer, copy_to_device, tensors_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

STEPS = 24

NETS = ("unnormed", "normed")
"""Without batch norms, and with batch norms and removable blocks."""


def net(name: str) -> Net:
    return unnormed() if name == "unnormed" else without_dropout()


def strategy(name: str) -> TAS:
    given: dict[str, Any] = {"depths": None} if name == "unnormed" else {}
    return quick(2, student_weights=OriginalWeights(), **given)


def step_of(given: Net, strategy: TAS, fabric: "Fabric") -> TASStep:
    """A search before its first step."""
    inputs = ScoringInputs(given.model, given.graph, given.batches)
    context = SearchContext(
        inputs, CostModel(given.graph), Budget.parse("macs=50%"), SearchSpace(), lambda _done, _what: None, noise(),
        RunSettings(fabric=fabric),
    )  # fmt: skip
    supernet = Supernet(given.model, given.graph, order_by_score(context.scores(strategy.importance)))
    candidates = WidthCandidates.of(context, strategy.widths, strategy.depths, supernet.mixable)
    config = strategy.search_config(context, candidates, split_in_half(noise().train, 0))
    return TASStep(config, copy_to_device(supernet, fabric.device), WidthDistribution(candidates))


def curve(name: str, fabric: "Fabric") -> tuple[list[list[float]], dict[str, Tensor]]:
    """Losses of some pairs of steps, and weights and alpha after them."""
    step = step_of(net(name), strategy(name), fabric)
    trainer, losses = Trainer(step), list[list[float]]()
    step.begin(0)
    with step.running(0):
        for epoch in range(STEPS // step.steps):
            for batch in step.batches(epoch, 0):
                losses.append([float(loss) for loss in trainer.train_step(batch, 0, 0.05).values()])
    tensors = {**tensors_of(step.supernet), **tensors_of(step.distribution)}
    return losses, {name: tensor.clone() for name, tensor in tensors.items()}


def found(name: str, fabric: "Fabric", folder: Path | None = None) -> Any:
    """A whole search."""
    return run(net(name), strategy(name), fabric=fabric, folder=folder, seed=4)


def _process(fabric: "Fabric", folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    sent, rank, result = count_messages(fabric), fabric.global_rank, dict[str, Any]()
    for name in NETS:
        sent.clear()
        losses, tensors = curve(name, fabric)
        steps = list(sent)
        whole = found(name, fabric, folder / f"{name}-checkpoints")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}-{rank}.safetensors")
        result[name] = {"losses": losses, "sent": steps, "found": whole.to_json()}
    (folder / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    launch_two(_process, Path(sys.argv[1]))
