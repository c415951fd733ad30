"""What the losses ask of their tensors, said once."""

import math

from torch import Tensor

from secateur.errors import TrainingError


def check_logits(student: Tensor, teacher: Tensor, *, classes: int = 1) -> None:
    """Refuse logits that are not two of one shape (batch, classes), with at least so many classes."""
    if student.ndim != 2 or student.shape != teacher.shape:
        raise TrainingError(
            "`student_logits` and `teacher_logits` must both have the shape (batch, classes); got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}. "
            "Use a teacher with the student's classes, or set kd_weight=0."
        )
    if student.shape[1] < classes:
        raise TrainingError(
            f"`student_logits` must have at least {classes} classes; got {student.shape[1]}. Use `kd_loss`."
        )


def check_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse labels that are not one class index for each row of the logits."""
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise TrainingError(
            f"`labels` must be class indices of shape ({len(logits)},); got {labels.dtype} {tuple(labels.shape)}. "
            "Give the labels of the batch, not one-hot; and leave mixup and cutmix out: this loss needs one class for "
            "each image."
        )


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse features of two shapes."""
    if student.shape != teacher.shape:
        raise TrainingError(
            f"`student` must have the shape of the teacher's feature {tuple(teacher.shape)}; "
            f"got {tuple(student.shape)}. Put an adaptor of `adaptors_of` before the loss."
        )


def check_same_images(student: Tensor, teacher: Tensor, *, images: int) -> None:
    """Refuse features of different batches, or of fewer images than a relation needs."""
    if min(student.ndim, teacher.ndim) < 2 or len(student) != len(teacher):
        raise TrainingError(
            "`student` and `teacher` must be features (batch, ...) of the same images; got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}. Tap modules whose first dimension is the batch."
        )
    if len(student) < images:
        raise TrainingError(
            f"`student` must hold at least {images} images, because the loss compares images with each other; "
            f"got {len(student)}. Use larger batches."
        )


def check_positive(name: str, value: float, usual: str) -> None:
    """Refuse a number that is not positive and finite."""
    if not (math.isfinite(value) and value > 0):
        raise TrainingError(f"`{name}` must be positive and finite; got {value}. {usual} is usual.")


def check_weight(name: str, value: float) -> None:
    """Refuse a weight that is negative or not finite."""
    if not (math.isfinite(value) and value >= 0):
        raise TrainingError(f"`{name}` must be finite and not negative; got {value}. Use 0 to leave it out.")
