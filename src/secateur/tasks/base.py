"""The interface `Task`: what a model's outputs and targets mean, how good they are, and how two models are compared.

Everything else of the package treats outputs and targets as opaque trees of tensors and asks the task.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur._batches import call_model, first_output, float_tensors
from secateur.errors import TrainingError

_Z95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""
SPREAD_FLOOR = 1e-6
"""The lowest spread of a teacher's output, relative to its mean square: a constant output gives a finite loss."""


@dataclass(frozen=True)
class Metric:
    """What a number says about a model.

    Attributes:
        name: Such as ``top-1 accuracy``.
        unit: ``%`` for fractions, which are shown as percentages; otherwise the unit, such as ``dB``; empty for none.
        higher_is_better: False for errors and distances.
        is_share: Whether it is the fraction of the items that are right, for which there is a confidence interval.
    """

    name: str
    unit: str = "%"
    higher_is_better: bool = True
    is_share: bool = False

    @property
    def words(self) -> str:
        """The name as readers know it: top-1 accuracy is accuracy."""
        return "accuracy" if self.is_share else self.name

    def text(self, value: float) -> str:
        """Return a value with its unit: ``91.73 %``, ``31.20 dB``, ``0.0312``."""
        if self.unit == "%":
            return f"{100 * value:.2f} %"
        return f"{value:.2f} {self.unit}" if self.unit else f"{value:.4g}"

    def change(self, before: float, after: float) -> str:
        """Return a difference with its sign and unit: ``-0.31 points``, ``+0.20 dB``, ``+0.0021``."""
        if self.unit == "%":
            return f"{100 * (after - before):+.2f} points"
        return f"{after - before:+.2f} {self.unit}" if self.unit else f"{after - before:+.2g}"

    def key(self, value: float) -> float:
        """Return a number that is higher for better values; the lowest one for NaN."""
        if math.isnan(value):
            return -math.inf
        return value if self.higher_is_better else -value


