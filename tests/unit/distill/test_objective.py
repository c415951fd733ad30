import math
from typing import Any

import pytest
import torch

from secateur.distill import Objective, kd_loss, label_loss
from secateur.errors import TrainingError

STUDENT = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.0, 2.0, 1.5], [1.0, -1.0, 2.0]], dtype=torch.float64)
LABELS = torch.tensor([1, 2])
FEATURE = torch.tensor(0.25, dtype=torch.float64)


def test_total_is_the_weighted_sum_of_the_parts() -> None:
    objective = Objective(kd_weight=0.5, label_weight=0.25, feature_weight=2.0, temperature=3.0, label_smoothing=0.1)
    total, parts = objective(STUDENT, teacher_logits=TEACHER, labels=LABELS, feature=FEATURE)
    label = label_loss(STUDENT, LABELS, smoothing=0.1).item()
    kd = kd_loss(STUDENT, TEACHER, temperature=3.0).item()
    assert {name: part.item() for name, part in parts.items()} == {"label": label, "kd": kd, "feature": 0.25}
    assert total.item() == pytest.approx(0.25 * label + 0.5 * kd + 2.0 * 0.25, rel=1e-12)


def test_a_loss_without_weight_needs_no_input() -> None:
    total, parts = Objective(label_weight=0.0, kd_weight=2.0)(STUDENT, teacher_logits=TEACHER)
    assert list(parts) == ["kd"]
    assert total.item() == pytest.approx(2 * kd_loss(STUDENT, TEACHER, temperature=4.0).item(), rel=1e-12)
    total, parts = Objective.of_labels()(STUDENT, labels=LABELS)
    assert list(parts) == ["label"]
    assert total.item() == pytest.approx(label_loss(STUDENT, LABELS).item(), rel=1e-12)


def test_gradients_flow_through_the_total_only() -> None:
    student, feature = STUDENT.clone().requires_grad_(), FEATURE.clone().requires_grad_()
    total, parts = Objective(feature_weight=3.0)(student, teacher_logits=TEACHER, labels=LABELS, feature=feature)
    total.backward()
    assert student.grad is not None
    assert feature.grad is not None
    assert feature.grad.item() == 3.0
    assert not any(part.requires_grad for part in parts.values())


def test_needs_teacher() -> None:
    assert Objective().needs_teacher
    assert Objective(kd_weight=0.0, feature_weight=1.0).needs_teacher
    assert not Objective.of_labels(label_smoothing=0.1).needs_teacher


@pytest.mark.parametrize("name", ["kd_weight", "label_weight", "feature_weight"])
@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weights_must_be_finite_and_not_negative(name: str, weight: float) -> None:
    settings: dict[str, Any] = {name: weight}
    with pytest.raises(TrainingError, match=rf"`{name}` must be finite and not negative; got {weight}"):
        Objective(**settings)


def test_some_weight_must_be_positive() -> None:
    with pytest.raises(TrainingError, match="must have a positive weight; got 0 for all three"):
        Objective(kd_weight=0.0, label_weight=0.0)


def test_temperature_must_be_positive() -> None:
    with pytest.raises(TrainingError, match=r"`temperature` must be positive and finite; got 0\.0"):
        Objective(temperature=0.0)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_smoothing_must_be_a_fraction(smoothing: float) -> None:
    with pytest.raises(TrainingError, match=rf"`label_smoothing` must be in \[0, 1\); got {smoothing}"):
        Objective(label_smoothing=smoothing)


@pytest.mark.parametrize(
    ("objective", "missing", "weight"),
    [
        (Objective(), "labels", "label_weight"),
        (Objective(label_weight=0.0), "teacher_logits", "kd_weight"),
        (Objective(label_weight=0.0, kd_weight=0.0, feature_weight=1.0), "feature", "feature_weight"),
    ],
)
def test_a_weighted_loss_needs_its_input(objective: Objective, missing: str, weight: str) -> None:
    with pytest.raises(TrainingError, match=rf"`{missing}` must be given because `{weight}` is positive; got None"):
        objective(STUDENT)
