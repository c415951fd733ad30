"""A strategy that takes long and trains: it stands for any such, without the time."""

import os
import signal
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.data import Augment, ImageData, MemorySplit, Normalization
from secateur.search import Proposal, SearchContext, SearchHistory, Strategy, Uniform
from secateur.train import Checkpoint, load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class SlowSearch(Strategy):
    """Each "epoch" adds noise of its own to the weights and leaves a checkpoint; widths are uniform.

    In the epoch that the environment names in ``DIE_IN`` the process is killed, before it can leave a checkpoint.

    Attributes:
        epochs: Of the search.
    """

    epochs: int

    def weights(self, model: nn.Module, seed: int) -> dict[str, Tensor]:
        """What the search makes of a model's weights."""
        tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        for epoch in range(1, self.epochs + 1):
            _train_(tensors, seed, epoch)
        return tensors

    def find(self, problem: SearchContext) -> Proposal:
        assert problem.training is not None
        state = problem.inputs.model.state_dict()
        tensors = {name: tensor.detach().clone() for name, tensor in state.items()}
        settings = {"epochs": str(self.epochs), "axes": ", ".join(problem.costs.axes)}
        saved = None if problem.run.folder is None else load_checkpoint(problem.run.folder, settings)
        done = 0
        if saved is not None:
            done, tensors = saved.epoch, dict(saved.tensors)
        with problem.run.callbacks.start("search", epochs=self.epochs, steps=1, done=done) as meter:
            for epoch in range(done + 1, self.epochs + 1):
                _train_(tensors, problem.inputs.seed, epoch)
                if os.environ.get("DIE_IN") == str(epoch):
                    os.kill(os.getpid(), signal.SIGKILL)
                meter.step(epoch, 1, {"loss": 1 / epoch})
                meter.epoch(epoch, {"entropy": 1 / epoch}, f"search {epoch}/{self.epochs}")
                if problem.run.folder is not None:
                    save_checkpoint(problem.run.folder, Checkpoint(epoch, tensors, {}, settings))
        notes = [
            {"epoch": epoch, "entropy": 0.5**epoch, "widths": {axis: [8.0, 8] for axis in problem.costs.axes}}
            for epoch in range(1, self.epochs + 1)
        ]
        records = {"search": notes}
        history = SearchHistory.of_records(records, problem.inputs.graph.sizes, problem.costs.original.macs)
        return Proposal(Uniform().find(problem).architecture, records, tensors, history)


def _train_(tensors: dict[str, Tensor], seed: int, epoch: int) -> None:
    draw = torch.Generator().manual_seed(100 * seed + epoch)
    for _, tensor in sorted(tensors.items()):
        if tensor.is_floating_point():
            tensor.add_(0.05 * tensor.abs() * torch.rand(tensor.shape, generator=draw))


def data() -> ImageData:
    """Four classes of noise."""
    usual = Normalization.default(3)
    return ImageData(
        train=_split(64, 0), validation=_split(16, 1), test=_split(32, 2), classes=("a", "b", "c", "d"),
        mean=usual.mean, std=usual.std, size=(3, 8, 8), name="noise", augment=Augment(padding=1),
    )  # fmt: skip


def _split(n: int, seed: int) -> MemorySplit:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 8, 8), generator=draw, dtype=torch.uint8)
    return MemorySplit(images, torch.arange(n) % 4, Normalization.default(3))


def model() -> nn.Sequential:
    """Two convolutions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
        )  # fmt: skip