@dataclass(frozen=True)
class Score:
    """How good a model is on n items.

    Attributes:
        value: The metric; a fraction where its unit is ``%``.
        loss: The mean loss; None where a model in eval mode gives no loss.
        n: Number of items, usually images.
        metric: What ``value`` is.
    """

    value: float
    loss: float | None
    n: int
    metric: Metric

    def __str__(self) -> str:
        return f"{self.metric.name} {self.text} (n = {self.n})"

    @property
    def text(self) -> str:
        """The value with its unit."""
        return self.metric.text(self.value)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval for new items of the same kind, as fractions (Wilson, JASA 1927).

        None for metrics that are not the fraction of the items that are right.
        """
        if not self.metric.is_share:
            return None
        if self.n < 1:
            return 0.0, 1.0
        z2 = _Z95**2 / self.n
        middle = (self.value + z2 / 2) / (1 + z2)
        half = _Z95 / (1 + z2) * math.sqrt(self.value * (1 - self.value) / self.n + z2 / (4 * self.n))
        return middle - half, middle + half


@dataclass(frozen=True, eq=False)
class Drawing:
    """What is drawn of one item's outputs or targets; one of boxes, mask and image is given.

    Attributes:
        boxes: (n, 4) as x1, y1, x2, y2 in pixels of the input.
        labels: (n,) classes of the boxes.
        scores: (n,) of the boxes, or None.
        mask: (height, width) class of every pixel.
        void: Value of pixels of the mask that do not count.
        image: (channels, height, width) in 0...1.
    """

    boxes: Tensor | None = None
    labels: Tensor | None = None
    scores: Tensor | None = None
    mask: Tensor | None = None
    void: int | None = None
    image: Tensor | None = None


class Meter(ABC):
    """Collects the outputs of one pass over a split. A new one is made for every pass.

    Attributes:
        additive: Whether the results of parts of a split can be added, see `sums`. Then several processes measure a
            part each; otherwise each measures everything.
    """

    additive: bool = False

    @abstractmethod
    def update(self, outputs: Any, targets: Any) -> None:
        """Add one batch.

        Args:
            outputs: What the model in eval mode returned for it.
            targets: Its targets, on the same device.
        """

    @abstractmethod
    def compute(self) -> Score:
        """Return the score of everything that was added."""

    def sums(self) -> Tensor | None:
        """Return numbers whose sums over several meters are those of one meter of all batches, as a float64 vector.

        None if there are none, or nothing was added yet.
        """
        return None

    def set_sums(self, sums: Tensor) -> None:
        """Replace the numbers of `sums`."""
        raise NotImplementedError(f"{type(self).__name__} gives no sums.")


class Task(ABC):
    """What a model is trained for. Implementations are frozen dataclasses; fields are configuration.

    A task of your own says what its metric is, gives a loss, and measures:

        @dataclass(frozen=True)
        class Counting(Task):
            metric = Metric("mean error of the count", unit="", higher_is_better=False)

            def loss(self, outputs, targets):
                return F.smooth_l1_loss(outputs.squeeze(1), targets.float())

            def meter(self):
                return MeanMeter(self, lambda outputs, targets: (outputs.squeeze(1) - targets).abs())
    """

    metric: Metric
    needs_targets: ClassVar[bool] = False
    """Whether every batch must have targets."""

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of a batch with its labels: a scalar, a mean over the batch.

        Args:
            outputs: What `train_forward` returned.
            targets: The targets of the batch.
        """

    @abstractmethod
    def meter(self) -> Meter:
        """Return a new meter for one pass over a split."""

    def imitation(self, student: Any, teacher: Any) -> Tensor:
        """Return how far a student's outputs are from a teacher's: a scalar; here `normalized_difference`."""
        return normalized_difference(student, teacher)

    def train_forward(self, model: nn.Module, call: Callable[..., Any], inputs: Any, targets: Any) -> Any:
        """Run a model for a step of training.

        Args:
            model: The student in train mode, or its teacher in eval mode.
            call: Runs the model in the number formats of the training; takes what its forward takes.
            inputs: The inputs of a batch.
            targets: Its targets, for models that compute their own losses.
        """
        del model, targets
        return call_model(call, inputs)

    def drawing(self, outputs: Any, item: int) -> Drawing | None:
        """Return what a report draws of one item of the outputs in eval mode; None draws nothing."""
        del outputs, item

    def target_drawing(self, targets: Any, item: int) -> Drawing | None:
        """Return what a report draws of one item of the targets; None draws nothing."""
        del targets, item

    def blank_targets(self, inputs: Any) -> Any:
        """Return targets for models that need some in train mode, where there are none; here None.

        Args:
            inputs: The inputs of a batch.
        """
        del inputs

    def observe_(self, model: nn.Module) -> None:  # noqa: B027 - most models return what is compared
        """Make a model return what is compared in searches and repairs, where it returns something else."""

    def unobserve_(self, model: nn.Module) -> None:  # noqa: B027
        """Undo `observe_`, also on a copy or a cut of the model."""

    def check(self, outputs: Any, targets: Any, *, name: str = "model") -> None:  # noqa: B027 - most tasks check nothing
        """Refuse outputs and targets that the task is not for.

        Args:
            outputs: What a model returned.
            targets: The targets of the same batch.
            name: The argument that the model was given as, for the message.

        Raises:
            TrainingError: With the way out.
        """

    def check_targets(self, inputs: Any, targets: Any) -> None:
        """Refuse the targets of a batch that cannot be, whatever a model returns; here only that there are none.

        Args:
            inputs: The inputs of the batch.
            targets: Its targets.

        Raises:
            TrainingError: With the way out.
        """
        del inputs
        if targets is None and self.needs_targets:
            raise TrainingError(
                f"`data` must give targets for {type(self).__name__}; got inputs alone. Let every batch be a pair "
                "(inputs, targets) or a mapping with labels, or compress without labels by task=Imitation()."
            )

    def with_settings(self, *, label_smoothing: float, temperature: float) -> "Task":
        """Return the task with settings of the losses of classifiers; other tasks have none."""
        del label_smoothing, temperature
        return self


