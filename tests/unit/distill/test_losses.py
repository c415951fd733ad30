import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from secateur.distill import feature_loss, kd_loss, label_loss
from secateur.errors import TrainingError


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_loss_is_its_formula_in_numpy(temperature: float) -> None:
    student, teacher = random(6, 5, seed=1) * 3, random(6, 5, seed=2) * 3
    p, q = softmax(teacher.numpy() / temperature), softmax(student.numpy() / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(axis=1).mean()
    # float64 on both sides: only the order of summation differs.
    assert kd_loss(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-12)


def test_kd_loss_of_equal_logits_is_zero_and_shifts_do_not_matter() -> None:
    logits = random(4, 7, seed=3)
    assert kd_loss(logits, logits + 5.0, temperature=4.0).item() == pytest.approx(0.0, abs=1e-12)


def test_kd_gradient_at_high_temperature_is_that_of_half_the_squared_difference() -> None:
    # Hinton et al., Eq. (4): for large T the gradient tends to (z - v) / N per image, for logits of zero mean.
    student, teacher = random(3, 4, seed=4), random(3, 4, seed=5)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    student.requires_grad_()
    kd_loss(student, teacher, temperature=1e4).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (student.detach() - teacher) / 4 / 3, rtol=1e-3, atol=1e-5)


def test_label_loss_is_its_formula_in_numpy() -> None:
    logits, labels, s = random(6, 5, seed=6), torch.tensor([0, 4, 2, 2, 1, 3]), 0.1
    target = (1 - s) * np.eye(5)[labels.numpy()] + s / 5
    expected = -(target * np.log(softmax(logits.numpy()))).sum(axis=1).mean()
    assert label_loss(logits, labels, smoothing=s).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_loss_of_probabilities_is_its_formula_in_numpy(smoothing: float) -> None:
    logits, mixed = random(6, 5, seed=1) * 3, random(6, 5, seed=2).softmax(1)
    target = (1 - smoothing) * mixed.numpy() + smoothing / 5
    expected = -(target * np.log(softmax(logits.numpy()))).sum(axis=1).mean()
    assert label_loss(logits, mixed, smoothing=smoothing).item() == pytest.approx(expected, rel=1e-12)


def test_label_loss_of_certain_probabilities_is_that_of_classes() -> None:
    logits, labels = random(6, 5, seed=1) * 3, torch.tensor([0, 4, 2, 2, 1, 3])
    certain = torch.nn.functional.one_hot(labels, 5).float()  # float32 beside float64 logits
    for smoothing in (0.0, 0.1):
        classes = label_loss(logits, labels, smoothing=smoothing).item()
        assert label_loss(logits, certain, smoothing=smoothing).item() == pytest.approx(classes, rel=1e-12)


def test_feature_loss_is_its_formula_in_numpy() -> None:
    student, teacher = random(2, 3, 4, 4, seed=7), 10 * random(2, 3, 4, 4, seed=8) + 3
    s, t = student.numpy(), teacher.numpy()
    expected = ((s - t) ** 2).mean() / (((t - t.mean()) ** 2).mean() + 1e-6)
    assert feature_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_feature_loss_of_the_teachers_mean_is_one_at_any_scale() -> None:
    for scale in (1e-1, 1.0, 1e3):
        teacher = scale * random(64, 32, seed=9)
        loss = feature_loss(teacher.mean().expand_as(teacher), teacher, variance_floor=1e-12)
        assert loss.item() == pytest.approx(1.0, rel=1e-9)


def test_feature_loss_of_a_constant_teacher_is_finite() -> None:
    assert math.isfinite(feature_loss(torch.ones(2, 3), torch.zeros(2, 3)).item())


def test_gradients_agree_with_finite_differences() -> None:
    student, teacher = random(3, 4, seed=10).requires_grad_(), random(3, 4, seed=11)
    labels = torch.tensor([0, 3, 1])
    assert gradcheck(lambda z: kd_loss(z, teacher, temperature=4.0), (student,))
    assert gradcheck(lambda z: label_loss(z, labels, smoothing=0.1), (student,))
    assert gradcheck(lambda z: feature_loss(z, teacher), (student,))


def test_teacher_gets_no_gradient() -> None:
    student, teacher = random(3, 4, seed=12).requires_grad_(), random(3, 4, seed=13).requires_grad_()
    (kd_loss(student, teacher, temperature=2.0) + feature_loss(student, teacher)).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_half_precision_inputs_are_computed_in_float32() -> None:
    student, teacher = (random(8, 10, seed=s, dtype=torch.bfloat16) for s in (14, 15))
    labels = torch.arange(8)
    for half, full in (
        (kd_loss(student, teacher, temperature=4.0), kd_loss(student.float(), teacher.float(), temperature=4.0)),
        (label_loss(student, labels), label_loss(student.float(), labels)),
        (feature_loss(student, teacher), feature_loss(student.float(), teacher.float())),
    ):
        assert half.dtype is torch.float32
        assert torch.equal(half, full)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_kd_loss_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(TrainingError, match=r"`temperature` must be positive and finite; got .*4 is usual"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=temperature)


def test_kd_loss_refuses_a_teacher_with_other_classes() -> None:
    with pytest.raises(TrainingError, match=r"got \(2, 3\) and \(2, 5\)\. Use a teacher with the student's classes"):
        kd_loss(torch.zeros(2, 3), torch.zeros(2, 5), temperature=1.0)


def test_label_loss_refuses_logits_that_are_not_a_batch_of_classes() -> None:
    with pytest.raises(TrainingError, match=r"got \(2, 3, 4\) and torch\.int64 \(2,\)\. Give a classifier"):
        label_loss(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("labels", [torch.zeros(2), torch.zeros(2, 4), torch.zeros(3, 3), torch.zeros(2, 3).long()])
def test_label_loss_refuses_labels_of_other_shapes(labels: torch.Tensor) -> None:
    with pytest.raises(TrainingError, match=r"or that of the logits if they are probabilities; got \(2, 3\) and"):
        label_loss(torch.zeros(2, 3), labels)


def test_feature_loss_refuses_other_shapes() -> None:
    with pytest.raises(TrainingError, match=r"the teacher's feature \(2, 4\); got \(2, 3\)"):
        feature_loss(torch.zeros(2, 3), torch.zeros(2, 4))
