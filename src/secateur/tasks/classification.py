"""Classification with one label per image, and with several."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur._batches import first_output
from secateur._kinds import settings
from secateur.distill.logit_losses import kd_loss, label_loss
from secateur.errors import TrainingError
from secateur.tasks.base import Meter, Metric, Score, Task, main_output

TOP1 = Metric("top-1 accuracy", is_share=True)
"""The fraction of images whose highest logit is the label's."""


@settings
class Classification(Task):
    """One class per image: cross-entropy, and top-1 accuracy.

    Outputs are logits (batch, classes), or a tree whose first floating-point tensor is that, such as what the models of
    transformers return. Labels are class indices (batch,), or probabilities (batch, classes) of mixed images.

    Attributes:
        label_smoothing: See `label_loss`.
        temperature: See `kd_loss`.
    """

    label_smoothing: float = 0.0
    temperature: float = 4.0
    metric = TOP1
    needs_targets = True

    def train_forward(self, model: nn.Module, call: Callable[..., Any], inputs: Any, targets: Any) -> Any:
        """See `Task.train_forward`: of an object with logits, those alone, as losses take them."""
        outputs = super().train_forward(model, call, inputs, targets)
        first = None if isinstance(outputs, Tensor) else first_output(outputs)
        return outputs if first is None or first.ndim != 2 else first

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """See `Task.loss`: `label_loss`, in nats."""
        return label_loss(main_output(outputs), targets, smoothing=self.label_smoothing)

    def imitation(self, student: Any, teacher: Any) -> Tensor:
        """See `Task.imitation`: `kd_loss`, in nats."""
        return kd_loss(main_output(student, "student"), main_output(teacher, "teacher"), temperature=self.temperature)

    def meter(self) -> Meter:
        """See `Task.meter`."""
        return _Top1Meter()

    def check(self, outputs: Any, targets: Any, *, name: str = "model") -> None:
        """See `Task.check`."""
        check_logits(outputs, len(targets), name)
        check_targets(targets, main_output(outputs).shape[1])

    def with_settings(self, *, label_smoothing: float, temperature: float) -> "Classification":
        """See `Task.with_settings`."""
        return replace(self, label_smoothing=label_smoothing, temperature=temperature)


class _Top1Meter(Meter):
    additive = True

    def __init__(self) -> None:
        # Sums stay on the device: reading one for every batch would wait for it every time.
        self._correct: Tensor | None = None
        self._loss: Tensor | None = None
        self._range: tuple[Tensor, Tensor] | None = None
        self._n = self._classes = 0

    def update(self, outputs: Any, targets: Any) -> None:
        """See `Meter.update`.

        Raises:
            TrainingError: If the outputs are no logits, or the targets no classes of theirs.
        """
        check_logits(outputs, len(targets))
        logits = main_output(outputs)
        labels = class_indices(targets, len(logits))
        self._classes = logits.shape[1]
        low, high = torch.aminmax(labels)
        if self._range is None:  # Looking at labels waits for the device: that is done for the first batch, and last.
            check_range(low, high, self._classes)
            self._range = low, high
        self._range = torch.minimum(self._range[0], low), torch.maximum(self._range[1], high)
        correct = (logits.argmax(1) == labels).sum()
        # A label out of range would stop a GPU for good, before it is refused.
        loss = F.cross_entropy(logits.float(), labels.clamp(0, self._classes - 1), reduction="sum")
        self._correct = correct if self._correct is None else self._correct + correct
        self._loss = loss if self._loss is None else self._loss + loss
        self._n += len(labels)

    def compute(self) -> Score:
        """See `Meter.compute`.

        Raises:
            TrainingError: If a target was no class of the outputs.
        """
        assert self._correct is not None
        assert self._loss is not None
        if self._range is not None:
            check_range(*self._range, self._classes)
        return Score(self._correct.item() / self._n, self._loss.item() / self._n, self._n, TOP1)

    def sums(self) -> Tensor | None:
        """See `Meter.sums`: in float64, where counts of images are exact."""
        if self._correct is None or self._loss is None:
            return None
        count = torch.tensor(float(self._n), dtype=torch.float64, device=self._loss.device)
        return torch.stack([self._correct.double(), self._loss.double(), count])

    def set_sums(self, sums: Tensor) -> None:
        """See `Meter.set_sums`."""
        self._correct, self._loss, self._n = sums[0], sums[1], round(float(sums[2]))


