"""What the principal components of a layer are taken of: its weights or its activations."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import DataError, ModelError
from secateur.graph import ChannelAxis, shadow_of
from secateur.importance import Evidence, Filters, producers, readers, tensors_of
from secateur.search._covariance import RunningCovariance, observe
from secateur.search._problem import FloatArray
from secateur.search._spectrum import (
    Covariance,
    Matrix,
    eigenvalues_of_covariance,
    eigenvalues_of_rows,
    pooled,
    unexplained_variance,
)


class Source(ABC):
    """What the principal components are taken of."""

    @abstractmethod
    def unexplained(self, evidence: Evidence) -> dict[str, FloatArray]:
        """1 - CCR(i) of every prunable axis: name to (size + 1,), see `unexplained_variance`."""


@dataclass(frozen=True)
class Weights(Source):
    """Filters, with the batch norm that follows them folded in.

    W_l is (filters N, weights per filter D); filters are the variables, weights the samples. A batch norm undoes any
    scale of the filter before it, so that scale says nothing. The filter that acts is gamma / sqrt(running variance
    + eps) * W[c], which stays the same when W is rescaled and the running variance follows. A filter is folded if the
    batch norm reads the very tensor its module returns; this is seen by running a copy of the model once on the
    example it was traced with. Batch norms without running statistics are not folded.

    Axes without a producing convolution or linear use the tensors that `secateur.importance.producers` names.

    Attributes:
        matrix: Covariance or correlation. Correlation removes every scale, folded or not.

    References:
        Wang et al. (3AS), arXiv:2202.10461, PCA on weights as described in notes about it; folding is ours.
    """

    matrix: Matrix = field(default_factory=Covariance)

    def unexplained(self, evidence: Evidence) -> dict[str, FloatArray]:
        """1 - CCR(i) by axis. Raises ModelError for weights that are not finite."""
        return _of_weights(evidence, self.matrix, _fold_scales(evidence.model, _followers(evidence)))


@dataclass(frozen=True)
class RawWeights(Source):
    """Filters as they are stored, as in 3AS: the scale of a filter before a batch norm counts.

    Attributes:
        matrix: Covariance or correlation.

    References:
        Wang et al. (3AS), arXiv:2202.10461, PCA on weights as described in notes about it.
    """

    matrix: Matrix = field(default_factory=Covariance)

    def unexplained(self, evidence: Evidence) -> dict[str, FloatArray]:
        """1 - CCR(i) by axis. Raises ModelError for weights that are not finite."""
        return _of_weights(evidence, self.matrix, {})


@dataclass(frozen=True)
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

    def unexplained(self, evidence: Evidence) -> dict[str, FloatArray]:
        """1 - CCR(i) by axis.

        Raises:
            DataError: If the evidence has no batches.
            ModelError: If an activation is not finite.
        """
        if not evidence.batches:
            raise DataError("`batches` must hold images for Activations; got none. Pass calibration data.")
        taps = _taps(evidence)
        measured = observe(shadow_of(evidence.model), evidence.graph, taps, [images for images, _ in evidence.batches])
        weights: dict[str, FloatArray] | None = None
        found: dict[str, FloatArray] = {}
        for axis in evidence.graph.prunable:
            spectra = [
                self._spectrum(axis, run, taps[axis.name][module]) for module, run in measured[axis.name].items()
            ]
            if not spectra:
                weights = weights or _of_weights(evidence, self.matrix, {})
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


def _of_weights(evidence: Evidence, matrix: Matrix, folds: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    tensors = tensors_of(evidence.model)
    found: dict[str, FloatArray] = {}
    for axis in evidence.graph.prunable:
        spectra: list[FloatArray] = []
        for filters in producers(axis, tensors):
            rows = _folded(filters, tensors[filters.site.tensor], folds.get(filters.site.tensor))
            spectra.append(unexplained_variance(eigenvalues_of_rows(rows, matrix), axis.size, rows.shape[1] - 1))
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


def _followers(evidence: Evidence) -> dict[str, str]:
    """The batch norm that reads the output of each producing module, by module name."""
    names = {name for axis in evidence.graph.prunable for name in _producing_modules(axis, evidence.model)}
    if not evidence.graph.example:
        return {}
    with torch.no_grad():
        return readers(shadow_of(evidence.model), evidence.graph.example, names)


def _producing_modules(axis: ChannelAxis, model: nn.Module) -> dict[str, int]:
    """Modules whose ``weight`` produces the axis, with the number of inputs that their outputs combine (their rank)."""
    tensors = tensors_of(model)
    found: dict[str, int] = {}
    for filters in producers(axis, tensors):
        module, _, name = filters.site.tensor.rpartition(".")
        if name == "weight":
            groups = getattr(model.get_submodule(module), "groups", 1)
            found[module] = filters.rows.shape[1] * (groups if isinstance(groups, int) else 1)
    return found


def _taps(evidence: Evidence) -> dict[str, dict[str, int]]:
    """For each axis: the modules whose outputs show it, with the cap that their weights put on the rank."""
    after = _followers(evidence)
    return {
        axis.name: {after.get(name, name): cap for name, cap in _producing_modules(axis, evidence.model).items()}
        for axis in evidence.graph.prunable
    }
