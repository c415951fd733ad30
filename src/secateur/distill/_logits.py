"""Losses on logits beyond Hinton's: decoupled, by correlation, and after standardisation."""

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.distill._checks import check_labels, check_logits, check_weight
from secateur.distill._losses import check_temperature, kd_loss, widened

DEVIATION_FLOOR = 1e-7
"""Below any spread of logits that means something; keeps constant logits from a division by zero. The reference code
of logit standardisation has the same number."""
NORM_FLOOR = 1e-8
"""The floor of norms in `torch.nn.functional.cosine_similarity`."""


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Match the probability of the label, and what the teacher says about the other classes, each with its own weight.

    With q = softmax(z / T), b = (q_label, 1 - q_label) and p = q over the classes other than the label, divided by
    1 - q_label, the batch mean of

        T^2 * (alpha * KL(b_teacher || b_student) + beta * KL(p_teacher || p_student)).

    `kd_loss` is the same with alpha = 1 and beta = 1 - q_label of the teacher, which is near 0 for a sure teacher.

    Args:
        student_logits: (batch, classes), unnormalised; two classes or more.
        teacher_logits: The same, from the teacher; no gradient flows into it.
        labels: (batch,) class indices, int64.
        temperature: T, dimensionless, > 0.
        alpha: Weight of the label's part, >= 0.
        beta: Weight of the part of the other classes, >= 0. 8 is the paper's for ResNets on CIFAR-100.

    Returns:
        Mean loss over the batch, in nats: a scalar, float32 or better.

    Raises:
        TrainingError: If a number is out of range or the shapes do not belong together.

    References:
        Zhao et al., arXiv:2203.08679, Eq. (7); the factor T^2 is that of the reference code.
    """
    check_temperature(temperature)
    check_weight("alpha", alpha)
    check_weight("beta", beta)
    check_logits(student_logits, teacher_logits, classes=2)
    check_labels(labels, student_logits)
    target, other = _split(widened(student_logits) / temperature, labels)
    teacher_target, teacher_other = _split(widened(teacher_logits.detach()) / temperature, labels)
    label = F.kl_div(target, teacher_target, reduction="batchmean", log_target=True)
    rest = F.kl_div(other, teacher_other, reduction="batchmean", log_target=True)
    return (alpha * label + beta * rest) * temperature**2


def _split(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log (q_label, 1 - q_label), of shape (batch, 2), and log p over the other classes, with 0 at the label.

    Zeros in both models' log p add nothing to a divergence; leaving the label out by index would wait for the device.
    """
    is_label = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
    target = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.masked_fill(is_label, -torch.inf)
    # log(1 - q) as a difference of log-sums: exact where the teacher is so sure that 1 - q rounds to 0.
    binary = torch.stack([target, others.logsumexp(1)], 1)
    return binary.log_softmax(1), others.log_softmax(1).masked_fill(is_label, 0.0)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    inter: float = 1.0,
    intra: float = 1.0,
) -> Tensor:
    """Correlate the softened probabilities instead of equating them, image by image and class by class.

    With Y = softmax(z / T) of shape (batch, classes) and r the Pearson correlation,

        T^2 * (inter * mean over images i of (1 - r(S[i, :], T[i, :])) + intra * mean over classes j of
        (1 - r(S[:, j], T[:, j]))).

    Vectors of no variance count as uncorrelated, r = 0; in a batch of one image all classes are such vectors.

    Args:
        student_logits: (batch, classes), unnormalised; two classes or more.
        teacher_logits: The same, from the teacher; no gradient flows into it.
        temperature: T, dimensionless, > 0. The paper: 1 on ImageNet, 4 on CIFAR-100.
        inter: Weight beta of the relation between classes, >= 0.
        intra: Weight gamma of the relation within a class, >= 0.

    Returns:
        A scalar, dimensionless, float32 or better; 0 where the probabilities are linear functions of the teacher's.

    Raises:
        TrainingError: If a number is out of range or the shapes differ.

    References:
        Huang et al., arXiv:2205.10536, the losses L_inter and L_intra; the factor T^2 is that of the reference code.
    """
    check_temperature(temperature)
    check_weight("inter", inter)
    check_weight("intra", intra)
    check_logits(student_logits, teacher_logits, classes=2)
    student = (widened(student_logits) / temperature).softmax(1)
    teacher = (widened(teacher_logits.detach()) / temperature).softmax(1)
    distance = inter * _uncorrelated(student, teacher) + intra * _uncorrelated(student.T, teacher.T)
    return distance * temperature**2


def _uncorrelated(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the rows of one minus their Pearson correlation."""
    student = student - student.mean(1, keepdim=True)
    teacher = teacher - teacher.mean(1, keepdim=True)
    return 1 - F.cosine_similarity(student, teacher, dim=1, eps=NORM_FLOOR).mean()


def standardised(logits: Tensor) -> Tensor:
    """Logits of mean 0 and standard deviation 1, image by image.

    (z - mean(z)) / sqrt(Var(z) + 1e-14), with the biased variance over the classes, as the paper writes it. The
    reference code has the unbiased one, which is the same at a temperature higher by sqrt(classes / (classes - 1)).

    Args:
        logits: (batch, classes).

    Returns:
        (batch, classes), dimensionless, float32 or better.

    References:
        Sun et al., arXiv:2403.01427, Algorithm 1.
    """
    logits = widened(logits)
    variance = logits.var(1, correction=0, keepdim=True)
    return (logits - logits.mean(1, keepdim=True)) / (variance + DEVIATION_FLOOR**2).sqrt()


def standardised_kd_loss(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 2.0) -> Tensor:
    """Match softened class probabilities whatever the scale of either model's logits.

    `kd_loss(standardised(student), standardised(teacher))`: the student need not learn how large the teacher's logits
    are, only how they compare.

    Args:
        student_logits: (batch, classes), unnormalised; two classes or more.
        teacher_logits: The same, from the teacher; no gradient flows into it.
        temperature: T, dimensionless, > 0. 2 is the paper's base temperature.

    Returns:
        Mean loss over the batch, in nats: a scalar, float32 or better.

    Raises:
        TrainingError: If ``temperature`` is not positive and finite, or the shapes differ.

    References:
        Sun et al., arXiv:2403.01427, Algorithms 1 and 2.
    """
    check_logits(student_logits, teacher_logits, classes=2)
    return kd_loss(standardised(student_logits), standardised(teacher_logits), temperature=temperature)
