"""Several teachers as one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.errors import TrainingError


class Ensemble(nn.Module):
    """Teachers that speak with one voice: the weighted mean of their logits.

    z(x) = sum_i a_i * z_i(x), with a_i = weight_i / sum of all weights. Taps name the modules of a teacher behind its
    number: ``teachers.0.layer3``.

    References:
        Hinton et al., arXiv:1503.02531, Section 1, for ensembles as teachers; the mean of logits is the geometric mean
        of the probabilities, up to normalisation.
    """

    share: Tensor

    def __init__(self, teachers: Sequence[nn.Module], weights: Sequence[float] | None = None) -> None:
        """Put teachers together; they are not copied.

        Args:
            teachers: One or more, with the same classes.
            weights: How much each counts, >= 0, not all 0; None counts all alike.

        Raises:
            TrainingError: If there are no teachers, or the weights do not fit.
        """
        super().__init__()
        given = [1.0] * len(teachers) if weights is None else list(weights)
        if not teachers or len(given) != len(teachers):
            raise TrainingError(
                f"`teachers` must be one or more with a weight each; got {len(teachers)} with {len(given)} weights. "
                "Leave `weights` out to count all alike."
            )
        if not all(math.isfinite(weight) and weight >= 0 for weight in given) or not any(given):
            raise TrainingError(f"`weights` must be finite, not negative and not all 0; got {given}. Use 1 for each.")
        self.teachers = nn.ModuleList(teachers)
        self.register_buffer("share", torch.tensor(given) / sum(given))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (batch, classes).

        Raises:
            TrainingError: If the teachers give logits of different shapes.
        """
        each = [teacher(images) for teacher in self.teachers]
        shapes = {tuple(logits.shape) for logits in each}
        if len(shapes) > 1:
            raise TrainingError(f"`teachers` must have the same classes; got logits of {sorted(shapes)}.")
        return torch.einsum("t,tbc->bc", self.share, torch.stack([logits.float() for logits in each]))
