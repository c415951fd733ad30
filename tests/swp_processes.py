"""A supernet without batch norms, trained by one process or by two: what a step of both must agree on."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from slow_search import data as noise
from small_runs import launch_two
from swp_runs import options_of, quick, quick_config
from tas_runs import Net
from torch import Tensor, nn

from secateur.graph import trace
from secateur.nas import InPlace, OriginalWeights, SandwichSampler, Supernet
from secateur.nas.swp_train import SupernetStep, SWPSearchConfig
from secateur.search import search_architecture
from secateur.train import RunSettings, Silent, Trainer, tensors_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CUTS = ("3",)
STEPS = 24


def unnormed() -> Net:
    """Four convolutions and a head: nothing is normalized over the batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = nn.Sequential(
            nn.Conv2d(3, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
        ).eval()  # fmt: skip
    batches = tuple(noise().train.batches(16, device=torch.device("cpu")))[:2]
    return Net(model, trace(model, torch.zeros(1, 3, 8, 8)), batches)


def curve(fabric: "Fabric") -> tuple[list[list[float]], dict[str, Tensor]]:
    """Losses of some steps, and the weights after them."""
    given = unnormed()
    options = options_of(given, cuts=CUTS)
    supernet = Supernet(given.model, given.graph).train()
    images = noise().train
    config = SWPSearchConfig(options, SandwichSampler(2), InPlace(), images, None, quick_config(), fabric)
    step, losses = SupernetStep(config, supernet), list[list[float]]()
    trainer = Trainer(step)
    step.begin(0)
    for epoch in range(STEPS // 4):
        for batch in images.batches(16, device=fabric.device, seed=0, epoch=epoch):
            losses.append([float(loss) for loss in trainer.train_step(batch, len(losses), 0.05).values()])
    return losses, {name: tensor.clone() for name, tensor in tensors_of(supernet).items()}


def found(fabric: "Fabric", folder: Path | None = None) -> Any:
    """A whole search."""
    given, strategy = unnormed(), quick(2, cuts=CUTS, student_weights=OriginalWeights())
    return search_architecture(
        given.model, given.graph, strategy, budget="macs=50%", batches=given.batches,
        data=noise(), run=RunSettings(folder=folder, callbacks=Silent(), fabric=fabric),
    )  # fmt: skip


def count_messages(fabric: "Fabric") -> list[int]:
    """The sizes of all tensors that processes exchange from now on."""
    sent: list[int] = []
    all_reduce = fabric.all_reduce

    def counted(data: Tensor, *arguments: Any, **named: Any) -> Any:
        sent.append(data.numel())
        return all_reduce(data, *arguments, **named)

    fabric.all_reduce = counted  # type: ignore[method-assign]
    return sent


def _process(fabric: "Fabric", folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    sent = count_messages(fabric)
    losses, weights = curve(fabric)
    steps = list(sent)
    whole = found(fabric, folder / "checkpoints")
    rank = fabric.global_rank
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / f"{rank}.safetensors")
    result = {"losses": losses, "sent": steps, "found": whole.to_json()}
    (folder / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    launch_two(_process, Path(sys.argv[1]))
