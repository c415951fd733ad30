"""What the student is trained for: an `Objective`, the weighted sum of losses on labels, logits and features.

`Term` makes any function of tensors, also one of the user's own, a part of the sum. `Ensemble` is several teachers as
one.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur._kinds import settings
from secateur.distill.logit_losses import check_positive, check_weight, kd_loss, label_loss, upcast
from secateur.distill.taps import Features, TapRecorder, Taps, record_taps
from secateur.errors import TrainingError

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""A function of a student's and a teacher's tensor that returns a scalar."""


@dataclass(frozen=True)
class BatchOutputs:
    """What a loss may use of one batch: labels, and the logits and features of student and teacher.

    Attributes:
        labels: (batch,) class indices, or probabilities (batch, classes) where images are mixed.
        student_logits: (batch, classes).
        teacher_logits: (batch, classes).
        student: The student's features at the taps of the term, in order.
        teacher: The teacher's features.
    """

    labels: Tensor
    student_logits: Tensor
    teacher_logits: Tensor
    student: tuple[Tensor, ...] = ()
    teacher: tuple[Tensor, ...] = ()


def select_logits(batch: BatchOutputs) -> tuple[Tensor, Tensor]:
    """Return what losses of (student_logits, teacher_logits) need, such as `dist_loss`."""
    return batch.student_logits, batch.teacher_logits