OTHER_TASK = (
    "For other targets give the task that they are for, such as task=MultiLabel(), Regression() or one of your own."
)
"""What to do with targets that are no classes, for messages."""


def check_logits(outputs: object, images: int, name: str = "model") -> None:
    """Refuse a model that does not give logits.

    Args:
        outputs: What it returned.
        images: Number of images it was given.
        name: The argument that the model is, for the message.

    Raises:
        TrainingError: If the shape is not (images, classes).
    """
    first = first_output(outputs)
    shape = None if first is None else tuple(first.shape)
    if shape is None or len(shape) != 2 or shape[0] != images:
        got = shape if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TrainingError(
            f"`{name}` must return logits of the shape (batch, classes), here ({images}, classes); "
            f"got {got}. Wrap the model so that its forward returns the logits, alone or first. "
            "For other outputs give the task that they are for, such as task=Segmentation() or one of your own."
        )


def class_indices(labels: Tensor, images: int) -> Tensor:
    """Return labels that are class indices as int64, or refuse them; their values are not looked at.

    Raises:
        TrainingError: If they are not integers, one for each image.
    """
    if labels.shape != (images,) or labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise TrainingError(
            f"`labels` must be class indices, integers of the shape ({images},); got {_described(labels)}. {OTHER_TASK}"
        )
    return labels.long()


