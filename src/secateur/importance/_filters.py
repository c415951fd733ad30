"""The weights of a channel as rows of a matrix, one matrix per tensor that holds them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.graph import ChannelAxis, Role, Site
from secateur.importance._base import Evidence, FloatArray


@dataclass(frozen=True, eq=False)
class Filters:
    """All weights that one tensor holds for the channels of an axis.

    Attributes:
        site: Where they come from.
        rows: (axis size, weights per channel) float64.
    """

    site: Site
    rows: FloatArray


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by every name it has, those left out of the ``state_dict`` too."""
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(model.named_buffers(remove_duplicate=False)), **dict(parameters)}


def producers(axis: ChannelAxis, tensors: Mapping[str, Tensor]) -> tuple[Filters, ...]:
    """The filters that produce the channels of an axis.

    They are the weights (two dimensions or more) of convolutions and linears with the axis at their output. Where an
    axis has none, because it begins at a parameter that is added or multiplied, the fallback is every weight matrix
    or tensor that holds the axis at all (such as the layers that read it), and if there is none, every vector that
    does. So an axis always has something to judge it by, and depthwise weights count only as a fallback.

    Args:
        axis: The axis.
        tensors: The model's parameters and buffers, see `tensors_of`.

    Raises:
        ModelError: If a weight is NaN or infinite.
    """
    return tuple(_each_producer(axis, tensors))


def _each_producer(axis: ChannelAxis, tensors: Mapping[str, Tensor]) -> Iterator[Filters]:
    """The same one by one, as they are large."""
    weights = [site for site in axis.sites if tensors[site.tensor].ndim > 1]
    sites = [site for site in weights if site.role is Role.OUTPUT] or weights or list(axis.sites)
    for site in sites:
        yield Filters(site, _rows(tensors[site.tensor], site))


def mean_over_producers(evidence: Evidence, score: Callable[[FloatArray], FloatArray]) -> dict[str, FloatArray]:
    """Score the rows of each producer of each axis and average over the producers.

    Args:
        evidence: The model and its graph.
        score: (channels, weights per channel) to (channels,).
    """
    tensors = tensors_of(evidence.model)
    return {
        axis.name: np.mean([score(filters.rows) for filters in _each_producer(axis, tensors)], axis=0)
        for axis in evidence.graph.prunable
    }


def _rows(tensor: Tensor, site: Site) -> FloatArray:
    values = tensor.detach().cpu().movedim(site.dim, 0)
    index = site.index.reshape(-1)
    if not np.array_equal(index, np.arange(len(values))):
        values = values[torch.from_numpy(index)]
    # The sum of what is finite may overflow, but that of what is not is never finite.
    if not values.sum().isfinite() and not values.isfinite().all():
        bad = values[~values.isfinite()]
        raise ModelError(
            f"`{site.tensor}` must be finite; got {float(bad[0])} and {len(bad)} such of {values.numel()} weights. "
            "Load weights that were trained without overflow."
        )
    return values.reshape(len(site.index), -1).double().contiguous().numpy()
