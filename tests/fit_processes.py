"""A student trained by one process or by two: what both must agree on."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from small_runs import Blobs, fit_small, launch_two, small_config, small_net, steep_net
from torch import nn

from secateur.distill import Objective
from secateur.errors import TrainingError
from secateur.train import SGD, CheckpointPolicy, Silent, Stopped, Trained, callbacks, stoppable

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

    def start(self, loop: str, *, epochs: int, steps: int, done: int) -> Any:
        from contextlib import nullcontext

        return nullcontext(self)

    def step(self, epoch: int, step: int, numbers: Any) -> None:
        self.found.append(numbers["loss"])

    def epoch(self, epoch: int, numbers: Any, line: str) -> None:
        self.epochs.append(epoch)


def trained(name: str, shown: Any, fabric: "Fabric | None" = None, **more: Any) -> Trained:
    """Distilled from a teacher, with a moving average, clipping and validation images that two do not divide."""
    callbacks.SECONDS_PER_LOOK = -1.0
    schedule = small_config(
        EPOCHS, batch_size=16, learning_rate=0.1, clip_norm=1.0, ema_decay=0.9, optimizer=SGD(), **more.pop("also", {})
    )
    return fit_small(
        net(name), more.pop("source", Blobs(16 * STEPS)), train=schedule, objective=Objective(0.5, 0.5),
        teacher=small_net(5), validation=Blobs(33, seed=1), callbacks=shown, fabric=fabric, **more,
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
            trained("normed", Silent(), fabric, source=source, folder=folder / "run", checkpoints=CheckpointPolicy())
        except Stopped:
            result["stopped"] = sorted(path.name for path in (folder / "run").iterdir())
    fabric.barrier()
    found = trained("normed", Silent(), fabric, folder=folder / "run")
    save_file({k: t.contiguous() for k, t in found.model.state_dict().items()}, folder / f"resumed-{rank}.safetensors")
    fabric.barrier()
    if rank == 0:  # Only one process finds a checkpoint in its folder.
        shutil.copytree(folder / "run", folder / "own-0")
    result["refused"] = [
        _refusal(fabric, folder=folder / f"own-{rank}"),
        _refusal(fabric, teacher_cache=folder / "logits"),
        _refusal(fabric, source=Blobs(3), also={"accumulate": 2}),
    ]
    # Their clocks let them read the losses in different steps, and all the same they must begin again together.
    callbacks.SECONDS_PER_LOOK = -1.0 if rank == 0 else math.inf
    config = small_config(2, learning_rate=300.0, warmup_fraction=0.0, restarts=2)
    again = fit_small(
        steep_net(), Blobs(16 * STEPS), train=config, objective=Objective.of_labels(), validation=Blobs(33, seed=1),
        fabric=fabric, folder=folder / "again",
    )  # fmt: skip
    result["again"] = {"divergences": again.divergences, "losses": [record.train_loss for record in again.history]}
    (folder / f"{rank}.json").write_text(json.dumps(result))


def _refusal(fabric: "Fabric", **more: Any) -> str:
    """The message of an error."""
    try:
        trained("normed", Silent(), fabric, **more)
    except TrainingError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    launch_two(_process, Path(sys.argv[1]))
