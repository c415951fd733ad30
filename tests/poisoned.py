"""Images and layers that make a training diverge, for tests of how it stops."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from slow_search import data as noise
from torch import Tensor, nn


@dataclass(frozen=True)
class Poisoned:
    """A split of which one batch of one epoch is not finite."""

    split: Any
    epoch: int
    step: int

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> Tensor:
        return self.split.labels

    def subset(self, index: Tensor) -> "Poisoned":
        return replace(self, split=self.split.subset(index))

    def batches(self, batch_size: int, **settings: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for number, (images, labels) in enumerate(self.split.batches(batch_size, **settings), 1):
            bad = settings.get("epoch") == self.epoch - 1 and number == self.step
            yield images * (float("nan") if bad else 1), labels


def poisoned(epoch: int, step: int) -> Any:
    """The noise images with one batch that is not finite."""
    return replace(noise(), train=Poisoned(noise().train, epoch, step))  # type: ignore[arg-type]


class Exploding(nn.Module):
    """A factor of 1 whose gradient is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.factor.requires_grad:
            self.factor.register_hook(lambda gradient: gradient * float("inf"))
        return x * self.factor
