"""Classification with one label per image, and with several."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.distill.logit_losses import kd_loss, label_loss
from secateur.errors import TrainingError
from secateur.tasks.base import Meter, Metric, Score, Task, main_output

TOP1 = Metric("top-1 accuracy")
"""The fraction of images whose highest logit is the label's."""


@dataclass(frozen=True)
class Classification(Task):
    """One class per image: cross-entropy, and top-1 accuracy.

    Labels are class indices (batch,), or probabilities (batch, classes) of mixed images.

    Attributes:
        label_smoothing: See `label_loss`.
        temperature: See `kd_loss`.
    """

    label_smoothing: float = 0.0
    temperature: float = 4.0
    metric = TOP1

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """See `Task.loss`: `label_loss`, in nats."""
        return label_loss(outputs, targets, smoothing=self.label_smoothing)

    def imitation(self, student: Any, teacher: Any) -> Tensor:
        """See `Task.imitation`: `kd_loss`, in nats."""
        return kd_loss(student, teacher, temperature=self.temperature)

    def meter(self) -> Meter:
        """See `Task.meter`."""
        return _Top1Meter()

    def with_settings(self, *, label_smoothing: float, temperature: float) -> "Classification":
        """See `Task.with_settings`."""
        return replace(self, label_smoothing=label_smoothing, temperature=temperature)


class _Top1Meter(Meter):
    def __init__(self) -> None:
        # Sums stay on the device: reading one for every batch would wait for it every time.
        self._correct: Tensor | None = None
        self._loss: Tensor | None = None
        self._n = 0

    def update(self, outputs: Any, targets: Any) -> None:
        """See `Meter.update`."""
        correct = (outputs.argmax(1) == targets).sum()
        loss = F.cross_entropy(outputs.float(), targets, reduction="sum")
        self._correct = correct if self._correct is None else self._correct + correct
        self._loss = loss if self._loss is None else self._loss + loss
        self._n += len(targets)

    def compute(self) -> Score:
        """See `Meter.compute`."""
        assert self._correct is not None
        assert self._loss is not None
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


@dataclass(frozen=True)
class MultiLabel(Task):
    """Several classes per image: binary cross-entropy, and the mean over the classes of the average precision.

    Outputs are logits (batch, classes), and targets are 0 or 1 for every class.

    Attributes:
        temperature: Logits of student and teacher are divided by it where they are compared.
    """

    temperature: float = 1.0
    metric = Metric("mean average precision")

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
