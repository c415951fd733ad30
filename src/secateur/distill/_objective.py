"""What the student is trained for: labels, the teacher's probabilities and features, and any further losses."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.distill._losses import check_temperature, kd_loss, label_loss
from secateur.distill._taps import TapWatch, watch_taps
from secateur.distill._terms import Seen, Term
from secateur.errors import TrainingError


@dataclass(frozen=True)
class Objective:
    """A weighted sum of the losses; one with weight 0 is not computed and needs no input.

    total = label_weight * label + kd_weight * kd + feature_weight * feature + sum over terms of weight * loss

    The defaults of the first two are those of Dong & Yang (arXiv:1905.09717, reference code): 0.1 and 0.9 at T = 4.

    Attributes:
        kd_weight: Weight of `kd_loss`, >= 0.
        label_weight: Weight of `label_loss`, >= 0.
        feature_weight: Weight of the aligned features' loss (`AlignedFeatures`), >= 0.
        temperature: Of the softened probabilities in `kd_loss`, > 0.
        label_smoothing: Share of the label's probability spread over all classes, in [0, 1).
        terms: Further losses, of different names.
    """

    kd_weight: float = 0.9
    label_weight: float = 0.1
    feature_weight: float = 0.0
    temperature: float = 4.0
    label_smoothing: float = 0.0
    terms: tuple[Term, ...] = ()

    def __post_init__(self) -> None:
        for name, weight in self._weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise TrainingError(f"`{name}` must be finite and not negative; got {weight}. Use 0 to leave it out.")
        if not any(self._weights.values()) and not self.terms:
            raise TrainingError("`Objective` must have a positive weight; got 0 for all three. Set kd_weight=1.")
        check_temperature(self.temperature)
        if not 0 <= self.label_smoothing < 1:
            raise TrainingError(f"`label_smoothing` must be in [0, 1); got {self.label_smoothing}. 0.1 is usual.")
        names = [term.name for term in self.terms]
        if len(set(names)) < len(names):
            raise TrainingError(f"`terms` must have different names; got {', '.join(names)}. Rename one.")

    @classmethod
    def of_labels(cls, *, label_smoothing: float = 0.0) -> "Objective":
        """Plain training on labels, without a teacher."""
        return cls(kd_weight=0.0, label_weight=1.0, label_smoothing=label_smoothing)

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is part of the objective."""
        return self.kd_weight > 0 or self.feature_weight > 0 or bool(self.terms)

    @property
    def learned(self) -> nn.ModuleDict:
        """The losses of the terms that are modules, by name: what is learned beside the student. Not copies."""
        return nn.ModuleDict({term.name: term.loss for term in self.terms if isinstance(term.loss, nn.Module)})

    def watch(self, student: nn.Module, teacher: nn.Module) -> AbstractContextManager[TapWatch]:
        """Listen at the taps of all terms while the context is open, see `watch_taps`."""
        return watch_taps(student, teacher, *(term.taps for term in self.terms))

    def __call__(
        self,
        student_logits: Tensor,
        *,
        teacher_logits: Tensor | None = None,
        labels: Tensor | None = None,
        feature: Tensor | None = None,
        watch: TapWatch | None = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one batch.

        Args:
            student_logits: (batch, classes).
            teacher_logits: (batch, classes); needed if ``kd_weight`` > 0 or there are terms.
            labels: (batch,) int64, or probabilities (batch, classes) of mixed images; needed if ``label_weight`` > 0
                or there are terms.
            feature: The aligned features' loss, a scalar; needed if ``feature_weight`` > 0.
            watch: Has heard both models at the taps of the terms; needed if there are terms. What it holds is let go.

        Returns:
            The total, and its parts before weighting, detached: those of "label", "kd", "feature" with a weight, and
            each term's under its name.

        Raises:
            TrainingError: If an input with a positive weight is missing or has the wrong shape.
        """
        terms: dict[str, tuple[float, Tensor]] = {}
        if self.label_weight:
            target = _given(labels, "labels", "label_weight")
            terms["label"] = (self.label_weight, label_loss(student_logits, target, smoothing=self.label_smoothing))
        if self.kd_weight:
            target = _given(teacher_logits, "teacher_logits", "kd_weight")
            terms["kd"] = (self.kd_weight, kd_loss(student_logits, target, temperature=self.temperature))
        if self.feature_weight:
            terms["feature"] = (self.feature_weight, _given(feature, "feature", "feature_weight"))
        if self.terms:
            terms |= self._terms(student_logits, teacher_logits, labels, watch)
        total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
        return total, {name: loss.detach() for name, (_, loss) in terms.items()}

    def _terms(
        self, logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, watch: TapWatch | None
    ) -> dict[str, tuple[float, Tensor]]:
        if labels is None or teacher_logits is None or watch is None:
            raise TrainingError(
                "`labels`, `teacher_logits` and `watch` must be given because the objective has terms; got None for "
                "one. Run both models inside of Objective.watch(student, teacher)."
            )
        terms = {
            term.name: (term.weight, term(Seen(labels, logits, teacher_logits, *watch.features(term.taps))))
            for term in self.terms
        }
        watch.forget()
        return terms

    @property
    def _weights(self) -> Mapping[str, float]:
        return {
            "kd_weight": self.kd_weight,
            "label_weight": self.label_weight,
            "feature_weight": self.feature_weight,
        }


def _given(tensor: Tensor | None, name: str, weight: str) -> Tensor:
    if tensor is None:
        raise TrainingError(f"`{name}` must be given because `{weight}` is positive; got None. Or set {weight}=0.")
    return tensor