def _described(labels: Tensor) -> str:
    """Type and shape of labels, and what kind of target they seem to be."""
    found = f"{str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}"
    if labels.ndim != 2:
        return found
    if labels.shape[1] == 1:
        return f"{found}: one column" + ("" if labels.is_floating_point() else " (call .squeeze(1))")
    sums = labels.double().sum(1)
    return f"{found}, whose rows sum to {float(sums.min()):.4g}...{float(sums.max()):.4g}"


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are not classes of the model; waits for the device.

    Raises:
        TrainingError: If they are not one integer for each image, or one is negative or too high.
    """
    check_range(*torch.aminmax(class_indices(labels, len(labels))), classes)


def check_range(low: Tensor, high: Tensor, classes: int) -> None:
    """Refuse labels from ``low`` to ``high`` that are not classes of the model; waits for the device.

    Raises:
        TrainingError: If the lowest is negative or the highest too high.
    """
    lowest, highest = (int(bound) for bound in torch.stack((low, high)).tolist())
    if lowest < 0 or highest >= classes:
        raise TrainingError(
            f"`labels` must lie in 0...{classes - 1}, the model's classes; got {lowest}...{highest}. "
            "Use a model with as many classes as the data."
        )


_SUM_TOLERANCE = 1e-3
"""How far the probabilities of an image may be from 1 in sum: half precision has three digits."""


def check_targets(labels: Tensor, classes: int) -> None:
    """Refuse labels of training images that are neither class indices nor probabilities; waits for the device.

    Raises:
        TrainingError: See `check_labels`; or if there is not one probability for every class, or the probabilities of
            an image are negative or do not sum to 1.
    """
    if not labels.is_floating_point():
        check_labels(labels, classes)
        return
    if labels.ndim == 2 and labels.shape[1] > 1 and labels.shape[1] != classes:
        raise TrainingError(
            f"`labels` of mixed images must be probabilities of the model's {classes} classes; got the shape "
            f"{tuple(labels.shape)}. Use a model with as many classes as the data."
        )
    off = (labels.double().sum(-1) - 1).abs().amax() if labels.ndim == 2 else torch.inf
    # Written so that NaN is refused too.
    if labels.ndim != 2 or not float(off) <= _SUM_TOLERANCE or not float(labels.amin()) >= -_SUM_TOLERANCE:
        raise TrainingError(
            "`labels` must be class indices, integers of the shape (batch,), or probabilities of the shape "
            f"(batch, classes) whose rows sum to 1; got {_described(labels)}. {OTHER_TASK}"
        )


def count_correct(logits: Tensor, labels: Tensor) -> Tensor | None:
    """Count the images whose highest logit is the label's (of a mixed image, the likeliest label's), on the device.

    Returns:
        None if the labels are neither one class nor one row of probabilities for each image.
    """
    best = labels.argmax(1) if labels.is_floating_point() and labels.shape == logits.shape else labels
    if best.shape != logits.shape[:1] or best.is_floating_point():
        return None
    return (logits.argmax(1) == best).sum()


@settings
class MultiLabel(Task):
    """Several classes per image: binary cross-entropy, and the mean over the classes of the average precision.

    Outputs are logits (batch, classes), and targets are 0 or 1 for every class.

    Attributes:
        temperature: Logits of student and teacher are divided by it where they are compared.
    """

    temperature: float = 1.0
    metric = Metric("mean average precision")
    needs_targets = True

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """See `Task.loss`: the mean binary cross-entropy, in nats."""
        return F.binary_cross_entropy_with_logits(main_output(outputs).float(), targets.float())

    def imitation(self, student: Any, teacher: Any) -> Tensor:
        """See `Task.imitation`: T^2 * the mean over images and classes of KL(teacher || student), in nats."""
        ours = main_output(student, "student").float() / self.temperature
        theirs = main_output(teacher, "teacher").detach().float() / self.temperature
        wanted = theirs.sigmoid()
        # The entropy of the teacher is taken off, so that the loss is 0 where both agree.
        entropy = F.binary_cross_entropy_with_logits(theirs, wanted)
        return (F.binary_cross_entropy_with_logits(ours, wanted) - entropy) * self.temperature**2

    def meter(self) -> Meter:
        """See `Task.meter`."""
        return _PrecisionMeter(self)

    def check(self, outputs: Any, targets: Any, *, name: str = "model") -> None:
        """See `Task.check`."""
        logits = main_output(outputs, name)
        if logits.ndim != 2 or tuple(targets.shape) != tuple(logits.shape):
            raise TrainingError(
                f"`labels` of several classes must have the shape of the logits, {tuple(logits.shape)}; got "
                f"{tuple(targets.shape)}. One column for each class holds 0 or 1."
            )
        low, high = (float(bound) for bound in torch.stack(torch.aminmax(targets.float())).tolist())
        if low < 0 or high > 1:
            raise TrainingError(f"`labels` of several classes must be 0 or 1; got values from {low:g} to {high:g}.")


class _PrecisionMeter(Meter):
    def __init__(self, task: MultiLabel) -> None:
        self._task = task
        self._scores: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._loss = 0.0
        self._n = 0

    def update(self, outputs: Any, targets: Any) -> None:
        """See `Meter.update`."""
        logits = main_output(outputs)
        self._scores.append(logits.float().sigmoid().cpu())
        self._targets.append(targets.round().long().cpu())
        self._loss += float(self._task.loss(outputs, targets)) * len(logits)
        self._n += len(logits)

    def compute(self) -> Score:
        """See `Meter.compute`: over the classes that some image has."""
        from torchmetrics.functional.classification import multilabel_average_precision

        scores, targets = torch.cat(self._scores), torch.cat(self._targets)
        present = targets.any(0)
        value = 0.0
        if bool(present.any()):
            scores, targets = scores[:, present], targets[:, present]
            value = float(multilabel_average_precision(scores, targets, num_labels=scores.shape[1]))
        return Score(value, self._loss / self._n, self._n, self._task.metric)
