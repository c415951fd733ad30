"""Losses on features: image by image (hints, attention maps, pyramids), and on relations between images of a batch.

Losses on relations compare features of any two sizes. The others need one shape, channels or resolution.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.distill.logit_losses import check_same_images, check_same_shape, upcast
from secateur.errors import TrainingError

FLOOR = 1e-12
"""The floor of norms in `torch.nn.functional.normalize`, and of distances, far below those of different images."""
_KERNEL_FLOOR = 1e-7
"""The floor of the kernel in `pkt_loss`: features of exactly opposite directions would have the probability 0."""
_SIDES = (4, 2, 1)
"""Sides of the coarser levels in `hcl_loss`, those of the reference code."""


def channel_dim(feature: Tensor) -> int:
    """Return the dimension that carries channels.

    It is the last one of tokens (batch, tokens, channels), and the second one of vectors (batch, channels) and maps
    (batch, channels, height, width).
    """
    return 2 if feature.ndim == 3 else 1


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute half the mean squared distance of two features.

    With s and t of one shape:  mean((s - t)^2) / 2. The paper has the squared norm. The mean over all elements instead
    of the sum makes the weight of the loss independent of the size of the feature.

    Args:
        student: Any shape, after an adaptor (the paper's regressor) where the shapes differ: see `make_adaptors`.
        teacher: The same shape; no gradient flows into it.

    Returns:
        A scalar, in squared units of the feature, float32 or better. RepDistiller has 100 * mean((s - t)^2) of one
        layer beside the labels, which is the weight 200 here.

    Raises:
        TrainingError: If the shapes differ.

    References:
        Romero et al. (FitNets), arXiv:1412.6550, Eq. (3). The weight: github.com/HobbitLong/RepDistiller.
    """
    check_same_shape(student, teacher)
    return F.mse_loss(upcast(student), upcast(teacher.detach())) / 2


def attention_map(feature: Tensor) -> Tensor:
    """Return where a feature is large: the sum of squares over channels, scaled to length 1 for each image.

    With Q = vec(sum_c A_c^2):  Q / max(||Q||_2, 1e-12).

    Args:
        feature: A map (batch, channels, height, width), or tokens (batch, tokens, channels).

    Returns:
        (batch, positions), dimensionless, float32 or better.

    Raises:
        TrainingError: If the feature has no positions.

    References:
        Zagoruyko & Komodakis, arXiv:1612.03928, Section 3.1, with the sum of squares.
    """
    if feature.ndim not in {3, 4}:
        raise TrainingError(
            "`feature` must be a map (batch, channels, height, width) or tokens (batch, tokens, channels); "
            f"got {tuple(feature.shape)}. Tap a module before the pooling."
        )
    energy = upcast(feature).square().sum(channel_dim(feature)).flatten(1)
    return F.normalize(energy, dim=1, eps=FLOOR)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared distance of two attention maps.

    With Q of `attention_map`:  mean over images and positions of (Q_student - Q_teacher)^2, as in the reference code.
    There the total is  labels + 1000 * sum over the groups of this loss : with `MeanOverTaps` the weight is 1000 times
    the number of taps. The paper's equation has the norm itself and a factor of 1/2.

    Args:
        student: A map or tokens, see `attention_map`. Channels may differ from the teacher's: no adaptor is needed.
        teacher: The same images and positions; no gradient flows into it.

    Returns:
        A scalar, dimensionless, float32 or better.

    Raises:
        TrainingError: If a feature has no positions, or images or positions differ.

    References:
        Zagoruyko & Komodakis, arXiv:1612.03928, Eq. (2).
    """
    maps = attention_map(student), attention_map(teacher.detach())
    if maps[0].shape != maps[1].shape:
        raise TrainingError(
            f"`student` must have the images and positions of the teacher's feature {tuple(teacher.shape)}; got "
            f"{tuple(student.shape)}. Tap modules of one resolution, or put `Resize` before the loss."
        )
    return F.mse_loss(*maps)


def hcl_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared distance of two maps on several levels of a pyramid.

    With m_0 = mean((s - t)^2) at full size, and m_k the same after adaptive average pooling to 4x4, 2x2 and 1x1, as
    far as these are smaller than the map:  sum_k 2^-k m_k / sum_k 2^-k.

    Args:
        student: (batch, channels, height, width).
        teacher: The same shape; no gradient flows into it.

    Returns:
        A scalar, in squared units of the feature, float32 or better.

    Raises:
        TrainingError: If the shapes differ or are not those of maps.

    References:
        Chen et al. (ReviewKD), arXiv:2104.09044, the hierarchical context loss (HCL); levels and weights are those
        of the reference code.
    """
    check_same_shape(student, teacher)
    if student.ndim != 4:
        raise TrainingError(
            f"`student` must be a map (batch, channels, height, width); got {tuple(student.shape)}. Use `hint_loss`."
        )
    student, teacher = upcast(student), upcast(teacher.detach())
    losses = [F.mse_loss(student, teacher)]
    losses += [
        F.mse_loss(F.adaptive_avg_pool2d(student, side), F.adaptive_avg_pool2d(teacher, side))
        for side in _SIDES
        if side < min(student.shape[2:])
    ]
    weights = [2.0**-k for k in range(len(losses))]
    return torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


