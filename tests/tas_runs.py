"""A tiny net, a tiny set of images and a quick search for the tests of TAS; also the process that gets killed."""

import copy
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from slow_search import data as noise
from small_runs import with_run
from torch import Tensor, nn

from secateur.data import ImageData
from secateur.graph import ChannelGraph, trace, untie
from secateur.nas import TAS, Depths, SupernetWeights
from secateur.search import L2, SearchResult, Strategy, search_architecture
from secateur.train import SGD, Precision, TrainConfig

__all__ = ["Interrupted", "Net", "Recorder", "Stopped", "net", "noise", "quick", "run"]


class Block(nn.Module):
    """Two convolutions with batch norms and an addition."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Small(nn.Sequential):
    """A stem, residual blocks, dropout and a head."""

    def __init__(self, blocks: int = 3):
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            *(Block(16, 20) for _ in range(blocks)),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(16, 4),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Net:
    model: nn.Module
    graph: ChannelGraph
    batches: tuple[tuple[Tensor, Tensor], ...]


def net(*, untied: bool = False, blocks: int = 3) -> Net:
    """The net, its graph and two batches of its training images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Small(blocks).eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    batches = tuple(noise().train.batches(16, device=torch.device("cpu")))[:2]
    return Net(model, untie(model, graph) if untied else graph, batches)


def without_dropout() -> Net:
    """The net without dropout, which several processes draw each for itself."""
    given = net(blocks=2)
    model = copy.deepcopy(given.model)
    model[-2] = nn.Identity()
    return Net(model, trace(model, torch.zeros(1, 3, 8, 8)), given.batches)


def quick(epochs: int = 2, **fields: Any) -> TAS:
    """Both widths and depths, in half a second."""
    schedule = TrainConfig(
        epochs, batch_size=16, learning_rate=0.05, optimizer=SGD(), precision=Precision.FLOAT32, warmup_fraction=0
    )
    given: dict[str, Any] = {
        "train": schedule,
        "importance": L2(),
        "depths": Depths(),
        "student_weights": SupernetWeights(),
    }
    return TAS(**(given | fields))


class Interrupted(Exception):  # noqa: N818 -- no error
    """Stands for whatever ends a process."""


@dataclass
class Recorder:
    """Notes what it is shown, and may raise."""

    steps: list[tuple[int, int, dict[str, float]]] = field(default_factory=list)
    epochs: list[tuple[int, dict[str, float], str]] = field(default_factory=list)
    opened: list[dict[str, Any]] = field(default_factory=list)
    at_step: Callable[[int, int], None] | None = None
    at_epoch: Callable[[int], None] | None = None

    @contextmanager
    def start(self, loop: str, *, epochs: int, steps: int, done: int) -> Iterator["Recorder"]:
        self.opened.append({"what": loop, "epochs": epochs, "steps": steps, "done": done})
        yield self

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        self.steps.append((epoch, step, dict(numbers)))
        if self.at_step is not None:
            self.at_step(epoch, step)

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        self.epochs.append((epoch, dict(numbers), line))
        if self.at_epoch is not None:
            self.at_epoch(epoch)


class Stopped(Recorder):
    """Raises at the end of one epoch, before its checkpoint is written."""

    def __init__(self, epoch: int):
        super().__init__(at_epoch=lambda now: self._stop(now, epoch))

    @staticmethod
    def _stop(now: int, epoch: int) -> None:
        if now == epoch:
            raise Interrupted


def run(
    given: Net,
    strategy: Strategy,
    *,
    budget: str = "macs=50%",
    data: ImageData | None = None,
    **settings: Any,
) -> SearchResult:
    """Search; the fields of `RunSettings` are arguments of their own."""
    settings = {"batches": given.batches, "data": noise() if data is None else data, **with_run(**settings)}
    return search_architecture(given.model, given.graph, strategy, budget=budget, **settings)


@dataclass(frozen=True)
class _KilledSplit:
    """A split whose process is killed in the middle of an epoch."""

    split: Any
    epoch: int
    after: int

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> Tensor:
        return self.split.labels

    def subset(self, index: Tensor) -> "_KilledSplit":
        return replace(self, split=self.split.subset(index))

    def batches(self, batch_size: int, **settings: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self.split.batches(batch_size, **settings), settings.get("start", 0)):
            if settings.get("epoch") == self.epoch and number == self.after:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def _main(folder: Path, untied: bool, kill: tuple[int, int] | None) -> None:
    """Search with checkpoints, and write what was found."""
    from safetensors.torch import save_file

    data = noise()
    if kill is not None:
        data = replace(data, train=_KilledSplit(data.train, *kill))  # type: ignore[arg-type]
    found = run(net(untied=untied), quick(3), data=data, folder=folder / "checkpoints", seed=4)
    assert found.weights is not None
    save_file({name: tensor.contiguous() for name, tensor in found.weights.items()}, folder / "weights.safetensors")
    (folder / "found.json").write_text(json.dumps(found.architecture.to_json()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _main(
        Path(sys.argv[1]), sys.argv[2] == "untied", (int(sys.argv[3]), int(sys.argv[4])) if len(sys.argv) > 3 else None
    )
