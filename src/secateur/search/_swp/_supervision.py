"""What a network that learns beside the full one learns from."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.distill import kd_loss
from secateur.errors import BudgetError
from secateur.graph import Stage
from secateur.supernet import stage_losses, stage_variances


@dataclass(frozen=True, eq=False)
class Target:
    """What the full net has computed for a batch, and its labels: made once for all networks that learn from it.

    Attributes:
        outputs: Of every stage, float32 or better, detached.
        labels: (batch,) class numbers.
        averaged: The mean of a tensor over the processes that have the other parts of the batch; None if there are
            none.
    """

    outputs: tuple[Tensor, ...]
    labels: Tensor
    averaged: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(
        cls, outputs: Sequence[Tensor], labels: Tensor, averaged: Callable[[Tensor], Tensor] | None = None
    ) -> "Target":
        """The target of outputs of any precision."""
        kinds = [torch.promote_types(torch.float32, output.dtype) for output in outputs]
        outputs = tuple(output.detach().to(kind) for output, kind in zip(outputs, kinds, strict=True))
        return cls(outputs, labels, averaged)

    @cached_property
    def variances(self) -> Tensor:
        """(stages,) see `stage_variances`; those of the whole batch, whoever has the other parts of it."""
        own = stage_variances(self.outputs)
        if self.averaged is None:
            return own
        # Var(x) = E[Var_i + mean_i^2] - E[mean_i]^2 over equal parts i.
        means = torch.stack([output.mean() for output in self.outputs]).double()
        squares, means = self.averaged(torch.cat([own.double() + means**2, means])).chunk(2)
        return (squares - means**2).to(own)


class Supervision(ABC):
    """The loss of a network's stages, in training and in judging. Implementations are frozen dataclasses."""

    def check(self, stages: Sequence[Stage]) -> None:
        """Refuse stages that it can say nothing of."""
        if len(stages) > 1:
            raise BudgetError(
                f"`supervision` must be InPlace() for a model in stages; got {self} for {len(stages)} of them. "
                "Or search the whole net at once: cuts=()."
            )

    @abstractmethod
    def losses(self, outputs: Sequence[Tensor], target: Target) -> Tensor:
        """(stages,) mean losses over a batch.

        Args:
            outputs: What each stage of the network has computed.
            target: What those of the full net have.
        """


@dataclass(frozen=True)
class InPlace(Supervision):
    """In-place distillation: each stage's output against that of the full net, see `stage_losses`."""

    def check(self, stages: Sequence[Stage]) -> None:
        """Any stages."""

    def losses(self, outputs: Sequence[Tensor], target: Target) -> Tensor:
        """mean((y - x)^2) / Var(x) of each stage."""
        return stage_losses(outputs, target.outputs, target.variances)


@dataclass(frozen=True)
class SoftLabels(Supervision):
    """In-place distillation of the logits alone, for one stage: whole networks, as AutoSlim trains them.

    References:
        Yu & Huang, arXiv:1903.05134, Section 3.2; Yu & Huang (AutoSlim), arXiv:1903.11728.
    """

    def losses(self, outputs: Sequence[Tensor], target: Target) -> Tensor:
        """KL(softmax(x) || softmax(y)) of the logits."""
        return kd_loss(outputs[-1].float(), target.outputs[-1], temperature=1.0).reshape(1)


@dataclass(frozen=True)
class Labels(Supervision):
    """No distillation: the labels, for one stage."""

    def losses(self, outputs: Sequence[Tensor], target: Target) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(outputs[-1].float(), target.labels).reshape(1)
