"""Knowledge review: each level of the teacher teaches all deeper levels of the student."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.distill._features import hcl_loss
from secateur.distill._losses import widened
from secateur.distill._seeding import initialised
from secateur.errors import TrainingError

HIGHEST_WIDTH = 512
"""Channels of the fused features are those of the deepest student feature, but no more than this (reference code)."""


class AttentionFusion(nn.Module):
    """Fuses a level with the deeper ones, and predicts the teacher's feature (ABF).

    With x = BN(conv1x1(feature)), y the deeper fused feature, resized to x by the nearest pixel, and (a, b) =
    sigmoid(conv1x1([x, y])), two maps:  fused = a * x + b * y, resized to the teacher's resolution by the nearest
    pixel;  predicted = BN(conv3x3(fused)). The deepest level has fused = x.

    Attributes:
        enter: 1x1 convolution and norm.
        leave: 3x3 convolution and norm.
        attention: 1x1 convolution to two maps; Identity at the deepest level.
        deepest: Whether there is no deeper level.

    References:
        Chen et al. (ReviewKD), arXiv:2104.09044, attention based fusion (ABF); layers and initial values of the
        reference code.
    """

    def __init__(self, channels: int, width: int, teacher_channels: int, *, deepest: bool) -> None:
        """Set up the layers.

        Args:
            channels: Of the student's feature.
            width: Channels of fused features.
            teacher_channels: Of the prediction.
            deepest: Whether there is no deeper level to fuse.
        """
        super().__init__()
        enter = nn.Conv2d(channels, width, 1, bias=False)
        leave = nn.Conv2d(width, teacher_channels, 3, padding=1, bias=False)
        for convolution in (enter, leave):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.enter = nn.Sequential(enter, nn.BatchNorm2d(width))
        self.leave = nn.Sequential(leave, nn.BatchNorm2d(teacher_channels))
        self.attention = nn.Identity() if deepest else nn.Conv2d(2 * width, 2, 1)
        self.deepest = deepest

    def forward(self, feature: Tensor, deeper: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One level.

        Args:
            feature: The student's, (batch, channels, height, width).
            deeper: The fused feature of the next deeper level, (batch, width, ...); None at the deepest.
            size: (height, width) of the teacher's feature.

        Returns:
            The prediction of the teacher's feature, and the fused feature.
        """
        fused = self.enter(feature)
        if deeper is not None:
            deeper = F.interpolate(deeper, fused.shape[2:], mode="nearest")
            weights = self.attention(torch.cat([fused, deeper], 1)).sigmoid()
            fused = fused * weights[:, :1] + deeper * weights[:, 1:]
        if tuple(fused.shape[2:]) != tuple(size):
            fused = F.interpolate(fused, list(size), mode="nearest")
        return self.leave(fused), fused


class KnowledgeReview(nn.Module):
    """The sum over levels of `hcl_loss(predicted, teacher)`, predictions by `AttentionFusion` from deep to shallow.

    The paper's weight is 0.6 to 8 after a linear rise over the first 20 epochs.

    Attributes:
        levels: From shallow to deep.

    References:
        Chen et al. (ReviewKD), arXiv:2104.09044.
    """

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        *,
        width: int | None = None,
        seed: int = 0,
    ) -> None:
        """Set up the levels.

        Args:
            student_channels: Of the student's features, from shallow to deep.
            teacher_channels: Of the teacher's features beside them.
            width: Channels of fused features; None means those of the deepest student feature, at most 512.
            seed: Of the initial weights.

        Raises:
            TrainingError: If there are no levels, or not as many of the one as of the other.
        """
        super().__init__()
        if not student_channels or len(student_channels) != len(teacher_channels):
            raise TrainingError(
                "`student_channels` and `teacher_channels` must name the channels of the same levels; got "
                f"{len(student_channels)} and {len(teacher_channels)}. Give one number for each tap to both."
            )
        width = min(HIGHEST_WIDTH, student_channels[-1]) if width is None else width
        last = len(student_channels) - 1
        with initialised(seed):
            self.levels = nn.ModuleList(
                AttentionFusion(student, width, teacher, deepest=level == last)
                for level, (student, teacher) in enumerate(zip(student_channels, teacher_channels, strict=True))
            )

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """The loss of one batch.

        Args:
            students: Maps (batch, channels, height, width) or vectors (batch, channels), from shallow to deep.
            teachers: Those of the teacher; no gradient flows into them.

        Returns:
            A scalar, in squared units of the teacher's features, float32 or better.

        Raises:
            TrainingError: If there are other levels or channels than the module was set up with.
        """
        losses: list[Tensor] = []
        deeper: Tensor | None = None
        maps = self._maps(students, "students"), self._maps(teachers, "teachers")
        for level, student, teacher in reversed(list(zip(self.levels, *maps, strict=True))):
            predicted, deeper = level(student, deeper, teacher.shape[2:])
            losses.append(hcl_loss(predicted, teacher))
        return torch.stack(losses).sum()

    def _maps(self, features: Sequence[Tensor], name: str) -> list[Tensor]:
        if len(features) != len(self.levels) or any(feature.ndim not in {2, 4} for feature in features):
            raise TrainingError(
                f"`{name}` must be {len(self.levels)} maps or vectors; got {[tuple(f.shape) for f in features]}. "
                "Tap as many modules as the review has levels."
            )
        return [widened(f if f.ndim == 4 else f[:, :, None, None]) for f in features]
