"""Terms: any loss on logits or features, with its weight and its taps, as one part of an objective."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.distill._checks import check_weight
from secateur.distill._losses import widened
from secateur.distill._taps import Features, Taps
from secateur.errors import TrainingError

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""A loss of a student's and a teacher's tensor."""


@dataclass(frozen=True)
class Seen:
    """What a loss may look at: one batch, as student and teacher saw it.

    Attributes:
        labels: (batch,) class indices, or probabilities (batch, classes) where images are mixed.
        student_logits: (batch, classes).
        teacher_logits: (batch, classes).
        student: The student's features at the taps of the term, in order.
        teacher: The teacher's.
    """

    labels: Tensor
    student_logits: Tensor
    teacher_logits: Tensor
    student: tuple[Tensor, ...] = ()
    teacher: tuple[Tensor, ...] = ()


def logits(seen: Seen) -> tuple[Tensor, Tensor]:
    """For losses of (student_logits, teacher_logits), such as `dist_loss`."""
    return seen.student_logits, seen.teacher_logits


def labelled_logits(seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """For losses of (student_logits, teacher_logits, labels), such as `dkd_loss`."""
    return seen.student_logits, seen.teacher_logits, seen.labels


def features(seen: Seen) -> Features:
    """For losses of all tapped features, (students, teachers), such as `PerTap` and `KnowledgeReview`."""
    return seen.student, seen.teacher


def labelled_feature(seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """For losses of the first tap, (student, teacher, labels), such as `ContrastiveRepresentation`."""
    return seen.student[0], seen.teacher[0], seen.labels


@dataclass(frozen=True)
class Term:
    """One loss of an objective.

        Term("dkd", partial(dkd_loss, beta=2.0), of=labelled_logits, weight=0.9)
        Term("hint", PerTap(hint_loss, adaptors), of=features, weight=10.0, taps={"layer2": "layer2"})

    Attributes:
        name: In histories and checkpoints; without dots.
        loss: Gives a scalar for what ``of`` chooses. If it is a module, its parameters are learned with the student
            (in a copy) and its tensors are part of checkpoints; parameters that a plain function refers to are not.
        of: What the loss is given of a batch: `logits`, `labelled_logits`, `features`, `labelled_feature`, or a
            function of your own.
        weight: Factor of the loss in the objective, > 0.
        taps: Module names of the student, each with the teacher's; needed by losses of features.
    """

    name: str
    loss: Callable[..., Tensor]
    of: Callable[[Seen], tuple[Any, ...]] = logits
    weight: float = 1.0
    taps: Taps = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        if not self.name or "." in self.name or self.name in {"total", "label", "kd", "feature"}:
            raise TrainingError(
                "`name` must be a word without dots, other than total, label, kd and feature; "
                f"got {self.name!r}. Name the term after its loss, such as 'hint'."
            )
        check_weight("weight", self.weight)
        if not self.weight:
            raise TrainingError(f"`weight` must be positive; got 0 for term {self.name!r}. Leave the term out.")

    def __call__(self, seen: Seen) -> Tensor:
        """The loss of a batch before weighting, a scalar.

        Raises:
            TrainingError: If the loss is not a scalar, or refuses what it is given.
        """
        loss = self.loss(*self.of(seen))
        if loss.ndim:
            raise TrainingError(
                f"`loss` must give a scalar; got {tuple(loss.shape)} from term {self.name!r}. "
                "Take the mean over the batch."
            )
        return loss

    @property
    def description(self) -> str:
        """Everything but learned tensors in one line, equal in every process: two equal runs have equal terms."""
        parts = (self.name, repr(self.weight), described(self.loss), described(self.of), repr(dict(self.taps)))
        return " | ".join(" ".join(part.split()) for part in parts)


class PerTap(nn.Module):
    """The mean over the taps of a loss of two features.

    Attributes:
        losses: One for all taps, or one for each.
        adaptors: Applied to the student's features first, in order.
    """

    def __init__(self, losses: PairLoss | Sequence[PairLoss], adaptors: Mapping[str, nn.Module] | None = None) -> None:
        """Put together losses and adaptors.

        Args:
            losses: A function or module of (student, teacher), or one for each tap.
            adaptors: Such as those of `adaptors_of`, one for each tap; None compares the features as they are.
        """
        super().__init__()
        self.losses = tuple(losses) if isinstance(losses, Sequence) else (losses,)
        # Registered, so that their parameters are learned.
        self.learned = nn.ModuleList(loss for loss in self.losses if isinstance(loss, nn.Module))
        self.adaptors = nn.ModuleDict(dict(adaptors or {}))

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """The loss of one batch.

        Args:
            students: The student's features, in the order of the taps.
            teachers: The teacher's.

        Returns:
            A scalar.

        Raises:
            TrainingError: If there are other numbers of taps, losses and adaptors.
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
        return torch.stack([loss(adaptor(widened(s)), t) for loss, adaptor, s, t in each]).mean()

    def extra_repr(self) -> str:
        """The losses that are not modules."""
        return ", ".join(described(loss) for loss in self.losses if not isinstance(loss, nn.Module))


def described(value: object) -> str:
    """A function, partial or module in words that hold in every process: no addresses."""
    if isinstance(value, functools.partial):
        arguments = [*map(described, value.args), *(f"{name}={described(v)}" for name, v in value.keywords.items())]
        return f"{described(value.func)}({', '.join(arguments)})"
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"  # pyright: ignore[reportAttributeAccessIssue]
    return repr(value)
