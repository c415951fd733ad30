"""A target with a clock of its own: whatever takes time there takes what a formula says."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from secateur._runtime import Clock
from secateur.cost import LayerShape, Target


def by_parameters(model: nn.Module, inputs: Sequence[torch.Tensor]) -> float:
    """As many hundredths of a second for each sample as the model has parameters."""
    return 0.01 * sum(p.numel() for p in model.parameters()) * len(inputs[0])


def no_layers(shape: LayerShape) -> float:
    raise NotImplementedError(shape)


@dataclass(frozen=True)
class Pretend(Target):
    """Passes and layers take what two functions say.

    Attributes:
        whole: Seconds of a pass of a model over some inputs.
        layer: Seconds of a layer alone.
        played: What each pass took, in order.
        timed: The layers that were timed, in order.
    """

    whole: Callable[[nn.Module, Sequence[torch.Tensor]], float] = by_parameters
    layer: Callable[[LayerShape], float] = no_layers
    threads: int = 1
    batch: int = 1
    now: list[float] = field(default_factory=lambda: [0.0])
    played: list[float] = field(default_factory=list)
    timed: list[LayerShape] = field(default_factory=list)

    @property
    def runtime(self) -> str:
        return "pretend 1"

    @property
    def clock(self) -> Clock:
        return Clock("pretended time", lambda: self.now[0])

    @contextmanager
    def opened(self, model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Generator:
        seconds = self.whole(model, inputs)

        def run() -> None:
            self.played.append(seconds)
            self.now[0] += seconds

        yield run

    def layer_seconds(self, shape: LayerShape) -> float:
        self.timed.append(shape)
        return self.layer(shape)
