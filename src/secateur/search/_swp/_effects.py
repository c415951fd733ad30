"""How much of a stage's error arrives at the output: what makes losses of different stages comparable."""

from collections.abc import Sequence

import numpy as np
import torch

from secateur.search._problem import FloatArray
from secateur.search._swp._score import Judge
from secateur.search._swp._supervision import Target
from secateur.supernet import Subnet, calibrated_stages, carried_on, features, run_stages
from secateur.train import autocast


def effects_of(judge: Judge, subnets: Sequence[Subnet]) -> FloatArray:
    """The weight of every stage: the loss at the output per loss at the stage's own end.

    With f the full net's stages, y_s the output of stage s of a subnet fed with the full net's feature, and L_s the
    loss of stage s,

        weight_s = sum L_S(f_S(...f_(s+1)(y_s))) / sum L_s(y_s)

    over the subnets: some stages' errors are mended by what follows, others are not. That of the last stage is 1.

    Args:
        judge: Its own weights are not used. Batch norms are measured on its first calibration batch, errors on its
            last: images held out are for judging alone.
        subnets: Some that are drawn from the space; a handful will do, because only the ratio of means is wanted.

    Returns:
        (stages,), float64; 1 for a stage where the subnets have no loss.
    """
    last = len(judge.stages) - 1
    if not last:
        return np.ones(1)
    images, own, at_output = judge.calibration[-1], np.zeros(last + 1), np.zeros(last + 1)
    with torch.no_grad(), autocast(judge.precision, judge.device):
        statistics = calibrated_stages(judge.supernet, subnets, judge.stages, judge.calibration[:1], judge.full)
        logits, handed_on = features(judge.supernet, judge.stages, images, tensors=judge.full)
        target = Target.of((*handed_on, logits), _NO_LABELS)
        for subnet, tensors in zip(subnets, statistics, strict=True):
            outputs = run_stages(judge.supernet, subnet, judge.stages, images, handed_on, tensors=tensors)
            own += judge.supervision.losses(outputs, target).double().cpu().numpy()
            for stage in range(last):
                arrived = carried_on(judge.supernet, judge.stages, images, stage, outputs[stage], tensors=judge.full)
                at_output[stage] += float(judge.supervision.losses((*handed_on, arrived), target)[-1])
    at_output[last] = own[last]
    return np.divide(at_output, own, out=np.ones_like(own), where=own > 0)


_NO_LABELS = torch.empty(0, dtype=torch.int64)
"""What supervises stages does not look at labels."""
