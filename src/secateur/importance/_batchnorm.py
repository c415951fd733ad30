"""Importance by the scale of batch norms."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from secateur.graph import ChannelAxis
from secateur.importance._base import Evidence, FloatArray, Importance, checked_scores
from secateur.importance._filters import producers, tensors_of
from secateur.importance._weights import norms


@dataclass(frozen=True)
class BatchNormScale(Importance):
    """Absolute scale of the batch norm on a channel: s_c = |gamma_c|.

    With several batch norms on an axis, the mean of |gamma_c| over them. An axis without one (or with batch norms that
    have no scale) falls back to the mean over its producers of the L2 norm of the filter, divided by its mean over
    the channels, so that it is of the order of a fresh gamma (1).

    References:
        Liu et al., Learning Efficient Convolutional Networks through Network Slimming, arXiv:1708.06519, Section 3.
    """

    def scores(self, evidence: Evidence) -> dict[str, FloatArray]:
        """(axis size,) per axis, dimensionless. Raises ModelError for weights that are not finite."""
        tensors = tensors_of(evidence.model)
        modules = dict(evidence.model.named_modules())
        scores = {axis.name: _of_axis(axis, tensors, modules) for axis in evidence.graph.prunable}
        return checked_scores(scores, evidence.graph, self)


def _of_axis(axis: ChannelAxis, tensors: dict[str, Tensor], modules: dict[str, nn.Module]) -> FloatArray:
    scales = [
        np.abs(tensors[site.tensor].detach().cpu().double().numpy()[site.index]).mean(axis=1)
        for site in axis.sites
        if _is_scale(site.tensor, modules)
    ]
    if scales:
        return np.mean(scales, axis=0)
    strength: FloatArray = np.mean([norms(filters.rows) for filters in producers(axis, tensors)], axis=0)
    average = strength.mean()
    return strength / average if average > 0 else strength


def _is_scale(tensor: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a tensor is gamma of a batch norm: the weight of a module that keeps a running variance."""
    owner, _, name = tensor.rpartition(".")
    return name == "weight" and getattr(modules.get(owner), "running_var", None) is not None
