"""What a network that learns beside the full one learns from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from secateur.distill import kd_loss
from secateur.errors import BudgetError
from secateur.graph import Stage
from secateur.supernet import stage_losses


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
    def losses(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], labels: Tensor) -> Tensor:
        """(stages,) mean losses over a batch.

        Args:
            outputs: What each stage of the network has computed.
            targets: What those of the full net have.
            labels: (batch,) class numbers.
        """


@dataclass(frozen=True)
class InPlace(Supervision):
    """In-place distillation: each stage's output against that of the full net, see `stage_losses`."""

    def check(self, stages: Sequence[Stage]) -> None:
        """Any stages."""

    def losses(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], labels: Tensor) -> Tensor:
        """mean((y - x)^2) / Var(x) of each stage."""
        return stage_losses(outputs, targets)


@dataclass(frozen=True)
class SoftLabels(Supervision):
    """In-place distillation of the logits alone, for one stage: whole networks, as AutoSlim trains them.

    References:
        Yu & Huang, arXiv:1903.05134, Section 3.2; Yu & Huang (AutoSlim), arXiv:1903.11728.
    """

    def losses(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], labels: Tensor) -> Tensor:
        """KL(softmax(x) || softmax(y)) of the logits."""
        return kd_loss(outputs[-1].float(), targets[-1].float(), temperature=1.0).reshape(1)


@dataclass(frozen=True)
class Labels(Supervision):
    """No distillation: the labels, for one stage."""

    def losses(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(outputs[-1].float(), labels).reshape(1)
