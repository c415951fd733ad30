"""Choose widths by principal components: the variance of an axis that its leading components explain."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._arrays import FloatArray, IntArray
from secateur._batches import call_model
from secateur._kinds import settings
from secateur._runtime import torch_threads
from secateur.errors import DataError, ModelError
from secateur.graph._record import shadow_copy
from secateur.graph.graph import ChannelAxis, ChannelGraph
from secateur.graph.trace import Example
from secateur.search.base import Proposal, SearchContext, Strategy, keep_best
from secateur.search.importance import L2, Filters, Importance, ScoringInputs, producers, tensors_by_name
from secateur.search.importance_data import channel_positions, readers
from secateur.search.ranking import widen_to_budget

_PIECE = 1 << 22
"""Numbers turned into float64 at a time (32 MB)."""


class RunningCovariance:
    """Covariance over all samples seen so far, in float64, by the parallel update of Chan, Golub and LeVeque (1983).

    Attributes:
        samples: Number of samples seen.
    """

    def __init__(self, channels: int):
        self.samples = 0
        self._mean = np.zeros(channels)
        self._scatter = np.zeros((channels, channels))

    def add(self, data: FloatArray) -> None:
        """See (channels, samples)."""
        count = data.shape[1]
        total = self.samples + count
        mean = data.mean(axis=1)
        centered = data - mean[:, None]
        shift = mean - self._mean
        self._scatter += centered @ centered.T + np.outer(shift, shift) * (self.samples * count / total)
        self._mean += shift * (count / total)
        self.samples = total

    def covariance(self) -> FloatArray:
        """(channels, channels), divided by the number of samples."""
        return self._scatter / self.samples


def observing_covariance(
    model: nn.Module, graph: ChannelGraph, taps: Mapping[str, Mapping[str, int]], batches: Sequence[Example]
) -> dict[str, dict[str, RunningCovariance]]:
    """Run the batches and gather the covariance of every axis at every module that shows all of its channels.

    A channel with several positions gives as many samples.

    Args:
        model: Runs with hooks, which are removed again. It should be a copy in evaluation mode.
        graph: For the channels of module outputs.
        taps: Axis name to module names.
        batches: Inputs.

    Returns:
        Axis name to module name to its covariance; modules that do not show the axis, or never ran, are left out.
    """
    found: dict[str, dict[str, RunningCovariance]] = {axis: {} for axis in taps}
    hooks: list[Any] = []
    for axis, modules in taps.items():
        for module in modules:
            positions = channel_positions(graph, module, axis)
            if positions is None:
                continue
            found[axis][module] = RunningCovariance(len(positions))
            hook = _gather(found[axis][module], positions, graph.activations[module].dim)
            hooks.append(model.get_submodule(module).register_forward_hook(hook))
    try:
        with torch.no_grad():
            for images in batches:
                call_model(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    return {axis: {name: run for name, run in runs.items() if run.samples > 1} for axis, runs in found.items()}


def _gather(run: RunningCovariance, positions: IntArray, dim: int) -> Callable[..., None]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        flat = output.detach().movedim(dim, 0).flatten(1).cpu()
        data = flat[torch.from_numpy(positions)].flatten(1)
        for piece in data.split(max(1, _PIECE // len(data)), dim=1):
            run.add(piece.double().numpy())

    return hook


class Matrix(ABC):
    """Which matrix of the variables is analyzed: diag(s) C diag(s), C their covariance matrix."""

    @abstractmethod
    def scales(self, variances: FloatArray) -> FloatArray:
        """(variables,) s from the (variables,) diagonal of C."""


@settings
class Covariance(Matrix):
    """The covariance matrix itself, s = 1: a filter with larger weights has more variance to explain."""

    def scales(self, variances: FloatArray) -> FloatArray:
        """Ones."""
        return np.ones_like(variances)


@settings
class Correlation(Matrix):
    """The correlation matrix, s = 1 / standard deviation: all filters count alike, whatever their scale.

    A variable without variance has no correlation and counts nothing.
    """

    def scales(self, variances: FloatArray) -> FloatArray:
        """1 / sqrt(variance), or 0 where there is none."""
        positive = variances > 0
        return np.where(positive, 1 / np.sqrt(np.where(positive, variances, 1.0)), 0.0)


def eigenvalues_of_rows(rows: FloatArray, matrix: Matrix) -> FloatArray:
    """Eigenvalues of the matrix of (variables, samples) data, up to a common factor; at most min(n, d) of them."""
    centered = rows - rows.mean(axis=1, keepdims=True)
    centered = centered * matrix.scales(np.einsum("nd,nd->n", centered, centered))[:, None]
    # The smaller Gram matrix has the same non-zero eigenvalues.
    data = torch.from_numpy(centered)
    # Eigenvalues take many small steps in which threads wait for each other. On a busy machine with two cores, a
    # 512 x 512 matrix took 10 s with two threads and 0.03 s with one.
    with torch_threads(1):
        gram = data @ data.T if len(data) <= data.shape[1] else data.T @ data
        return np.asarray(torch.linalg.eigvalsh(gram).numpy(), dtype=np.float64)


def eigenvalues_of_covariance(covariance: FloatArray, matrix: Matrix) -> FloatArray:
    """Eigenvalues of the matrix of (variables, variables) covariances."""
    scales = matrix.scales(np.diagonal(covariance))
    with torch_threads(1):
        return np.asarray(torch.linalg.eigvalsh(torch.from_numpy(covariance * scales * scales[:, None])), np.float64)


def unexplained_variance(eigenvalues: FloatArray, size: int, rank: int, *, stretched: bool = True) -> FloatArray:
    """1 - CCR(i): the share of the variance that i of ``size`` components leave unexplained.

    The cumulative contribution rate is CCR(i) = sum_{j <= i} l_j / sum_j l_j over eigenvalues l_1 >= l_2 >= ...

    The shape of the data caps the number of non-zero eigenvalues at ``rank``, often below ``size`` (27 weights of a
    3 x 3 RGB filter give 64 filters a rank of 26). CCR would be 1 from there on, and the layer could never keep
    its other filters. So the spectrum is stretched: CCR(i) is read at the component i * rank / size, linear between
    whole components. CCR then reaches 1 at i = size and nowhere before, unless eigenvalues below the cap are zero.
    Without any variance there is nothing to go by, and CCR(i) = i / size.

    Args:
        eigenvalues: In any order; small negative ones are rounding errors and count as zero.
        size: Channels of the axis.
        rank: Most eigenvalues that can be non-zero.
        stretched: Whether the spectrum is stretched. If not, CCR(i) is read at the component i, as published, and is 1
            from the rank on.

    Returns:
        (size + 1,) from 1 (no component) down to 0 (all), float64. Kept as what is unexplained, because near CCR = 1
        a float has no digits left for the difference.
    """
    largest = np.maximum(np.sort(eigenvalues)[::-1][: max(min(rank, size), 0)], 0)
    total = largest.sum()
    if not total > 0:
        return 1 - np.arange(size + 1) / size
    rest = np.append(np.cumsum(largest[::-1])[::-1], 0) / total
    if not stretched:
        return np.pad(rest, (0, size + 1 - len(rest)))
    unexplained = np.interp(np.arange(size + 1) * (len(largest) / size), np.arange(len(rest)), rest)
    unexplained[0], unexplained[-1] = 1, 0
    return unexplained


def pooled(spectra: Sequence[FloatArray]) -> FloatArray:
    """The unexplained variance of an axis with several producers: the mean over them, (size + 1,).

    Each producer's variance counts as 1, since their scales do not compare. Averaging CCR is pooling the normalized
    spectra component by component.
    """
    return np.mean(np.stack(spectra), axis=0)


class Source(ABC):
    """What the principal components are taken of."""

    @abstractmethod
    def unexplained(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """1 - CCR(i) of every prunable axis: name to (size + 1,), see `unexplained_variance`."""


@settings
class FilterWeights(Source):
    """Filters, with the batch norm that follows them folded in.

    W_l is (filters N, weights per filter D); filters are the variables, weights the samples. A batch norm undoes any
    scale of the filter before it, so that scale says nothing. The filter that acts is gamma / sqrt(running variance
    + eps) * W[c], which stays the same when W is rescaled and the running variance follows. A filter is folded if the
    batch norm reads the very tensor its module returns; this is seen by running a copy of the model once on the
    example it was traced with. Batch norms without running statistics are not folded.

    Axes without a producing convolution or linear use the tensors that `secateur.importance.producers` names.

    Attributes:
        matrix: Covariance or correlation. Correlation removes every scale, folded or not.
        stretched: See `unexplained_variance`.

    References:
        Wang et al. (3AS), arXiv:2202.10461, PCA on weights as described in notes about it; folding is ours.
    """

    matrix: Matrix = field(default_factory=Covariance)
    stretched: bool = True

    def unexplained(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """1 - CCR(i) by axis. Raises ModelError for weights that are not finite."""
        folds = _fold_scales(inputs.model, _followers(inputs))
        return _of_weights(inputs, self.matrix, folds, stretched=self.stretched)


@settings
class RawWeights(Source):
    """Filters as they are stored, as in 3AS: the scale of a filter before a batch norm counts.

    Attributes:
        matrix: Covariance or correlation.
        stretched: See `unexplained_variance`; False is the published method.

    References:
        Wang et al. (3AS), arXiv:2202.10461, PCA on weights as described in notes about it.
    """

    matrix: Matrix = field(default_factory=Covariance)
    stretched: bool = True

    def unexplained(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """1 - CCR(i) by axis. Raises ModelError for weights that are not finite."""
        return _of_weights(inputs, self.matrix, {}, stretched=self.stretched)


@settings
class Activations(Source):
    """Outputs of the producing modules on the batches; channels are the variables, images and positions the samples.

    The output is taken after the batch norm that reads it, if there is one, before the activation function. A coupled
    axis pools its producers. An axis with no module to look at uses its weights (`RawWeights`).

    Attributes:
        matrix: Covariance or correlation.

    References:
        Suau et al. (PFA), arXiv:1807.10585, and Garg et al., arXiv:1812.06224: PCA of a layer's responses. PFA pools
        positions by their maximum and uses the correlation; here every position is a sample.
    """

    matrix: Matrix = field(default_factory=Covariance)

    def unexplained(self, inputs: ScoringInputs) -> dict[str, FloatArray]:
        """1 - CCR(i) by axis.

        Raises:
            DataError: If there are no batches.
            ModelError: If an activation is not finite.
        """
        if not inputs.batches:
            raise DataError("`batches` must hold images for Activations; got none. Pass calibration data.")
        taps = _taps(inputs)
        measured = observing_covariance(
            shadow_copy(inputs.model), inputs.graph, taps, [images for images, _ in inputs.batches]
        )
        weights: dict[str, FloatArray] | None = None
        found: dict[str, FloatArray] = {}
        for axis in inputs.graph.prunable:
            spectra = [
                self._spectrum(axis, run, taps[axis.name][module]) for module, run in measured[axis.name].items()
            ]
            if not spectra:
                weights = weights or _of_weights(inputs, self.matrix, {})
                spectra = [weights[axis.name]]
            found[axis.name] = pooled(spectra)
        return found

    def _spectrum(self, axis: ChannelAxis, run: RunningCovariance, inputs: int) -> FloatArray:
        covariance = run.covariance()
        if not np.isfinite(covariance).all():
            raise ModelError(
                f"activations of axis {axis.name!r} must be finite; got NaN or infinity. Look into the batches."
            )
        eigenvalues = eigenvalues_of_covariance(covariance, self.matrix)
        return unexplained_variance(eigenvalues, axis.size, min(run.samples - 1, inputs))


def _of_weights(
    inputs: ScoringInputs, matrix: Matrix, folds: Mapping[str, FloatArray], *, stretched: bool = True
) -> dict[str, FloatArray]:
    tensors = tensors_by_name(inputs.model)
    found: dict[str, FloatArray] = {}
    for axis in inputs.graph.prunable:
        spectra: list[FloatArray] = []
        for filters in producers(axis, tensors):
            rows = _folded(filters, tensors[filters.site.tensor], folds.get(filters.site.tensor))
            eigenvalues, rank = eigenvalues_of_rows(rows, matrix), rows.shape[1] - 1
            spectra.append(unexplained_variance(eigenvalues, axis.size, rank, stretched=stretched))
        found[axis.name] = pooled(spectra)
    return found


def _folded(filters: Filters, tensor: Tensor, scale: FloatArray | None) -> FloatArray:
    """Rows times the scale (positions along the site's dim,) of the batch norm, if there is one that fits."""
    site = filters.site
    if scale is None or len(scale) != tensor.shape[site.dim]:
        return filters.rows
    parts = filters.rows.reshape(*site.index.shape, -1)
    return (parts * scale[site.index][..., None]).reshape(filters.rows.shape)


def _fold_scales(model: nn.Module, followers: Mapping[str, str]) -> dict[str, FloatArray]:
    """gamma / sqrt(running variance + eps) of the batch norm after each module, by the module's weight."""
    modules = dict(model.named_modules())
    scales: dict[str, FloatArray] = {}
    for name, follower in followers.items():
        norm = modules[follower]
        variance = _numbers(norm.running_var)
        gamma = getattr(norm, "weight", None)
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = (1.0 if gamma is None else _numbers(gamma)) / np.sqrt(variance + float(getattr(norm, "eps", 0.0)))
        if not np.isfinite(scale).all():
            raise ModelError(
                f"`{follower}` must have finite scales and positive running variances; got others. Recalibrate it, or "
                "use RawWeights()."
            )
        scales[f"{name}.weight"] = scale
    return scales


def _numbers(tensor: object) -> FloatArray:
    assert isinstance(tensor, Tensor)
    return tensor.detach().cpu().double().numpy()


def _followers(inputs: ScoringInputs) -> dict[str, str]:
    """The batch norm that reads the output of each producing module, by module name."""
    names = {name for axis in inputs.graph.prunable for name in _producing_modules(axis, inputs.model)}
    if not inputs.graph.example:
        return {}
    with torch.no_grad():
        return readers(shadow_copy(inputs.model), inputs.graph.example, names)


def _producing_modules(axis: ChannelAxis, model: nn.Module) -> dict[str, int]:
    """Modules whose ``weight`` produces the axis, with the number of inputs that their outputs combine (their rank)."""
    tensors = tensors_by_name(model)
    found: dict[str, int] = {}
    for filters in producers(axis, tensors):
        module, _, name = filters.site.tensor.rpartition(".")
        if name == "weight":
            groups = getattr(model.get_submodule(module), "groups", 1)
            found[module] = filters.rows.shape[1] * (groups if isinstance(groups, int) else 1)
    return found


def _taps(inputs: ScoringInputs) -> dict[str, dict[str, int]]:
    """For each axis: the modules whose outputs show it, with the cap that their weights put on the rank."""
    after = _followers(inputs)
    return {
        axis.name: {after.get(name, name): cap for name, cap in _producing_modules(axis, inputs.model).items()}
        for axis in inputs.graph.prunable
    }


@settings
class PCASlimming(Strategy):
    """Each axis keeps as many channels as it takes principal components to explain a share tau of its variance.

    With the eigenvalues l_1 >= ... >= l_N of an axis and CCR(i) = sum_{j <= i} l_j / sum_j l_j:

        width = min { i : CCR(i) >= tau },  rounded up to an allowed width.

    One tau serves the whole network and is the largest one within the budget. Widths change only where tau passes
    some CCR(i), so tau is bisected over these values, which is exact; the room that is left then goes to the axes in
    the order in which a growing tau would widen them.

    How many channels stay comes from the components; which ones, from the importance.

    An axis of N channels whose spectrum is shorter than N (the rank cap) can still keep them all, unless the cap is
    taken literally, see `unexplained_variance`; an axis with several producers (a residual stream) averages their
    normalized spectra.

    Attributes:
        source: What the components are taken of.
        importance: Which channels stay.

    References:
        Wang et al. (3AS), arXiv:2202.10461: CCR and one pass without search. The paper's text could not be read in
        full: one tau for all layers, its bisection, pooling and the treatment of the rank cap are ours.
    """

    source: Source = field(default_factory=FilterWeights)
    importance: Importance = field(default_factory=L2)

    def find(self, context: SearchContext) -> Proposal:
        """Notes: ``tau``, and ``explained``: CCR at the width of each axis."""
        context.progress(0.0, "principal components")
        rest = self.source.unexplained(context.inputs)
        axes = context.costs.axes
        # The step from one allowed width to the next is taken when tau exceeds CCR at the former: in the order of CCR,
        # which is the order of -(1 - CCR).
        keys = [-rest[name][levels[:-1]] for name, levels in zip(axes, context.levels, strict=True)]
        found = widen_to_budget(context, keys)
        context.progress(0.5, "importance")
        scores = context.scores(self.importance)
        explained = {name: 1 - float(rest[name][width]) for name, width in zip(axes, found.widths, strict=True)}
        tau = 1 + float(np.minimum(found.threshold, 0))
        return Proposal(keep_best(context, found.widths, scores), {"tau": tau, "explained": explained})
