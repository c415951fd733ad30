"""Importances: a score per channel, here from the weights alone; see `importance_data` for those that need images."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._arrays import FloatArray
from secateur._batches import count_images, take
from secateur._kinds import settings
from secateur.errors import ModelError
from secateur.graph.graph import ChannelAxis, ChannelGraph, Role, Site


@dataclass(frozen=True, eq=False)
class ScoringInputs:
    """The inputs of an importance; none of them is changed.

    Attributes:
        model: The traced model, in any mode.
        graph: Its channel graph.
        batches: (images (n, ...), labels (n,) int64) pairs, normalized as the model expects them, on its device.
            Targets of tasks without classes are in a mapping, ``{"targets": ...}``. Instead of images, also a tuple of
            positional inputs or a mapping of inputs by name, as `secateur.trace`
            takes them. Importances that read only weights do not need any.
        seed: For those that draw random numbers.
        class_logits: Whether outputs of shape (n, classes) are class logits, of which softmax does not see a common
            shift. None finds out from the labels, see `logit_columns`.
    """

    model: nn.Module
    graph: ChannelGraph
    batches: tuple[tuple[Any, Tensor], ...] = ()
    seed: int = 0
    class_logits: bool | None = None

    def logit_columns(self) -> int:
        """The least number of columns that an output (n, columns) must have to be class logits; 0 if none is.

        Labels are taken for class indices if they are whole numbers from 0, one for each image, and not all equal:
        unlabeled images come with labels that are all 0. Then logits have a column for the largest label at least, and
        there are always two of them: one number alone, such as a regressor's, has no shift to remove.
        """
        if self.class_logits is not None:
            return 2 if self.class_logits else 0
        labels = [found for _, found in self.batches]
        if not labels or not all(_may_be_classes(found) for found in labels):
            return 0
        known = torch.cat([found.detach().flatten().cpu() for found in labels])
        largest, least = int(known.max()), int(known.min())
        return largest + 1 if 0 <= least < largest else 0

    def in_small_batches(self) -> "ScoringInputs":
        """These inputs in batches of which all activations fit into 2 GiB, as the gradients of a batch need them all.

        Larger batches are divided into equal parts. The size of an activation is that in the trace.
        """
        most = int(_GRADIENT_BYTES // (4 * _TENSORS_KEPT * max(_values_of_an_image(self.graph), 1)))
        parts = [part for batch in self.batches for part in _parts(batch, max(most, 1))]
        return replace(self, batches=tuple(parts))


_GRADIENT_BYTES, _TENSORS_KEPT = 2**31, 2
"""Memory for a backward pass, and how many tensors stay there of each that a module returns: it, and one more for what
modules compute inside."""


def _values_of_an_image(graph: ChannelGraph) -> int:
    """Return how many numbers the innermost modules return for one image."""
    outer = {name.rpartition(".")[0] for name in graph.module_calls if name}
    calls = (call for name, found in graph.module_calls.items() if name not in outer for call in found)
    return sum(math.prod(shape) for call in calls for shape in call.returned)


def _parts(batch: tuple[Any, Any], most: int) -> list[tuple[Any, Any]]:
    """Return a batch in equal parts of at most so many images."""
    inputs, labels = batch
    images = count_images(inputs)
    count = -(-images // most)
    if count <= 1 or count_images(labels) != images:
        return [batch]
    bounds = [images * number // count for number in range(count + 1)]
    parts = (slice(*pair) for pair in itertools.pairwise(bounds))
    return [(take(inputs, part), take(labels, part)) for part in parts]


def _may_be_classes(labels: object) -> bool:
    if not isinstance(labels, Tensor) or labels.dim() != 1 or not len(labels):
        return False
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


class Importance(ABC):
    """How much a channel matters: higher is kept.

    Implementations are frozen dataclasses whose fields are their configuration.
    """

    @abstractmethod
    def scores(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """Score every channel of every prunable axis.

        Returns:
            Axis name to (axis size,) float64, finite, not negative. The unit is the method's own.
        """


def checked_scores(scores: Mapping[str, FloatArray], graph: ChannelGraph, source: object) -> dict[str, FloatArray]:
    """The scores of every prunable axis, if all of them can be ranked.

    Args:
        scores: Axis name to (axis size,).
        graph: The graph the axes belong to.
        source: Who made the scores, for the message.

    Raises:
        ModelError: If an axis is missing, has another shape, or holds NaN or infinity.
    """
    for axis in graph.prunable:
        if axis.name not in scores:
            raise ModelError(f"`scores` must hold every prunable axis; {source!r} gave none for {axis.name!r}.")
        values = np.asarray(scores[axis.name])
        if values.shape != (axis.size,):
            raise ModelError(
                f"`scores[{axis.name!r}]` must have shape ({axis.size},); got {values.shape} from {source!r}."
            )
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ModelError(
                f"`scores[{axis.name!r}]` must be finite; got {values[bad[0]]} for channel {bad[0]} and {len(bad)} "
                f"such of {axis.size} from {source!r}. Look for NaN or infinity in the weights or the batches."
            )
    return {axis.name: np.asarray(scores[axis.name], dtype=np.float64) for axis in graph.prunable}


@dataclass(frozen=True, eq=False)
class Filters:
    """All weights that one tensor holds for the channels of an axis.

    Attributes:
        site: Where they come from.
        rows: (axis size, weights per channel) float64.
    """

    site: Site
    rows: FloatArray


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
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
        tensors: The model's parameters and buffers, see `tensors_by_name`.

    Raises:
        ModelError: If a weight is NaN or infinite.
    """
    return tuple(_each_producer(axis, tensors))


