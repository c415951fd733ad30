"""A tiny problem, net, split and schedule for the tests of the training engine."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.distill import Objective
from secateur.train import SGD, Batches, Precision, RunSettings, Silent, TrainConfig, Trained, fit

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CPU = torch.device("cpu")
LABELS_ONLY = Objective.of_labels()


class Blobs:
    """Noise images whose mean tells the class; a `Batches` that knows nothing of the data room.

    Augmentation adds a constant, so that a test can see that it arrived.
    """

    def __init__(self, n: int, seed: int = 0, classes: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, classes, (n,), generator=generator)
        noise = torch.randn(n, 3, 8, 8, generator=generator)
        self.images = noise + (self.labels - 1)[:, None, None, None] * 0.5
        self.calls: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        batch_size: int,
        *,
        device: torch.device,
        seed: int | None = None,
        epoch: int = 0,
        augment: Any = None,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        self.calls.append({"seed": seed, "epoch": epoch, "augment": augment, "drop_last": drop_last, "start": start})
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for rows in order.split(batch_size)[start:]:
            if drop_last and len(rows) < batch_size:
                return
            yield self.images[rows].to(device) + (augment or 0), self.labels[rows].to(device)


def small_net(seed: int = 0, *, dropout: float = 0.0, width: int = 8, classes: int = 3) -> nn.Sequential:
    """Convolution, batch norm, pooling, dropout, linear; the caller's random state is not touched."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(width, classes),
        )


def steep_net() -> nn.Sequential:
    """Without a norm, so that a high rate makes it explode."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 3),
        )  # fmt: skip


def small_config(epochs: int = 2, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"batch_size": 16, "precision": Precision.FLOAT32, "optimizer": SGD()}
    return TrainConfig(epochs, **(settings | changes))


def with_run(**settings: Any) -> dict[str, Any]:
    """Arguments of a training in which those that are fields of `RunSettings` become ``run``; silent by default."""
    names = {field.name for field in fields(RunSettings)} & settings.keys()
    run = RunSettings(**({"callbacks": Silent()} | {name: settings.pop(name) for name in names}))
    return {**settings, "run": run}


def fit_small(student: nn.Module, source: Batches, **settings: Any) -> Trained:
    """`fit`, with the fields of `RunSettings` as arguments of their own."""
    return fit(student, source, **with_run(**settings))


def launch_two(process: Callable[["Fabric", Path], None], folder: Path) -> None:
    """Run a function in two processes that are connected by gloo."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    torch.set_num_threads(1)
    # Forked: two more starts of Python would take most of the time.
    both = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork", plugins=[LightningEnvironment()])
    both.launch(process, folder)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def accepts(split: Batches) -> int:
    """Has the type checker compare the class above with the protocol."""
    return len(split)


class Killed(BaseException):
    """Stands for a signal: nothing catches it."""


class Fragile(Blobs):
    """Dies before a step of an epoch, both from 0: the second, if nothing else is said."""

    def __init__(self, n: int, epoch: int, step: int = 1) -> None:
        super().__init__(n)
        self.epoch, self.step = epoch, step

    def batches(self, batch_size: int, **settings: Any):
        for step, batch in enumerate(super().batches(batch_size, **settings), settings.get("start", 0)):
            if (settings["epoch"], step) == (self.epoch, self.step):
                raise Killed
            yield batch
