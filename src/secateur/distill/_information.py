"""Variational information distillation: a Gaussian around the student's prediction, with a learned spread."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.distill._checks import check_positive
from secateur.distill._features import vid_loss
from secateur.distill._losses import widened
from secateur.errors import TrainingError


class VariationalInformation(nn.Module):
    """`vid_loss` with a learned prediction and a learned variance for each channel of the teacher.

    variance_c = softplus(alpha_c) + variance_floor, with alpha learned beside the prediction.

    Attributes:
        adaptor: Predicts the teacher's feature from the student's; its parameters are learned.
        alpha: (channels,), the variances before softplus.
        variance_floor: In squared units of the teacher's feature.

    References:
        Ahn et al. (VID), arXiv:1904.05835, the softplus of each channel's variance; 5.0 and 1e-5 are the numbers of the
        reference code.
    """

    def __init__(
        self, adaptor: nn.Module, channels: int, *, initial_variance: float = 5.0, variance_floor: float = 1e-5
    ) -> None:
        """Begin with one variance for all channels.

        Args:
            adaptor: One of `adaptors_of`, or a deeper network (the paper has three 1x1 convolutions).
            channels: Of the teacher's feature.
            initial_variance: Above the floor.
            variance_floor: Positive.

        Raises:
            TrainingError: If a number is out of range.
        """
        super().__init__()
        check_positive("variance_floor", variance_floor, "1e-5")
        check_positive("initial_variance", initial_variance, "5.0")
        if initial_variance <= variance_floor:
            raise TrainingError(
                f"`initial_variance` must be above variance_floor={variance_floor}; got {initial_variance}. Raise it."
            )
        self.adaptor = adaptor
        self.variance_floor = variance_floor
        above = initial_variance - variance_floor
        # The inverse of softplus, without overflow for large variances.
        self.alpha = nn.Parameter(torch.full((channels,), above + math.log(-math.expm1(-above))))

    @property
    def variance(self) -> Tensor:
        """(channels,), in squared units of the teacher's feature."""
        return F.softplus(self.alpha) + self.variance_floor

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """`vid_loss` of one pair of features; gradients flow into the student, the adaptor and the variances."""
        return vid_loss(self.adaptor(widened(student)), teacher, self.variance)

    def extra_repr(self) -> str:
        """The numbers that are not learned."""
        return f"variance_floor={self.variance_floor}"