class MeanMeter(Meter):
    """The mean of a number per item.

    Args:
        task: Its metric is reported, and its loss where it can be computed from outputs in eval mode.
        values: Returns (items,) numbers of outputs and targets.
        transform: Applied to the mean, such as a square root; None leaves it.
    """

    additive = True

    def __init__(self, task: Task, values: Any, transform: Any = None) -> None:
        self._task, self._values, self._transform = task, values, transform
        self._sums: Tensor | None = None

    def update(self, outputs: Any, targets: Any) -> None:
        """See `Meter.update`."""
        values, loss = self._values(outputs, targets), self._task.loss(outputs, targets)
        if values.ndim != 1 or loss.ndim:
            raise TrainingError(
                f"`task` must measure one number for every item, and give one loss for a batch; "
                f"{type(self._task).__name__} gave numbers of shape {tuple(values.shape)} and a loss of shape "
                f"{tuple(loss.shape)}. Take means over everything but the items, and over all of the loss."
            )
        loss = loss.double() * len(values)
        count = torch.tensor(float(len(values)), dtype=torch.float64, device=values.device)
        new = torch.stack([values.double().sum(), loss, count])
        self._sums = new if self._sums is None else self._sums + new

    def compute(self) -> Score:
        """See `Meter.compute`."""
        assert self._sums is not None
        total, loss, n = self._sums.tolist()
        mean = total / n
        return Score(mean if self._transform is None else self._transform(mean), loss / n, round(n), self._task.metric)

    def sums(self) -> Tensor | None:
        """See `Meter.sums`."""
        return self._sums

    def set_sums(self, sums: Tensor) -> None:
        """See `Meter.set_sums`."""
        self._sums = sums


def main_output(outputs: Any, name: str = "model") -> Tensor:
    """Return the tensor that losses and metrics of one output read: the outputs themselves, or their first tensor.

    Raises:
        TrainingError: If there is no floating-point tensor.
    """
    first = first_output(outputs)
    if first is None:
        raise TrainingError(f"`{name}` must return a floating-point tensor; got {type(outputs).__name__}.")
    return first


def normalized_difference(student: Any, teacher: Any) -> Tensor:
    """Compare outputs tensor by tensor, each in units of the teacher's spread, so that units do not matter.

    The mean over the floating-point tensors of  mean((s - t)^2) / (mean((t - mean_batch(t))^2) + 1e-6 * mean(t^2)).

    Args:
        student: A tree of tensors.
        teacher: A tree of the same shapes; no gradient flows into it.

    Returns:
        A scalar, dimensionless, float32 or better.

    Raises:
        TrainingError: If the trees do not have tensors of the same shapes.
    """
    ours, theirs = float_tensors(student), float_tensors(teacher)
    shapes = [tuple(tensor.shape) for tensor in ours], [tuple(tensor.shape) for tensor in theirs]
    if not ours or shapes[0] != shapes[1]:
        raise TrainingError(
            f"`student` and `teacher` must return tensors of the same shapes; got {shapes[0]} and {shapes[1]}. "
            "Pass a task that knows what to compare."
        )
    parts: list[Tensor] = []
    for one, other in zip(ours, theirs, strict=True):
        wanted = other.detach().to(torch.promote_types(other.dtype, torch.float32))
        # Of a single item there is no spread over the batch: the spread of its own values takes its place.
        center = wanted.mean(0, keepdim=True) if len(wanted) > 1 else wanted.mean()
        spread = (wanted - center).square().mean() + SPREAD_FLOOR * wanted.square().mean() + 1e-30
        parts.append((one.to(wanted.dtype) - wanted).square().mean() / spread)
    return torch.stack(parts).mean()
