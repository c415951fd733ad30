"""Losses on logits as pure functions of tensors, `feature_loss`, and the checks that all losses share.

Every loss computes in float32 or better, whatever autocast produced.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import TrainingError

VARIANCE_FLOOR = 1e-6
"""Added to the variance of a teacher feature, so that a constant feature gives a finite loss. Far below the variance
of any feature that follows a normalization (order 0.01 to 1)."""
DEVIATION_FLOOR = 1e-7
"""Below any spread of logits that means something; keeps constant logits from a division by zero. The reference code
of logit standardization has the same number."""
LOGIT_NORM_FLOOR = 1e-8
"""The floor of norms in `torch.nn.functional.cosine_similarity`."""


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Match the softened class probabilities of a teacher.

    With q(z) = softmax(z / T), the batch mean of  T^2 * KL(q(teacher) || q(student)). The factor T^2 keeps the size
    of the gradient when T changes.

    Args:
        student_logits: (batch, classes), unnormalized.
        teacher_logits: (batch, classes), from the teacher; no gradient flows into it.
        temperature: T, dimensionless, > 0. 4 is usual on CIFAR.

    Returns:
        Mean loss over the batch, in nats: a scalar, float32 or better. Usual is 0.9 times it and 0.1 times the labels.

    Raises:
        TrainingError: If ``temperature`` is not positive and finite, or the shapes differ.

    References:
        Hinton et al., arXiv:1503.02531, Eq. (1) and Section 2.
    """
    check_positive("temperature", temperature, "4")
    check_logit_pair(student_logits, teacher_logits)
    student = F.log_softmax(upcast(student_logits) / temperature, dim=1)
    teacher = F.log_softmax(upcast(teacher_logits.detach()) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def label_loss(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Compute the cross-entropy with the labels.

    The batch mean of  -sum_c p_c log softmax(logits)_c  with  p = (1 - s) * onehot(label) + s / classes. Labels of
    mixed images are probabilities, which take the place of onehot(label).

    Args:
        logits: (batch, classes), unnormalized.
        labels: (batch,) class indices, int64, or (batch, classes) probabilities, floating.
        smoothing: s, dimensionless, in [0, 1).

    Returns:
        Mean loss over the batch, in nats: a scalar, float32 or better.

    Raises:
        TrainingError: If the shapes do not fit together.

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
    logits = upcast(logits)
    return F.cross_entropy(logits, labels.to(logits.dtype) if mixed else labels, label_smoothing=smoothing)


def feature_loss(student: Tensor, teacher: Tensor, *, variance_floor: float = VARIANCE_FLOOR) -> Tensor:
    """Compute the squared distance of two features in units of the teacher's variance.

    With s and t of one shape:  mean((s - t)^2) / (Var(t) + variance_floor), means and (biased) variance over all
    elements. Equal features give 0; the constant mean of t gives 1, whatever the scale of the feature.

    Args:
        student: Any shape.
        teacher: The same shape; no gradient flows into it.
        variance_floor: Added to the variance, in squared units of the feature, > 0.

    Returns:
        A scalar, dimensionless, float32 or better.

    Raises:
        TrainingError: If the shapes differ.
    """
    check_same_shape(student, teacher)
    target = upcast(teacher.detach())
    variance = target.var(correction=0)
    return F.mse_loss(upcast(student), target) / (variance + variance_floor)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Match the probability of the label and the distribution over the other classes, each with its own weight.

    With q = softmax(z / T), b = (q_label, 1 - q_label) and p = q over the classes other than the label, divided by
    1 - q_label, the batch mean of

        T^2 * (alpha * KL(b_teacher || b_student) + beta * KL(p_teacher || p_student)).

    `kd_loss` is this with alpha = 1 and beta = 1 - q_label of the teacher, which is near 0 for a confident teacher.

    Args:
        student_logits: (batch, classes), unnormalized; two classes or more.
        teacher_logits: (batch, classes), from the teacher; no gradient flows into it.
        labels: (batch,) class indices, int64.
        temperature: T, dimensionless, > 0.
        alpha: Weight of the label's part, >= 0.
        beta: Weight of the other classes' part, >= 0. The reference code has 8, 6 or 2 by the pair of networks on
            CIFAR-100, such as 2 for ResNet-56 to ResNet-20.

    Returns:
        Mean loss over the batch, in nats: a scalar, float32 or better. The reference code adds it to the labels with
        the weight 1 for both, after a linear rise over the first 20 of 240 epochs (``Term.warmup_fraction``).

    Raises:
        TrainingError: If a number is out of range or the shapes do not fit together.

    References:
        Zhao et al., arXiv:2203.08679, Eq. (7); the factor T^2 is that of the reference code.
    """
    check_positive("temperature", temperature, "4")
    check_weight("alpha", alpha)
    check_weight("beta", beta)
    check_logit_pair(student_logits, teacher_logits, classes=2)
    check_class_labels(labels, student_logits)
    target, other = _split(upcast(student_logits) / temperature, labels)
    teacher_target, teacher_other = _split(upcast(teacher_logits.detach()) / temperature, labels)
    label = F.kl_div(target, teacher_target, reduction="batchmean", log_target=True)
    rest = F.kl_div(other, teacher_other, reduction="batchmean", log_target=True)
    return (alpha * label + beta * rest) * temperature**2


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return log (q_label, 1 - q_label), of shape (batch, 2), and log p over the other classes, with 0 at the label.

    Zeros in both models' log p add nothing to a divergence. Removing the label by index would wait for the device.
    """
    is_label = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    target = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.masked_fill(is_label, -torch.inf)
    # log(1 - q) as a difference of log-sums is accurate even if 1 - q rounds to 0.
    binary = torch.stack([target, others.logsumexp(1)], 1)
    return binary.log_softmax(1), others.log_softmax(1).masked_fill(is_label, 0.0)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 4.0,
    inter: float = 2.0,
    intra: float = 2.0,
) -> Tensor:
    """Correlate the softened probabilities of student and teacher, image by image and class by class.

    With Y = softmax(z / T) of shape (batch, classes) and r the Pearson correlation,

        T^2 * (inter * mean over images i of (1 - r(S[i, :], T[i, :])) + intra * mean over classes j of
        (1 - r(S[:, j], T[:, j]))).

    Vectors without variance count as uncorrelated, r = 0. In a batch of one image all classes are such vectors.

    Args:
        student_logits: (batch, classes), unnormalized; two classes or more.
        teacher_logits: (batch, classes), from the teacher; no gradient flows into it.
        temperature: T, dimensionless, > 0. The paper has 4 on CIFAR-100 and 1 on ImageNet.
        inter: Weight beta of the relation between classes, >= 0. The paper has 2 on CIFAR-100 and 1 on ImageNet.
        intra: Weight gamma of the relation within a class, >= 0. The same numbers.

    Returns:
        A scalar, dimensionless, float32 or better; 0 where the probabilities are linear functions of the teacher's.
        On CIFAR-100 the paper adds it to the labels with the weight 1 for both.

    Raises:
        TrainingError: If a number is out of range or the shapes differ.

    References:
        Huang et al., arXiv:2205.10536, the losses L_inter and L_intra; the factor T^2 is that of the reference code.
    """
    check_positive("temperature", temperature, "4")
    check_weight("inter", inter)
    check_weight("intra", intra)
    check_logit_pair(student_logits, teacher_logits, classes=2)
    student = (upcast(student_logits) / temperature).softmax(1)
    teacher = (upcast(teacher_logits.detach()) / temperature).softmax(1)
    distance = inter * _uncorrelated(student, teacher) + intra * _uncorrelated(student.T, teacher.T)
    return distance * temperature**2


def _uncorrelated(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over the rows of one minus their Pearson correlation."""
    student = student - student.mean(1, keepdim=True)
    teacher = teacher - teacher.mean(1, keepdim=True)
    return 1 - F.cosine_similarity(student, teacher, dim=1, eps=LOGIT_NORM_FLOOR).mean()


def standardize_logits(logits: Tensor) -> Tensor:
    """Scale logits to mean 0 and standard deviation 1, image by image.

    (z - mean(z)) / sqrt(Var(z) + 1e-14), with the biased variance over the classes, as in the paper. The reference code
    has the unbiased one, which is equivalent at a temperature higher by sqrt(classes / (classes - 1)).

    Args:
        logits: (batch, classes).

    Returns:
        (batch, classes), dimensionless, float32 or better.

    References:
        Sun et al., arXiv:2403.01427, Algorithm 1.
    """
    logits = upcast(logits)
    variance = logits.var(1, correction=0, keepdim=True)
    return (logits - logits.mean(1, keepdim=True)) / (variance + DEVIATION_FLOOR**2).sqrt()


def standardized_kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0) -> Tensor:
    """Match softened class probabilities whatever the scale of either model's logits.

    This is `kd_loss(standardize_logits(student), standardize_logits(teacher))`. The student need not learn how large
    the teacher's logits are, only how they compare.

    Args:
        student_logits: (batch, classes), unnormalized; two classes or more.
        teacher_logits: (batch, classes), from the teacher; no gradient flows into it.
        temperature: T, dimensionless, > 0. 2 is the paper's base temperature.

    Returns:
        Mean loss over the batch, in nats: a scalar, float32 or better. The reference code has 9 times it and 0.1 times
        the labels.

    Raises:
        TrainingError: If ``temperature`` is not positive and finite, or the shapes differ.

    References:
        Sun et al., arXiv:2403.01427, Algorithms 1 and 2.
    """
    check_logit_pair(student_logits, teacher_logits, classes=2)
    return kd_loss(standardize_logits(student_logits), standardize_logits(teacher_logits), temperature=temperature)


def upcast(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in its own type if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_logit_pair(student: Tensor, teacher: Tensor, *, classes: int = 1) -> None:
    """Refuse logits that do not both have one shape (batch, classes) with at least this many classes."""
    # Networks of several outputs give tuples or dicts, which have no shape.
    got = [tuple(getattr(each, "shape", ())) or type(each).__name__ for each in (student, teacher)]
    if len(got[0]) != 2 or got[0] != got[1]:
        raise TrainingError(
            "`student_logits` and `teacher_logits` must both have the shape (batch, classes); got "
            f"{got[0]} and {got[1]}. "
            "Use a teacher with the student's classes, or set kd_weight=0."
        )
    if student.shape[1] < classes:
        raise TrainingError(
            f"`student_logits` must have at least {classes} classes; got {student.shape[1]}. Use `kd_loss`."
        )


def check_class_labels(labels: Tensor, logits: Tensor) -> None:
    """Refuse labels that are not one class index for each row of the logits."""
    if labels.shape != logits.shape[:1] or labels.is_floating_point():
        raise TrainingError(
            f"`labels` must be class indices of shape ({len(logits)},); got {labels.dtype} {tuple(labels.shape)}. "
            "Give the labels of the batch, not one-hot, and leave mixup and cutmix out: this loss needs one class for "
            "each image."
        )


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Refuse features of different shapes."""
    if student.shape != teacher.shape:
        raise TrainingError(
            f"`student` must have the shape of the teacher's feature {tuple(teacher.shape)}; "
            f"got {tuple(student.shape)}. Put an adaptor of `make_adaptors` before the loss, or align the features "
            "with the architecture the student was cut to."
        )


def check_same_images(student: Tensor, teacher: Tensor, *, images: int) -> None:
    """Refuse features of different batches, or of fewer images than a loss on relations needs."""
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