def _each_producer(axis: ChannelAxis, tensors: Mapping[str, Tensor]) -> Iterator[Filters]:
    """Yield the rows of one tensor after the other, because they are large."""
    weights = [site for site in axis.sites if tensors[site.tensor].ndim > 1]
    sites = [site for site in weights if site.role is Role.OUTPUT] or weights or list(axis.sites)
    for site in sites:
        yield Filters(site, _rows(tensors[site.tensor], site))


def mean_over_producers(inputs: ScoringInputs, score: Callable[[FloatArray], FloatArray]) -> dict[str, FloatArray]:
    """Score the rows of each producer of each axis and average over the producers.

    Args:
        inputs: The model and its graph.
        score: (channels, weights per channel) to (channels,).
    """
    tensors = tensors_by_name(inputs.model)
    return {
        axis.name: np.mean([score(filters.rows) for filters in _each_producer(axis, tensors)], axis=0)
        for axis in inputs.graph.prunable
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


@settings
class L1(Importance):
    """Sum of the absolute weights of a filter: s_c = sum_d |W[c, d]|.

    W is (channels, weights per channel). On a coupled axis, the mean of s over its producers: a producer with larger
    weights has more to say, as its channels contribute more to the sum that couples them.

    References:
        Li et al., Pruning Filters for Efficient ConvNets, arXiv:1608.08710, Section 3.1.
    """

    def scores(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """(axis size,) per axis, in units of the weights. Raises ModelError for weights that are not finite."""
        scores = mean_over_producers(inputs, lambda rows: np.abs(rows).sum(axis=1))
        return checked_scores(scores, inputs.graph, self)


@settings
class L2(Importance):
    """Euclidean norm of a filter: s_c = sqrt(sum_d W[c, d]^2).

    W is (channels, weights per channel). On a coupled axis, the mean of s over its producers.

    References:
        He et al., Soft Filter Pruning, arXiv:1808.06866, Section 3 (the p-norm with p = 2).
    """

    def scores(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """(axis size,) per axis, in units of the weights. Raises ModelError for weights that are not finite."""
        return checked_scores(mean_over_producers(inputs, norms), inputs.graph, self)


@settings
class GeometricMedian(Importance):
    """Distance of a filter to all filters of its layer: s_c = sum_j ||W[c] - W[j]||_2 (FPGM).

    A filter with a small sum lies near the geometric median of the layer and is the most replaceable by the others,
    however large its norm. All pairs are computed, in float64. On a coupled axis, the mean of s over its producers.

    References:
        He et al., Filter Pruning via Geometric Median, arXiv:1811.00250, Section 3 (not at
        hand here, so the equation has no number).
    """

    def scores(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """(axis size,) per axis, in units of the weights. Raises ModelError for weights that are not finite."""
        return checked_scores(mean_over_producers(inputs, distance_sums), inputs.graph, self)


@settings
class LAMP(Importance):
    """Share of a channel's energy among the channels of its layer that are at least as strong.

    With e_c = sum_d W[c, d]^2:  s_c = e_c / sum of e_j over every j that is not weaker than c (c included). Equal
    energies are ordered by channel number. The strongest channel scores 1, so scores compare across layers as they
    are: rank globally with `secateur.search.as_scored`. On a coupled axis, the mean of s over its producers.

    References:
        Lee et al., Layer-adaptive Sparsity for the Magnitude-based Pruning, arXiv:2010.07611 (the LAMP score). There
        for single weights; here for whole channels [ours].
    """

    def scores(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """(axis size,) per axis, in [0, 1]. Raises ModelError for weights that are not finite."""
        return checked_scores(mean_over_producers(inputs, lamp), inputs.graph, self)


@settings
class RandomImportance(Importance):
    """Uniform random scores in [0, 1): the baseline every criterion must beat.

    They depend on the seed of the inputs and the position of the axis in the graph, on nothing else.
    """

    def scores(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """(axis size,) per axis, dimensionless."""
        return {
            axis.name: np.random.default_rng([inputs.seed, position]).random(axis.size)
            for position, axis in enumerate(inputs.graph.prunable)
        }


def norms(rows: FloatArray) -> FloatArray:
    """(channels,) Euclidean norm of each row of (channels, d)."""
    return np.sqrt(np.einsum("cd,cd->c", rows, rows))


def distance_sums(rows: FloatArray) -> FloatArray:
    """(channels,) sum of the Euclidean distances of each row of (channels, d) to every row.

    ||a - b||^2 = a.a + b.b - 2 a.b, one matrix product for all pairs. Rows are centered first: distances stay and the
    cancellation shrinks to a relative 1e-8 of the spread of the rows in the worst case (equal rows).
    """
    centered = rows - rows.mean(axis=0)
    gram = centered @ centered.T
    squares = np.diagonal(gram)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0)
    np.fill_diagonal(distances, 0)
    return np.sqrt(distances).sum(axis=1)


def lamp(rows: FloatArray) -> FloatArray:
    """(channels,) LAMP score of each row of (channels, d); rows of zeros score 0."""
    energy = np.einsum("cd,cd->c", rows, rows)
    order = np.argsort(energy, kind="stable")
    ascending = energy[order]
    at_least = np.cumsum(ascending[::-1])[::-1]
    scores = np.empty_like(energy)
    scores[order] = np.divide(ascending, at_least, out=np.zeros_like(ascending), where=at_least != 0)
    return scores


@settings
class BatchNormScale(Importance):
    """Absolute scale of the batch norm on a channel: s_c = |gamma_c|.

    With several batch norms on an axis, the mean of |gamma_c| over them. An axis without one (or with batch norms that
    have no scale) falls back to the mean over its producers of the L2 norm of the filter, divided by its mean over
    the channels, so that it is of the order of a fresh gamma (1).

    References:
        Liu et al., Learning Efficient Convolutional Networks through Network Slimming, arXiv:1708.06519, Section 3.
    """

    def scores(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """(axis size,) per axis, dimensionless. Raises ModelError for weights that are not finite."""
        tensors = tensors_by_name(inputs.model)
        modules = dict(inputs.model.named_modules())
        scores = {axis.name: _of_axis(axis, tensors, modules) for axis in inputs.graph.prunable}
        return checked_scores(scores, inputs.graph, self)


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
