"""How much of a stage's error arrives at the output: what makes losses of different stages comparable."""

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.graph import Stage
from secateur.supernet._calibrate import measuring, untouched
from secateur.supernet._stagewise import carried_on, features, run_stages, stage_losses
from secateur.supernet._supernet import Subnet, Supernet


def stage_effects(supernet: Supernet, subnets: Sequence[Subnet], stages: Sequence[Stage], images: Tensor) -> Tensor:
    """The loss at the output per loss at each stage's own end.

    With f_s the full net's stages, x_s its features, y_s the output of a subnet's stage s fed with x_(s-1), and L_s the
    loss of `stage_losses`,

        effect_s = sum L_S(f_S(...f_(s+1)(y_s))) / sum L_s(y_s)

    over the subnets: some stages' errors are mended by what follows, others are not. That of the last stage is 1.
    Every batch norm uses the statistics of the batch, as in a network whose norms have been measured again.

    Args:
        supernet: In any mode; left as it is.
        subnets: As for `run_stages`; a handful will do, because only the ratio of means is wanted.
        stages: Of its model.
        images: Normalised, two or more.

    Returns:
        (stages,), float64, not differentiable; 1 for a stage where the subnets have no loss.
    """
    last = len(stages) - 1
    if not last:
        return torch.ones(1, dtype=torch.float64)
    own, arrived = torch.zeros(2, last + 1, dtype=torch.float64)
    full = untouched(supernet, supernet.full)
    with torch.no_grad(), measuring(supernet):
        output, handed_on = features(supernet, stages, images, tensors=full)
        for subnet in subnets:
            outputs = run_stages(supernet, subnet, stages, images, handed_on, tensors=untouched(supernet, subnet))
            own += stage_losses(outputs, (*handed_on, output)).double().cpu()
            for number, feature in enumerate(outputs[:-1]):
                there = carried_on(supernet, stages, images, number, feature, tensors=full)
                arrived[number] += stage_losses((there,), (output,)).double().cpu()[0]
    arrived[last] = own[last]
    return torch.where(own > 0, arrived / own, 1.0)
