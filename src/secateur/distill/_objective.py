"""What the student is trained for: labels, the teacher's probabilities, the teacher's features."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.distill._losses import check_temperature, kd_loss, label_loss
from secateur.errors import TrainingError


@dataclass(frozen=True)
class Objective:
    """A weighted sum of the losses; one with weight 0 is not computed and needs no input.

    total = label_weight * label + kd_weight * kd + feature_weight * feature

    The defaults of the first two are those of Dong & Yang (arXiv:1905.09717, reference code): 0.1 and 0.9 at T = 4.

    Attributes:
        kd_weight: Weight of `kd_loss`, >= 0.
        label_weight: Weight of `label_loss`, >= 0.
        feature_weight: Weight of the aligned features' loss (`AlignedFeatures`), >= 0.
        temperature: Of the softened probabilities in `kd_loss`, > 0.
        label_smoothing: Share of the label's probability spread over all classes, in [0, 1).
    """

    kd_weight: float = 0.9
    label_weight: float = 0.1
    feature_weight: float = 0.0
    temperature: float = 4.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in self._weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise TrainingError(f"`{name}` must be finite and not negative; got {weight}. Use 0 to leave it out.")
        if not any(self._weights.values()):
            raise TrainingError("`Objective` must have a positive weight; got 0 for all three. Set kd_weight=1.")
        check_temperature(self.temperature)
        if not 0 <= self.label_smoothing < 1:
            raise TrainingError(f"`label_smoothing` must be in [0, 1); got {self.label_smoothing}. 0.1 is usual.")

    @classmethod
    def of_labels(cls, *, label_smoothing: float = 0.0) -> "Objective":
        """Plain training on labels, without a teacher."""
        return cls(kd_weight=0.0, label_weight=1.0, label_smoothing=label_smoothing)

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is part of the objective."""
        return self.kd_weight > 0 or self.feature_weight > 0

    def __call__(
        self,
        student_logits: Tensor,
        *,
        teacher_logits: Tensor | None = None,
        labels: Tensor | None = None,
        feature: Tensor | None = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The loss of one batch.

        Args:
            student_logits: (batch, classes).
            teacher_logits: (batch, classes); needed if ``kd_weight`` > 0.
            labels: (batch,) int64; needed if ``label_weight`` > 0.
            feature: The aligned features' loss, a scalar; needed if ``feature_weight`` > 0.

        Returns:
            The total, and its parts before weighting, detached: those of "label", "kd", "feature" with a weight.

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
        total = torch.stack([weight * loss for weight, loss in terms.values()]).sum()
        return total, {name: loss.detach() for name, (_, loss) in terms.items()}

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
