"""Losses that compare how the images of a batch relate to each other. The two features may have any sizes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.distill._checks import check_same_images
from secateur.distill._losses import widened

FLOOR = 1e-12
"""Floor of distances and norms, far below those of any two different images."""
KERNEL_FLOOR = 1e-7
"""Floor of the kernel in `pkt_loss`: features of exactly opposite directions would have the probability 0."""


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Keep the distances between images, in units of their mean.

    With d_ij = ||f_i - f_j||_2 of flattened features and mu its mean over i != j, the mean over all ordered pairs
    (also i = j, as in the reference code) of  huber(d_student / mu_student - d_teacher / mu_teacher)  with
    huber(x) = x^2 / 2 where |x| <= 1, else |x| - 1/2. The paper has the sum and a weight of 25.

    Args:
        student: (batch, ...), two images or more.
        teacher: (batch, ...) of the same images; no gradient flows into it.

    Returns:
        A scalar, dimensionless, float32 or better.

    Raises:
        TrainingError: If the batches differ, or there are fewer than two images.

    References:
        Park et al. (RKD), arXiv:1904.05068, the distance-wise loss (psi_D).
    """
    check_same_images(student, teacher, images=2)
    return F.smooth_l1_loss(_relative_distances(student), _relative_distances(teacher.detach()))


def _relative_distances(feature: Tensor) -> Tensor:
    distances = _distances(widened(feature).flatten(1))
    images = len(distances)
    mean = distances.sum() / (images * (images - 1))
    return distances / mean.clamp(min=FLOOR)


def _distances(points: Tensor) -> Tensor:
    # The quick way over a matrix product would lose half of the digits of small distances.
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Keep the angles in the triangles that images make.

    With e_ij = (f_i - f_j) / ||f_i - f_j||_2 (0 if i = j), the mean over all ordered triples (i, j, k), degenerate
    ones included as in the reference code, of  huber(<e_ij, e_kj>_student - <e_ij, e_kj>_teacher). The paper has the
    sum and a weight of 50. Memory grows with the cube of the batch: 8 MiB at 128 images.

    Args:
        student: (batch, ...), three images or more.
        teacher: (batch, ...) of the same images; no gradient flows into it.

    Returns:
        A scalar, dimensionless, float32 or better.

    Raises:
        TrainingError: If the batches differ, or there are fewer than three images.

    References:
        Park et al. (RKD), arXiv:1904.05068, the angle-wise loss (psi_A).
    """
    check_same_images(student, teacher, images=3)
    return F.smooth_l1_loss(_cosines(student), _cosines(teacher.detach()))


def _cosines(feature: Tensor) -> Tensor:
    """<e_ij, e_kj> at [j, i, k], by inner products: the vectors e_ij themselves would take batch^2 features."""
    points = widened(feature).flatten(1)
    points = points - points.mean(0)  # Smaller numbers, fewer lost digits; differences stay.
    inner = points @ points.T
    # <f_i - f_j, f_k - f_j> = <i, k> - <i, j> - <k, j> + <j, j>
    products = inner - inner[:, :, None] - inner[:, None, :] + inner.diagonal()[:, None, None]
    distances = _distances(points)
    inverse = torch.where(distances > FLOOR, 1 / distances.clamp(min=FLOOR), 0.0)
    return products * inverse[:, :, None] * inverse[:, None, :]


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Keep which images activate alike.

    With G = Q Q^T of flattened features Q (batch, anything), each row of G divided by its norm:
    ||G_student - G_teacher||_F^2 / batch^2.

    Args:
        student: (batch, ...).
        teacher: (batch, ...) of the same images; no gradient flows into it.

    Returns:
        A scalar, dimensionless, float32 or better. The paper's weight is 3000.

    Raises:
        TrainingError: If the batches differ.

    References:
        Similarity-Preserving Knowledge Distillation, arXiv:1907.09682, L_SP.
    """
    check_same_images(student, teacher, images=2)
    return F.mse_loss(_similarities(student), _similarities(teacher.detach()))


def _similarities(feature: Tensor) -> Tensor:
    rows = widened(feature).flatten(1)
    return F.normalize(rows @ rows.T, dim=1, eps=FLOOR)


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Keep the probability that one image has another for its neighbour.

    With K_ij = max((cos(f_i, f_j) + 1) / 2, 1e-7) and p_ij = K_ij / sum_k K_ik, the mean over the images i of
    sum_j p_ij(teacher) log(p_ij(teacher) / p_ij(student)). Like the reference code, and unlike the paper's equation,
    the sums include j = i. The reference code takes the mean over pairs: less by the size of the batch.

    Args:
        student: (batch, ...), two images or more.
        teacher: (batch, ...) of the same images; no gradient flows into it.

    Returns:
        A scalar, in nats, float32 or better.

    Raises:
        TrainingError: If the batches differ, or there are fewer than two images.

    References:
        Passalis & Tefas (PKT), arXiv:1803.10837, the conditional probabilities with the cosine kernel.
    """
    check_same_images(student, teacher, images=2)
    return F.kl_div(_neighbours(student), _neighbours(teacher.detach()), reduction="batchmean", log_target=True)


def _neighbours(feature: Tensor) -> Tensor:
    """log p_ij."""
    rows = F.normalize(widened(feature).flatten(1), dim=1, eps=FLOOR)
    kernel = ((rows @ rows.T + 1) / 2).clamp(min=KERNEL_FLOOR)
    return (kernel / kernel.sum(1, keepdim=True)).log()
