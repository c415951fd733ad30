"""Imitation: no labels at all; a student learns the original's outputs, and is measured by its distance from them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur._batches import float_tensors
from secateur._kinds import settings
from secateur.errors import TrainingError
from secateur.tasks.base import Drawing, Meter, Metric, Score, Task


@settings
class Imitation(Task):
    """Come as near to the original's outputs as possible; only inputs are needed.

    The targets of a batch are the original's outputs for it.

    Attributes:
        like: A task whose way of running models and of comparing their outputs is used: Detection() compares the heads
            of detectors; None compares each tensor in units of its spread.
    """

    like: Task | None = None
    metric = Metric("distance from the original's outputs", "", higher_is_better=False)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """See `Task.loss`: the same as `imitation`, because the targets are the original's outputs."""
        return self.imitation(outputs, targets)

    def imitation(self, student: Any, teacher: Any) -> Tensor:
        """See `Task.imitation`."""
        return super().imitation(student, teacher) if self.like is None else self.like.imitation(student, teacher)

    def train_forward(self, model: nn.Module, call: Callable[..., Any], inputs: Any, targets: Any) -> Any:
        """See `Task.train_forward`: as the other task does, with blank targets."""
        if self.like is None:
            return super().train_forward(model, call, inputs, targets)
        return self.like.train_forward(model, call, inputs, self.like.blank_targets(inputs))

    def observe_(self, model: nn.Module) -> None:
        """See `Task.observe_`: as the other task does."""
        if self.like is not None:
            self.like.observe_(model)

    def unobserve_(self, model: nn.Module) -> None:
        """See `Task.unobserve_`."""
        if self.like is not None:
            self.like.unobserve_(model)

    def drawing(self, outputs: Any, item: int) -> Drawing | None:
        """See `Task.drawing`: as the other task does; without one, outputs that are images."""
        if self.like is not None:
            return self.like.drawing(outputs, item)
        tensors = float_tensors(outputs)
        if len(tensors) != 1 or tensors[0].ndim != 4 or tensors[0].shape[1] not in (1, 3):
            return None
        return Drawing(image=tensors[0][item])

    def meter(self) -> Meter:
        """See `Task.meter`."""
        return DistanceMeter(self.metric)

    def check(self, outputs: Any, targets: Any, *, name: str = "model") -> None:
        """See `Task.check`: the outputs must be those of the original in number and shape."""
        shapes = [[tuple(tensor.shape) for tensor in float_tensors(tree)] for tree in (outputs, targets)]
        if not shapes[0] or shapes[0] != shapes[1]:
            raise TrainingError(
                f"`{name}` must return tensors of the original's shapes, {shapes[1]}; got {shapes[0]}. For a model "
                "that returns lists of detections, use Imitation(like=Detection())."
            )


class DistanceMeter(Meter):
    """The mean over the output tensors of  sum (s - t)^2 / sum (t - mean(t))^2, over all items of a pass.

    The mean of t is taken over the items, for every element. 0 is equality; 1 is as far as a model is that always
    returns the mean output.
    """

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._errors: list[Tensor] = []
        self._firsts: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._n = 0

    def update(self, outputs: Any, targets: Any) -> None:
        """See `Meter.update`."""
        pairs = list(zip(float_tensors(outputs), float_tensors(targets), strict=True))
        if not self._n:
            # Sums of squares lose digits where the mean is far from zero, so one item is taken off first.
            self._firsts = [wanted[:1].double() for _, wanted in pairs]
            self._errors = [torch.zeros((), dtype=torch.float64, device=wanted.device) for _, wanted in pairs]
            self._sums = [torch.zeros_like(first) for first in self._firsts]
            self._squares = [torch.zeros_like(error) for error in self._errors]
        for i, (found, wanted) in enumerate(pairs):
            centered = wanted.double() - self._firsts[i]
            self._errors[i] += (found.double() - wanted.double()).square().sum()
            self._sums[i] += centered.sum(0, keepdim=True)
            self._squares[i] += centered.square().sum()
        self._n += len(pairs[0][1])

    def compute(self) -> Score:
        """See `Meter.compute`."""
        spreads = [
            (square - (total.square().sum() / self._n)).clamp_min(1e-30)
            for square, total in zip(self._squares, self._sums, strict=True)
        ]
        value = float(torch.stack([e / s for e, s in zip(self._errors, spreads, strict=True)]).mean())
        return Score(value, value, self._n, self._metric)
