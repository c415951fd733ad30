"""A student trained by one process or by two: what both must agree on."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from small_runs import Blobs, small_net, small_schedule
from torch import nn

from secateur._runtime import Stopped, stoppable
from secateur.distill import Objective
from secateur.errors import TrainingError
from secateur.train import SGD, CheckpointPolicy, Silent, Trained, fit

if TYPE_CHECKING:
    from lightning_fabric import Fabric

EPOCHS, STEPS = 5, 10
"""50 steps of 16 images."""

NETS = ("normed", "grouped")
"""With batch norms, and with group norms in their places."""


def net(name: str) -> nn.Sequential:
    model = small_net(seed=3)
    if name == "grouped":
        model[1] = nn.GroupNorm(2, 8)
    return model


class Losses:
    """The loss of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self.epochs: list[int] = []

    def watch(self, what: str, *, epochs: int, steps: int, done: int) -> Any:
        from contextlib import nullcontext

        return nullcontext(self)

    def step(self, epoch: int, step: int, numbers: Any) -> None:
        self.found.append(numbers["loss"])

    def epoch(self, epoch: int, numbers: Any, line: str) -> None:
        self.epochs.append(epoch)


def trained(name: str, progress: Any, fabric: "Fabric | None" = None, **more: Any) -> Trained:
    """Distilled from a teacher, with a moving average, clipping and validation images that two do not divide."""
    from secateur.train import trainer as _ledger

    _ledger.SECONDS_PER_LOOK = -1.0
    schedule = small_schedule(
        EPOCHS, batch_size=16, learning_rate=0.1, clip_norm=1.0, ema_decay=0.9, optimizer=SGD(), **more.pop("also", {})
    )
    return fit(
        net(name), more.pop("source", Blobs(16 * STEPS)), schedule=schedule, objective=Objective(0.5, 0.5),
        teacher=small_net(5), validation=Blobs(33, seed=1), progress=progress, fabric=fabric, **more,
    )  # fmt: skip


class Asks(Blobs):
    """Asks the first process to stop in the third epoch's second step."""

    def __init__(self, n: int, stop: Any) -> None:
        super().__init__(n)
        self.stop = stop

    def batches(self, batch_size: int, **settings: Any):
        for step, batch in enumerate(super().batches(batch_size, **settings)):
            if self.stop is not None and (settings["epoch"], step) == (2, 1):
                self.stop.ask()
            yield batch


def _process(fabric: "Fabric", folder: Path) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    rank, result = fabric.global_rank, dict[str, Any]()
    for name in NETS:
        seen = Losses()
        found = trained(name, seen, fabric)
        save_file(
            {k: t.contiguous() for k, t in found.model.state_dict().items()}, folder / f"{name}-{rank}.safetensors"
        )
        result[name] = {
            "losses": seen.found, "shown": seen.epochs, "history": [record.to_json() for record in found.history],
            "best": found.best_epoch,
        }  # fmt: skip
    # Stopped by a request that one process got, and gone on with.
    with stoppable() as stop:
        source = Asks(16 * STEPS, stop if rank == 0 else None)
        try:
            trained("normed", Silent(), fabric, source=source, checkpoint=folder / "run", saving=CheckpointPolicy())
        except Stopped:
            result["stopped"] = sorted(path.name for path in (folder / "run").iterdir())
    fabric.barrier()
    found = trained("normed", Silent(), fabric, checkpoint=folder / "run")
    save_file({k: t.contiguous() for k, t in found.model.state_dict().items()}, folder / f"resumed-{rank}.safetensors")
    fabric.barrier()
    result["refused"] = [
        _refusal(fabric, checkpoint=folder / f"own-{rank}", before=rank == 0),
        _refusal(fabric, remember=folder / "logits"),
        _refusal(fabric, source=Blobs(3), also={"accumulate": 2}),
    ]
    (folder / f"{rank}.json").write_text(json.dumps(result))


def _refusal(fabric: "Fabric", *, before: bool = False, **more: Any) -> str:
    """The message of an error; before, one process may leave a checkpoint that the other does not see."""
    if before:
        from secateur.train import Saved, save_checkpoint
        from secateur.train.config import TrainingTask
        from secateur.train.fit import _settings

        schedule = small_schedule(
            EPOCHS, batch_size=16, learning_rate=0.1, clip_norm=1.0, ema_decay=0.9, optimizer=SGD()
        )
        task = TrainingTask(Blobs(160), Blobs(33), None, Objective(0.5, 0.5), schedule, None, fabric)
        save_checkpoint(more["checkpoint"], Saved(1, {}, {}, _settings(task, net("normed"), small_net(5))))
    try:
        trained("normed", Silent(), fabric, **more)
    except TrainingError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    torch.set_num_threads(1)
    # Forked: two more starts of Python would take most of the time.
    both = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork", plugins=[LightningEnvironment()])
    both.launch(_process, Path(sys.argv[1]))
