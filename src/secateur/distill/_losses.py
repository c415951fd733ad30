"""The losses, as pure functions of tensors. Each computes in float32 or better, whatever autocast produced."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.distill._checks import check_logits
from secateur.errors import TrainingError

VARIANCE_FLOOR = 1e-6
"""Added to the variance of a teacher feature, so that a constant feature gives a finite loss. Far below the variance
of any feature that follows a normalisation (order 0.01 to 1)."""


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Match the softened class probabilities of a teacher.

    With q(z) = softmax(z / T), the batch mean of  T^2 * KL(q(teacher) || q(student)). The factor T^2 keeps the size
    of the gradient when T changes.

    Args:
        student_logits: (batch, classes), unnormalised.
        teacher_logits: The same, from the teacher; no gradient flows into it.
        temperature: T, dimensionless, > 0. 4 is usual on CIFAR.

    Returns:
        Mean loss over the batch, in nats: a scalar, float32 or better.

    Raises:
        TrainingError: If ``temperature`` is not positive and finite, or the shapes differ.

    References:
        Hinton et al., arXiv:1503.02531, Eq. (1) and Section 2.
    """
    check_temperature(temperature)
    check_logits(student_logits, teacher_logits)
    student = F.log_softmax(widened(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(widened(teacher_logits.detach()) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def label_loss(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels.

    The batch mean of  -sum_c p_c log softmax(logits)_c  with  p = (1 - s) * onehot(label) + s / classes. Labels of
    mixed images are probabilities already and stand in the place of onehot(label).

    Args:
        logits: (batch, classes), unnormalised.
        labels: (batch,) class indices, int64, or (batch, classes) probabilities, floating.
        smoothing: s, dimensionless, in [0, 1).

    Returns:
        Mean loss over the batch, in nats: a scalar, float32 or better.

    Raises:
        TrainingError: If the shapes do not belong together.

    References:
        Szegedy et al., arXiv:1512.00567, Section 7 (label smoothing).
    """
    mixed = labels.is_floating_point()
    if logits.ndim != 2 or labels.shape != (logits.shape if mixed else logits.shape[:1]):
        raise TrainingError(
            "`logits` must have the shape (batch, classes) and `labels` (batch,), or that of the logits if they are "
            f"probabilities; got {tuple(logits.shape)} and {labels.dtype} {tuple(labels.shape)}. Give a classifier "
            "that returns logits of the data's classes."
        )
    logits = widened(logits)
    return F.cross_entropy(logits, labels.to(logits.dtype) if mixed else labels, label_smoothing=smoothing)


def feature_loss(student: Tensor, teacher: Tensor, *, variance_floor: float = VARIANCE_FLOOR) -> Tensor:
    """Distance of two features in units of the teacher's spread.

    With s and t of one shape:  mean((s - t)^2) / (Var(t) + variance_floor), means and variance (the biased one) over
    all elements. 0 is equal; 1 is as bad as the constant mean of t, whatever the scale of the feature.

    Args:
        student: Any shape.
        teacher: The same shape; no gradient flows into it.
        variance_floor: Added to the variance, in squared units of the feature, > 0.

    Returns:
        A scalar, dimensionless, float32 or better.

    Raises:
        TrainingError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise TrainingError(
            f"`student` features must have the shape of the teacher's kept ones {tuple(teacher.shape)}; "
            f"got {tuple(student.shape)}. Align the features with the architecture the student was cut to."
        )
    target = widened(teacher.detach())
    variance = target.var(correction=0)
    return F.mse_loss(widened(student), target) / (variance + variance_floor)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not positive and finite."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise TrainingError(f"`temperature` must be positive and finite; got {temperature}. 4 is usual on CIFAR.")


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