def select_labeled_logits(batch: BatchOutputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return what losses of (student_logits, teacher_logits, labels) need, such as `dkd_loss`."""
    return batch.student_logits, batch.teacher_logits, batch.labels


def select_features(batch: BatchOutputs) -> Features:
    """Return what losses of all tapped features need, such as `MeanOverTaps` and `KnowledgeReview`."""
    return batch.student, batch.teacher


def select_pooled_features(batch: BatchOutputs) -> Features:
    """Return all tapped features averaged over positions, for losses of one vector per image, such as `pkt_loss`."""
    student, teacher = (tuple(map(_pooled, features)) for features in (batch.student, batch.teacher))
    return student, teacher


def _pooled(feature: Tensor) -> Tensor:
    positions = {3: 1, 4: (2, 3)}.get(feature.ndim)
    return feature if positions is None else upcast(feature).mean(positions)


def select_labeled_feature(batch: BatchOutputs) -> tuple[Tensor, Tensor, Tensor]:
    """Return the features of the first tap and the labels, for losses such as `ContrastiveRepresentation`."""
    return batch.student[0], batch.teacher[0], batch.labels


@settings
class Term:
    """One loss of an objective.

        Term("dkd", partial(dkd_loss, beta=2.0), inputs=select_labeled_logits, weight=0.9)
        Term("hint", MeanOverTaps(hint_loss, adaptors), inputs=select_features, weight=10.0, taps={"layer2": "layer2"})

    Attributes:
        name: The name in histories and checkpoints; without dots.
        loss: Returns a scalar for what ``inputs`` selects. If it is a module, its parameters are learned with the
            student (in a copy), and its tensors are part of checkpoints. Parameters that a plain function refers to
            are not learned.
        inputs: Selects what the loss receives of a batch: `select_logits`, `select_labeled_logits`, `select_features`,
            `select_labeled_feature`, `select_pooled_features`, or a function of your own.
        weight: Factor of the loss in the objective, > 0.
        taps: Module names of the student, each with the teacher's; needed by losses on features.
        warmup_fraction: Fraction of the training's steps in which the weight rises linearly from 0, in [0, 1]. The
            reference code of DKD and ReviewKD has 20 of 240 epochs, in steps of an epoch; at the end of every epoch
            the weights are equal.
    """

    name: str
    loss: Callable[..., Tensor]
    inputs: Callable[[BatchOutputs], tuple[Any, ...]] = select_logits
    weight: float = 1.0
    taps: Taps = field(default_factory=dict[str, str])
    warmup_fraction: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_fraction <= 1:
            raise TrainingError(f"`warmup_fraction` must be in [0, 1]; got {self.warmup_fraction}. Use 0 for none.")
        if not self.name or "." in self.name or self.name in {"total", "label", "kd", "feature"}:
            raise TrainingError(
                "`name` must be a word without dots, other than total, label, kd and feature; "
                f"got {self.name!r}. Name the term after its loss, such as 'hint'."
            )
        check_weight("weight", self.weight)
        if not self.weight:
            raise TrainingError(f"`weight` must be positive; got 0 for term {self.name!r}. Leave the term out.")

    def __call__(self, batch: BatchOutputs) -> Tensor:
        """Return the loss of a batch before weighting, a scalar.

        Raises:
            TrainingError: If the loss is not a scalar, or refuses what it is given.
        """
        loss = self.loss(*self.inputs(batch))
        if loss.ndim:
            raise TrainingError(
                f"`loss` must give a scalar; got {tuple(loss.shape)} from term {self.name!r}. "
                "Take the mean over the batch."
            )
        return loss

    @property
    def description(self) -> str:
        """One line that identifies the term, without learned tensors: the same in every process and run."""
        parts = (
            self.name,
            repr(self.weight),
            describe_callable(self.loss),
            describe_callable(self.inputs),
            repr(dict(self.taps)),
        )
        # Named only where there is one, so that unfinished runs of earlier versions can be resumed.
        warmup = (f"warmup_fraction={self.warmup_fraction!r}",) if self.warmup_fraction else ()
        return " | ".join(" ".join(part.split()) for part in (*parts, *warmup))

    def weight_at(self, progress: float) -> float:
        """Return the weight after a fraction of the training's steps, the present one included."""
        return self.weight if progress >= self.warmup_fraction else self.weight * progress / self.warmup_fraction


class TaskLosses(Protocol):
    """The losses of a task, see `secateur.tasks.Task`."""

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Return the loss of outputs with their targets."""
        ...

    def imitation(self, student: Any, teacher: Any) -> Tensor:
        """Return how far a student's outputs are from a teacher's."""
        ...


@settings
class Objective:
    """A weighted sum of losses; one with weight 0 is not computed and needs no input.

    total = label_weight * label + kd_weight * kd + feature_weight * feature + sum over terms of weight * loss

    The defaults of the first two are those of Dong & Yang (arXiv:1905.09717, reference code): 0.1 and 0.9 at T = 4.

    Attributes:
        kd_weight: Weight of `kd_loss`, >= 0.
        label_weight: Weight of `label_loss`, >= 0.
        feature_weight: Weight of the loss of `AlignedFeatures`, >= 0.
        temperature: Temperature of `kd_loss`, > 0.
        label_smoothing: Share of the label's probability spread over all classes, in [0, 1).
        terms: Further losses, with different names.
    """

    kd_weight: float = 0.9
    label_weight: float = 0.1
    feature_weight: float = 0.0
    temperature: float = 4.0
    label_smoothing: float = 0.0
    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        for name, weight in self._weights.items():
            check_weight(name, weight)
        if not any(self._weights.values()) and not self.terms:
            raise TrainingError("`Objective` must have a positive weight; got 0 for all three. Set kd_weight=1.")
        check_positive("temperature", self.temperature, "4")
        if not 0 <= self.label_smoothing < 1:
            raise TrainingError(f"`label_smoothing` must be in [0, 1); got {self.label_smoothing}. 0.1 is usual.")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise TrainingError(f"`terms` must have different names; got {', '.join(names)}. Rename one.")

    @classmethod
    def of_labels(cls, *, label_smoothing: float = 0.0) -> "Objective":
        """Make the objective of plain training on labels, without a teacher."""
        return cls(kd_weight=0.0, label_weight=1.0, label_smoothing=label_smoothing)

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is part of the objective."""
        return self.kd_weight > 0 or self.feature_weight > 0 or bool(self.terms)

    @property
    def learned(self) -> nn.ModuleDict:
        """The losses of the terms that are modules, by name: what is learned with the student. They are no copies."""
        return nn.ModuleDict({term.name: term.loss for term in self.terms if isinstance(term.loss, nn.Module)})

    def record(self, student: nn.Module, teacher: nn.Module) -> AbstractContextManager[TapRecorder]:
        """Record the features at the taps of all terms while the context is open, see `record_taps`."""
        return record_taps(student, teacher, *(term.taps for term in self.terms))

    def __call__(
        self,
        student_logits: Any,
        *,
        teacher_logits: Any = None,
        labels: Any = None,
        feature: Tensor | None = None,
        recorder: TapRecorder | None = None,
        task: TaskLosses | None = None,
        progress: float = 1.0,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the loss of one batch.

        Args:
            student_logits: (batch, classes).
            teacher_logits: (batch, classes); needed if ``kd_weight`` > 0 or there are terms.
            labels: (batch,) int64, or probabilities (batch, classes) of mixed images; needed if ``label_weight`` > 0
                or there are terms.
            feature: The loss of the aligned features, a scalar; needed if ``feature_weight`` > 0.
            recorder: Holds the features of both models at the taps of the terms; needed if there are terms. It is
                cleared.
            task: Gives the losses "label" and "kd" for outputs and targets of other kinds; None means those of a
                classifier, as stated here.
            progress: Fraction of the training's steps with the present one, in (0, 1]; for terms with a warm-up.

        Returns:
            The total, and its parts before weighting, detached: "label", "kd" and "feature" if they have a weight, and
            each term under its name.

        Raises:
            TrainingError: If an input with a positive weight is missing or has the wrong shape.
        """
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.label_weight:
            target = _require(labels, "labels", "label_weight")
            if task is None:
                label = label_loss(student_logits, target, smoothing=self.label_smoothing)
            else:
                label = task.loss(student_logits, target)
            terms["label"] = (self.label_weight, label)
        if self.kd_weight:
            target = _require(teacher_logits, "teacher_logits", "kd_weight")
            if task is None:
                kd = kd_loss(student_logits, target, temperature=self.temperature)
            else:
                kd = task.imitation(student_logits, target)
            terms["kd"] = (self.kd_weight, kd)
        if self.feature_weight:
            terms["feature"] = (self.feature_weight, _require(feature, "feature", "feature_weight"))
        if self.terms:
            terms |= self._terms(student_logits, teacher_logits, labels, recorder, progress)
        total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
        return total, {name: loss.detach() for name, (_, loss) in terms.items()}

    def _terms(
        self, logits: Any, teacher_logits: Any, labels: Any, recorder: TapRecorder | None, progress: float
    ) -> dict[str, tuple[float, Tensor]]:
        if labels is None or teacher_logits is None or recorder is None:
            raise TrainingError(
                "`labels`, `teacher_logits` and `recorder` must be given because the objective has terms; got None for "
                "one. Run both models inside of Objective.record(student, teacher)."
            )
        terms = {
            term.name: (
                term.weight_at(progress),
                term(BatchOutputs(labels, logits, teacher_logits, *recorder.features(term.taps))),
            )
            for term in self.terms
        }
        recorder.clear()
        return terms

    @property
    def _weights(self) -> Mapping[str, float]:
        return {
            "kd_weight": self.kd_weight,
            "label_weight": self.label_weight,
            "feature_weight": self.feature_weight,
        }


def _require(tensor: Any, name: str, weight: str) -> Any:
    if tensor is None:
        raise TrainingError(f"`{name}` must be given because `{weight}` is positive; got None. Or set {weight}=0.")
    return tensor


class MeanOverTaps(nn.Module):
    """The mean over the taps of a loss on two features.

    Attributes:
        losses: One loss for all taps, or one for each.
        adaptors: The layers that are applied to the student's features first, in order.
    """

    def __init__(self, losses: PairLoss | Sequence[PairLoss], adaptors: Mapping[str, nn.Module] | None = None) -> None:
        """Combine losses and adaptors.

        Args:
            losses: A function or module of (student, teacher), or one for each tap.
            adaptors: One layer for each tap, as `make_adaptors` returns them; None compares the features as they are.
        """
        super().__init__()
        self.losses = tuple(losses) if isinstance(losses, Sequence) else (losses,)
        # Registered, so that their parameters are learned.
        self.learned = nn.ModuleList(loss for loss in self.losses if isinstance(loss, nn.Module))
        self.adaptors = nn.ModuleDict(dict(adaptors or {}))

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """Return the loss of one batch.

        Args:
            students: The student's features, in the order of the taps.
            teachers: The teacher's features.

        Returns:
            A scalar.

        Raises:
            TrainingError: If the numbers of taps, losses and adaptors differ.
        """
        count = len(students)
        adaptors = list(self.adaptors.values()) or [nn.Identity()] * count
        losses = self.losses * count if len(self.losses) == 1 else self.losses
        if not (0 < count == len(adaptors) == len(losses)):
            raise TrainingError(
                f"`losses` and `adaptors` must be one for each tap; got {len(self.losses)} and {len(self.adaptors)} "
                f"for {count} taps. Name the taps in the term, and make the adaptors for the same taps."
            )
        each = zip(losses, adaptors, students, teachers, strict=True)
        return torch.stack([loss(adaptor(upcast(s)), t) for loss, adaptor, s, t in each]).mean()

    def extra_repr(self) -> str:
        """The losses that are not modules."""
        return ", ".join(describe_callable(loss) for loss in self.losses if not isinstance(loss, nn.Module))


def describe_callable(value: object) -> str:
    """Describe a function, partial or module in the same words in every process, without memory addresses."""
    if isinstance(value, functools.partial):
        arguments = [
            *map(describe_callable, value.args),
            *(f"{name}={describe_callable(v)}" for name, v in value.keywords.items()),
        ]
        return f"{describe_callable(value.func)}({', '.join(arguments)})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"  # pyright: ignore[reportAttributeAccessIssue]
    return repr(value)


class Ensemble(nn.Module):
    """Several teachers as one: the weighted mean of their logits.

    z(x) = sum_i a_i * z_i(x), with a_i = weight_i / sum of all weights. In taps, the number of the teacher comes before
    the module: ``teachers.0.layer3``.

    References:
        Hinton et al., arXiv:1503.02531, Section 1, for ensembles as teachers; the mean of logits is the geometric mean
        of the probabilities, up to normalization.
    """

    share: Tensor

    def __init__(self, teachers: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        """Combine teachers; they are not copied.

        Args:
            teachers: One or more models with the same classes.
            weights: The weight of each, >= 0, not all 0; None weighs all alike.

        Raises:
            TrainingError: If there are no teachers, or the weights do not fit.
        """
        super().__init__()
        given = [1.0] * len(teachers) if weights is None else list(weights)
        if not teachers or len(given) != len(teachers):
            raise TrainingError(
                f"`teachers` must be one or more with a weight each; got {len(teachers)} with {len(given)} weights. "
                "Leave `weights` out to weigh all alike."
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in given) or not any(given):
            raise TrainingError(f"`weights` must be finite, not negative and not all 0; got {given}. Use 1 for each.")
        self.teachers = nn.ModuleList(teachers)
        self.register_buffer("share", torch.tensor(given) / sum(given))

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean logits (batch, classes).

        Raises:
            TrainingError: If the teachers return logits of different shapes.
        """
        each = [teacher(images) for teacher in self.teachers]
        shapes = {tuple(logits.shape) for logits in each}
        if len(shapes) > 1:
            raise TrainingError(f"`teachers` must have the same classes; got logits of {sorted(shapes)}.")
        return torch.einsum("t,tbc->bc", self.share, torch.stack([logits.float() for logits in each]))
