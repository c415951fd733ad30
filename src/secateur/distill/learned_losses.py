"""Losses with parameters of their own, as modules: VID, knowledge review and contrastive representations (CRD).

In a `Term` their parameters are learned together with the student.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur._runtime import seeded_initialization
from secateur.distill.feature_losses import hcl_loss, vid_loss
from secateur.distill.logit_losses import check_class_labels, check_positive, check_same_images, upcast
from secateur.errors import TrainingError


class VariationalInformation(nn.Module):
    """Variational information distillation: `vid_loss` with a learned prediction and a learned variance per channel.

    variance_c = softplus(alpha_c) + variance_floor, with alpha learned beside the prediction.

    Attributes:
        adaptor: Predicts the teacher's feature from the student's; its parameters are learned.
        alpha: (channels,), the variances before softplus.
        variance_floor: The smallest variance, in squared units of the teacher's feature.

    References:
        Ahn et al. (VID), arXiv:1904.05835. 5.0 and 1e-5 are the numbers of the reference code.
    """

    def __init__(
        self, adaptor: nn.Module, channels: int, *, initial_variance: float = 5.0, variance_floor: float = 1e-5
    ) -> None:
        """Set up one variance for all channels.

        Args:
            adaptor: One of `make_adaptors`, or a deeper network (the paper has three 1x1 convolutions).
            channels: Channels of the teacher's feature.
            initial_variance: The initial variance, above the floor.
            variance_floor: The smallest variance, positive.

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
        # The inverse of softplus in a form that does not overflow for large variances.
        self.alpha = nn.Parameter(torch.full((channels,), above + math.log(-math.expm1(-above))))

    @property
    def variance(self) -> Tensor:
        """(channels,), in squared units of the teacher's feature."""
        return F.softplus(self.alpha) + self.variance_floor

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return `vid_loss` of one pair of features; gradients flow into the student, the adaptor and the variances."""
        return vid_loss(self.adaptor(upcast(student)), teacher, self.variance)

    def extra_repr(self) -> str:
        """The numbers that are not learned."""
        return f"variance_floor={self.variance_floor}"


MAX_FUSED_WIDTH = 512
"""The most channels of fused features, which otherwise have those of the deepest student feature (reference code)."""


class AttentionFusion(nn.Module):
    """Fuses a level with the deeper ones, and predicts the teacher's feature (ABF).

    With x = BN(conv1x1(feature)), y the deeper fused feature, resized to x by the nearest pixel, and two maps (a, b) =
    sigmoid(conv1x1([x, y])),  fused = a * x + b * y  is resized to the teacher's resolution by the nearest pixel, and
    predicted = BN(conv3x3(fused)). The deepest level has fused = x.

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
            channels: Channels of the student's feature.
            width: Channels of fused features.
            teacher_channels: Channels of the prediction.
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
        """Fuse one level.

        Args:
            feature: The student's feature, (batch, channels, height, width).
            deeper: The fused feature of the next deeper level, (batch, width, ...); None at the deepest level.
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

    The reference code has weights of 0.6 (ResNet-56 to ResNet-20) to 8, 1 by default, after a linear rise over the
    first 20 of 240 epochs (``Term.warmup_fraction``), and the labels with the weight 1.

    Attributes:
        levels: The fusions of the levels, from shallow to deep.

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
            student_channels: Channels of the student's features, from shallow to deep.
            teacher_channels: Channels of the teacher's features of the same levels.
            width: Channels of fused features; None means those of the deepest student feature, at most 512.
            seed: Seed of the initial weights.

        Raises:
            TrainingError: If there are no levels, or different numbers of them.
        """
        super().__init__()
        if not student_channels or len(student_channels) != len(teacher_channels):
            raise TrainingError(
                "`student_channels` and `teacher_channels` must name the channels of the same levels; got "
                f"{len(student_channels)} and {len(teacher_channels)}. Give one number for each tap to both."
            )
        width = min(MAX_FUSED_WIDTH, student_channels[-1]) if width is None else width
        last = len(student_channels) - 1
        with seeded_initialization(seed):
            self.levels = nn.ModuleList(
                AttentionFusion(student, width, teacher, deepest=level == last)
                for level, (student, teacher) in enumerate(zip(student_channels, teacher_channels, strict=True))
            )

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """Return the loss of one batch.

        Args:
            students: Maps (batch, channels, height, width) or vectors (batch, channels), from shallow to deep.
            teachers: The teacher's features; no gradient flows into them.

        Returns:
            A scalar, in squared units of the teacher's features, float32 or better.

        Raises:
            TrainingError: If the number of levels or the channels are not those the module was set up with.
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
        return [upcast(f if f.ndim == 4 else f[:, :, None, None]) for f in features]


NO_CLASS = -1
"""The label of a slot that no image has filled yet."""


def contrastive_loss(
    positive: Tensor, negatives: Tensor, *, temperature: float, samples: int, scale: float | Tensor = 1.0
) -> Tensor:
    """Distinguish the two embeddings of one image from pairs of two images.

    With N negatives for each image, M samples, u(x) = exp(x / temperature) / scale and h = u / (u + N / M), the
    probability that a pair is of one image: the batch mean of  -log h(positive) - sum_n log(1 - h(negative_n)).

    Args:
        positive: (batch,), inner products of the two embeddings of each image, in [-1, 1].
        negatives: (batch, N), inner products of its embedding with those of other images.
        temperature: tau, dimensionless, > 0. The paper has 0.1, its reference code 0.07.
        samples: M, the number of images negatives are drawn from.
        scale: A constant that brings u to the size of a probability. The paper has none (1); its reference code has M
            times the mean of exp(x / temperature) over the first batch.

    Returns:
        A scalar, in nats, float32 or better.

    Raises:
        TrainingError: If a number is out of range or the shapes do not fit together.

    References:
        Tian et al. (CRD), arXiv:1910.10699, the objective of the critic, with h(T, S) of the form with N / M.
    """
    check_positive("temperature", temperature, "0.07")
    check_positive("samples", samples, "The number of training images")
    if not isinstance(scale, Tensor):  # Reading a tensor would make the host wait for the device.
        check_positive("scale", scale, "1")
    if positive.ndim != 1 or negatives.ndim != 2 or len(positive) != len(negatives) or not negatives.shape[1]:
        raise TrainingError(
            "`positive` and `negatives` must have the shapes (batch,) and (batch, N); got "
            f"{tuple(positive.shape)} and {tuple(negatives.shape)}. Give inner products, N of them for each image."
        )
    # h is the sigmoid of log(u / (N / M)), so both logarithms are softplus functions, which cannot overflow.
    log_scale = scale.log() if isinstance(scale, Tensor) else math.log(scale)
    shift = log_scale + math.log(negatives.shape[1] / samples)
    hit = F.softplus(shift - upcast(positive) / temperature)
    misses = F.softplus(upcast(negatives) / temperature - shift)
    return (hit + misses.sum(1)).mean()


class ContrastiveRepresentation(nn.Module):
    """`contrastive_loss` of learned embeddings, with negatives from a bank of recent images of other classes.

    Both features are averaged over positions, embedded by a linear layer each and scaled to length 1. The loss is the
    sum of two: the student's embeddings against the teacher's in the bank, and the reverse. The bank keeps the latest
    ``size`` embeddings of both, with their labels; its slots begin with random vectors of no class.

    The reference code has one slot for each training image, updated with momentum 0.5, and needs the indices of the
    images in a batch. Here the oldest slot is overwritten instead; if ``size`` is the number of training images, the
    bank holds about the same images, each once. An image is never its own negative, since negatives have another label.
    The weight of the reference code is 0.8, and that of the labels 1.

    Attributes:
        student_head: Linear layer from the student's channels.
        teacher_head: Linear layer from the teacher's channels.
        student_bank: (size, dimension).
        teacher_bank: (size, dimension).
        bank_labels: (size,), -1 where no image has been.
        steps: Batches seen; with the seed it determines the next draw.
        position: The next slot.
        scales: (2,), see ``scale`` of `contrastive_loss`; set by the first batch.

    References:
        Tian et al. (CRD), arXiv:1910.10699.
    """

    student_bank: Tensor
    teacher_bank: Tensor
    bank_labels: Tensor
    steps: Tensor
    position: Tensor
    scales: Tensor

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        size: int,
        negatives: int = 4096,
        dimension: int = 128,
        temperature: float = 0.07,
        seed: int = 0,
    ) -> None:
        """Set up heads and bank.

        Args:
            student_channels: Channels of the student's feature.
            teacher_channels: Channels of the teacher's feature.
            size: Slots of the bank: the number of training images, or as many as fit into memory (1 KiB each).
            negatives: Negatives for each image. The paper has 16384.
            dimension: Dimension of the embeddings.
            temperature: See `contrastive_loss`.
            seed: Random seed of heads, bank and draws.

        Raises:
            TrainingError: If a number is out of range.
        """
        super().__init__()
        check_positive("temperature", temperature, "0.07")
        for name, value in (("size", size), ("negatives", negatives), ("dimension", dimension)):
            if value < 1:
                raise TrainingError(f"`{name}` must be at least 1; got {value}. 128 or more is usual.")
        self.negatives, self.temperature, self.seed = negatives, temperature, seed
        with seeded_initialization(seed):
            self.student_head = nn.Linear(student_channels, dimension)
            self.teacher_head = nn.Linear(teacher_channels, dimension)
            for name in ("student_bank", "teacher_bank"):
                self.register_buffer(name, F.normalize(torch.randn(size, dimension), dim=1))
        self.register_buffer("bank_labels", torch.full((size,), NO_CLASS))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("position", torch.tensor(0))
        self.register_buffer("scales", torch.zeros(2))

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of one batch, which then overwrites the oldest slots of the bank.

        Args:
            student: (batch, channels, ...), or tokens (batch, tokens, channels).
            teacher: The teacher's feature of such a shape; gradients flow into its head but not into it.
            labels: (batch,) class indices, int64.

        Returns:
            A scalar, in nats.

        Raises:
            TrainingError: If the batches differ or are larger than the bank, or the bank holds no other class.
        """
        check_same_images(student, teacher, images=1)
        check_class_labels(labels, student)
        size = len(self.bank_labels)
        if len(labels) > size:
            raise TrainingError(f"`size` must be at least the batch, {len(labels)}; got {size}. Use a larger bank.")
        of_student = F.normalize(self.student_head(_pooled(student)), dim=1)
        of_teacher = F.normalize(self.teacher_head(_pooled(teacher.detach())), dim=1)
        drawn = self._draw(labels)
        scales = self.scales.unbind()
        there, scale_there = self._contrast(of_student, of_teacher, self.teacher_bank, drawn, scales[0])
        back, scale_back = self._contrast(of_teacher, of_student, self.student_bank, drawn, scales[1])
        self.scales = torch.stack([scale_there, scale_back])
        self._store(of_student.detach(), of_teacher.detach(), labels)
        return there + back

    def _contrast(
        self, anchor: Tensor, other: Tensor, bank: Tensor, drawn: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        positive = (anchor * other.detach()).sum(1)
        # All inner products first: gathering the drawn vectors would take batch * N * dimension numbers.
        negatives = (anchor @ bank.T).gather(1, drawn)
        with torch.no_grad():
            first = (torch.cat([positive[:, None], negatives], 1) / self.temperature).exp().mean() * len(bank)
            scale = torch.where(scale > 0, scale, first)
        loss = contrastive_loss(positive, negatives, temperature=self.temperature, samples=len(bank), scale=scale)
        return loss, scale

    def _draw(self, labels: Tensor) -> Tensor:
        """Slots of other classes, (batch, negatives), with replacement: a pure function of seed, step and bank."""
        other = (self.bank_labels != labels[:, None]).float()
        if not bool(other.any(1).all()):
            raise TrainingError(
                "`labels` must be of more than one class; the bank holds only the class of some image. "
                "Shuffle the images, or use a larger bank."
            )
        generator = torch.Generator(device=labels.device).manual_seed(self.seed * 1_000_003 + int(self.steps))
        return torch.multinomial(other, self.negatives, replacement=True, generator=generator)

    def _store(self, of_student: Tensor, of_teacher: Tensor, labels: Tensor) -> None:
        # New tensors instead of writing in place, because the backward pass still needs the old ones.
        size = len(self.bank_labels)
        slots = (self.position + torch.arange(len(labels), device=labels.device)) % size
        self.student_bank = self.student_bank.index_copy(0, slots, of_student)
        self.teacher_bank = self.teacher_bank.index_copy(0, slots, of_teacher)
        self.bank_labels = self.bank_labels.index_copy(0, slots, labels)
        self.position = (self.position + len(labels)) % size
        self.steps = self.steps + 1

    def extra_repr(self) -> str:
        """The numbers that are not learned."""
        return f"negatives={self.negatives}, temperature={self.temperature}, seed={self.seed}"


def _pooled(feature: Tensor) -> Tensor:
    """The mean over positions, (batch, channels)."""
    feature = upcast(feature)
    return feature.mean(1) if feature.ndim == 3 else feature.flatten(2).mean(2) if feature.ndim > 3 else feature