def vid_loss(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Compute the negative log-likelihood of the teacher's feature under a Gaussian around the student's prediction.

    The mean over all elements of  ((t - mean)^2 / variance + log(variance)) / 2. Up to a constant, its negative is a
    lower bound of the mutual information of the two features. The paper has the sum over elements.

    Args:
        mean: The student's prediction of the teacher's feature, of its shape.
        teacher: No gradient flows into it.
        variance: (channels,), > 0, in squared units of the feature. See `VariationalInformation` for a learned one.

    Returns:
        A scalar, in nats up to a constant, float32 or better. It may be negative. The reference code adds the sum over
        the taps to the labels with the weight 1.

    Raises:
        TrainingError: If the shapes do not fit together.

    References:
        Ahn et al. (VID), arXiv:1904.05835, the loss with a Gaussian of one variance for each channel.
    """
    check_same_images(mean, teacher, images=1)
    check_same_shape(mean, teacher)
    channels = teacher.shape[channel_dim(teacher)]
    if variance.shape != (channels,):
        raise TrainingError(
            f"`variance` must have one element for each of the teacher's {channels} channels; "
            f"got {tuple(variance.shape)}. Set it up with the channels of the tapped module."
        )
    mean, target = (upcast(x).movedim(channel_dim(x), -1) for x in (mean, teacher.detach()))
    variance = upcast(variance)
    return ((target - mean).square() / variance + variance.log()).mean() / 2


def rkd_distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the distances between images, in units of their mean.

    With d_ij = ||f_i - f_j||_2 of flattened features and mu its mean over i != j, the mean over all ordered pairs
    (also i = j, as in the reference code) of  huber(d_student / mu_student - d_teacher / mu_teacher)  with
    huber(x) = x^2 / 2 where |x| <= 1, else |x| - 1/2. The paper's equation has the sum. The reference code has 25 times
    this mean beside the labels, on the pooled last feature (`select_pooled_features`).

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
    distances = _distances(upcast(feature).flatten(1))
    images = len(distances)
    mean = distances.sum() / (images * (images - 1))
    return distances / mean.clamp(min=FLOOR)


def _distances(points: Tensor) -> Tensor:
    # The faster way, through a matrix product, would lose half of the digits of small distances.
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the angles in the triangles that three images form.

    With e_ij = (f_i - f_j) / ||f_i - f_j||_2 (0 if i = j), the mean over all ordered triples (i, j, k), degenerate
    ones included as in the reference code, of  huber(<e_ij, e_kj>_student - <e_ij, e_kj>_teacher). The paper's equation
    has the sum. The reference code has 50 times this mean beside the labels, on the pooled last feature. Memory grows
    with the cube of the batch: 8 MiB at 128 images.

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
    """<e_ij, e_kj> at [j, i, k], from inner products: the vectors e_ij themselves would take batch^2 features."""
    points = upcast(feature).flatten(1)
    points = points - points.mean(0)  # Differences stay the same, and smaller numbers lose fewer digits.
    inner = points @ points.T
    # <f_i - f_j, f_k - f_j> = <i, k> - <i, j> - <k, j> + <j, j>
    products = inner - inner[:, :, None] - inner[:, None, :] + inner.diagonal()[:, None, None]
    distances = _distances(points)
    inverse = torch.where(distances > FLOOR, 1 / distances.clamp(min=FLOOR), 0.0)
    return products * inverse[:, :, None] * inverse[:, None, :]


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare which images have similar features.

    With G = Q Q^T of flattened features Q (batch, features), each row of G divided by its norm, the loss is
    ||G_student - G_teacher||_F^2 / batch^2.

    Args:
        student: (batch, ...).
        teacher: (batch, ...) of the same images; no gradient flows into it.

    Returns:
        A scalar, dimensionless, float32 or better. The weight of the paper is 3000, on the last feature map.

    Raises:
        TrainingError: If the batches differ.

    References:
        Similarity-Preserving Knowledge Distillation, arXiv:1907.09682, L_SP.
    """
    check_same_images(student, teacher, images=2)
    return F.mse_loss(_similarities(student), _similarities(teacher.detach()))


def _similarities(feature: Tensor) -> Tensor:
    rows = upcast(feature).flatten(1)
    return F.normalize(rows @ rows.T, dim=1, eps=FLOOR)


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare the probability that one image has another as its neighbor.

    With K_ij = max((cos(f_i, f_j) + 1) / 2, 1e-7) and p_ij = K_ij / sum_k K_ik, the mean over all pairs (i, j) of
    p_ij(teacher) log(p_ij(teacher) / p_ij(student)). Like the reference code, and unlike the paper's equation, the
    pairs include j = i. The reference code has 30000 times this mean beside the labels, on the pooled last feature.

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
    summed = F.kl_div(_neighbors(student), _neighbors(teacher.detach()), reduction="sum", log_target=True)
    return summed / len(student) ** 2


def _neighbors(feature: Tensor) -> Tensor:
    """log p_ij."""
    rows = F.normalize(upcast(feature).flatten(1), dim=1, eps=FLOOR)
    kernel = ((rows @ rows.T + 1) / 2).clamp(min=_KERNEL_FLOOR)
    return (kernel / kernel.sum(1, keepdim=True)).log()
