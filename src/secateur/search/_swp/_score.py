"""What candidates are worth, without training them: one pass judges one of every stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from secateur.graph import Stage
from secateur.search._problem import FloatArray
from secateur.search._swp._supervision import Supervision, Target
from secateur.supernet import (
    Subnet,
    Supernet,
    calibrated,
    calibrated_stages,
    features,
    run_stages,
    stage_effects,
)
from secateur.train import Batches, Precision, autocast, channels_last, precision_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True, eq=False)
class Judge:
    """Everything that it takes to judge candidates.

    Attributes:
        supernet: Trained, in eval mode.
        stages: Of its model.
        supervision: What the candidates are judged by.
        calibration: Image batches for the batch norms of every candidate.
        held_out: Batches of images that no weights have learnt from, and their labels.
        full: Batch-norm statistics of the full net.
        precision: Of the forward passes; losses are in float32 at least.
        weights: (stages,) what each stage's losses are multiplied by, see `weighing`; None leaves them as they are.
    """

    supernet: Supernet
    stages: tuple[Stage, ...]
    supervision: Supervision
    calibration: tuple[Tensor, ...]
    held_out: tuple[tuple[Tensor, Tensor], ...]
    full: Mapping[str, Tensor]
    precision: Precision
    weights: FloatArray | None = None

    @classmethod
    def of(
        cls,
        supernet: Supernet,
        *,
        stages: tuple[Stage, ...],
        supervision: Supervision,
        calibration: Sequence[Tensor],
        images: Batches,
        fabric: "Fabric",
    ) -> "Judge":
        """A judge who has looked at the full net.

        Args:
            supernet: Trained; put into eval mode.
            stages: Of its model.
            supervision: What the candidates are judged by.
            calibration: Image batches.
            images: The images held out.
            fabric: Device and precision.
        """
        supernet.eval()
        # An equal number in every batch, as far as it goes: the mean over batches is the mean over images.
        size = -(-len(images) // max(round(len(images) / _BATCH), 1))
        held_out = tuple((channels_last(x), y) for x, y in images.batches(size, device=fabric.device))
        batches, precision = tuple(channels_last(images) for images in calibration), precision_of(fabric)
        with autocast(precision, fabric.device):
            full = calibrated(supernet, supernet.full, batches)
        return cls(supernet, stages, supervision, batches, held_out, full, precision)

    def weighing(self, subnets: Sequence[Subnet]) -> "Judge":
        """The same judge, who multiplies losses by what arrives of them at the output, see `stage_effects`.

        Args:
            subnets: Some that are drawn from the space. Images held out are for judging alone: the effect is measured
                on a calibration batch.
        """
        with autocast(self.precision, self.device):
            effects = stage_effects(self.supernet, subnets, self.stages, self.calibration[0])
        return replace(self, weights=effects.numpy())

    @property
    def device(self) -> torch.device:
        """Where it judges."""
        return self.held_out[0][0].device


_BATCH = 250


def losses_of(judge: Judge, subnets: Sequence[Subnet]) -> FloatArray:
    """The losses of the stages of some subnets on the images held out, each fed with the full net's features.

    The full net runs once for all of them, so the more at a time the better. A subnet's batch norms are measured on
    the calibration images first, in the stage-wise pass too.

    Args:
        judge: Who judges.
        subnets: Any widths and blocks of the stages.

    Returns:
        (subnets, stages) means over the batches, weighted by stages, float64.
    """
    total = np.zeros((len(subnets), len(judge.stages)))
    with torch.no_grad(), autocast(judge.precision, judge.device):
        statistics = calibrated_stages(judge.supernet, subnets, judge.stages, judge.calibration, judge.full)
        for images, labels in judge.held_out:
            logits, handed_on = features(judge.supernet, judge.stages, images, tensors=judge.full)
            target = Target.of((*handed_on, logits), labels)
            for number, subnet in enumerate(subnets):
                outputs = run_stages(
                    judge.supernet, subnet, judge.stages, images, handed_on, tensors=statistics[number]
                )
                total[number] += judge.supervision.losses(outputs, target).double().cpu().numpy()
    return total / len(judge.held_out) * (1.0 if judge.weights is None else judge.weights)
