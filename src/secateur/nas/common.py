"""The training images in two: one part teaches the weights, the other judges the choice.

Which widths of an axis and which depths of a chain of blocks a search chooses between.

Which weights a search begins with.

Which weights the student is cut from."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from secateur._arrays import IntArray
from secateur.errors import BudgetError, DataError
from secateur.nas.supernet import Supernet, calibrated
from secateur.search.base import SearchContext
from secateur.train.checkpoint import tensors_of, write_tensors_
from secateur.train.config import Batches
from secateur.train.recipes import check_resettable, reset_weights_


def halves(images: Batches, seed: int) -> tuple[Batches, Batches]:
    """Split images in two, class by class; of an odd number of one class, the halves take turns with the larger part.

    Args:
        images: With ``labels``, (n,), and ``subset``, as the splits of `secateur.data` have them.
        seed: Chooses which go where.

    Returns:
        Two disjoint parts that differ by at most one image.

    Raises:
        DataError: If the images cannot be split, or a half would hold fewer than two classes.
    """
    labels, subset = _divisible(images)
    by_class = _shuffled_by_class(labels, seed)
    parts = [np.sort(by_class[first::2]) for first in (0, 1)]
    for part in parts:
        _check_classes(labels, part)
    first, second = (subset(torch.from_numpy(part)) for part in parts)
    return first, second


def held_out(images: Batches, count: int, seed: int) -> tuple[Batches, Batches]:
    """Set images aside, of each class as many as its share.

    Args:
        images: As for `halves`.
        count: How many to set aside; at most half of them are.
        seed: Chooses which.

    Returns:
        The rest, and the images set aside.

    Raises:
        DataError: If the images cannot be split, or those set aside would hold fewer than two classes.
    """
    labels, subset = _divisible(images)
    by_class = _shuffled_by_class(labels, seed)
    aside = np.zeros(len(labels), dtype=np.bool_)
    # Evenly spaced over the images in order of class: to each class its share.
    aside[np.linspace(0, len(labels), min(count, len(labels) // 2), endpoint=False).astype(np.int64)] = True
    parts = [np.sort(by_class[~aside]), np.sort(by_class[aside])]
    _check_classes(labels, parts[1])
    rest, part = (subset(torch.from_numpy(part)) for part in parts)
    return rest, part


def _divisible(images: Batches) -> tuple[IntArray, Callable[[Tensor], Batches]]:
    labels, subset = getattr(images, "labels", None), getattr(images, "subset", None)
    if not isinstance(labels, Tensor) or subset is None:
        raise DataError(
            f"`data.train` must have `labels` and `subset(index)` to be split in two; got {type(images).__name__}. "
            "Use secateur.load_data, or give your class both."
        )
    return labels.cpu().numpy().astype(np.int64), subset


def _shuffled_by_class(labels: IntArray, seed: int) -> IntArray:
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    return shuffled[np.argsort(labels[shuffled], kind="stable")]


def _check_classes(labels: IntArray, part: IntArray) -> None:
    found = np.unique(labels[part])
    if len(found) < 2:
        raise DataError(
            f"`data.train` must give both parts images of two classes or more; got {len(found)} in one of them "
            f"({len(labels)} images of {len(np.unique(labels))} classes in all). Use more images."
        )


@dataclass(frozen=True)
class Widths:
    """Search how many channels each axis keeps.

    Attributes:
        kept_fractions: Candidate widths as fractions of the full one; the full one is always among them. Each becomes
            the nearest width that the search space allows.

    Raises:
        BudgetError: If a fraction is not above 0 and at most 1.

    References:
        Dong & Yang (TAS), arXiv:1905.09717; the fractions are those of the reference code.
    """

    kept_fractions: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

    def __post_init__(self) -> None:
        if not self.kept_fractions or not all(0 < f <= 1 for f in self.kept_fractions):
            raise BudgetError(f"`kept_fractions` must lie above 0 and up to 1; got {self.kept_fractions}.")

    def of(self, levels: IntArray) -> tuple[int, ...]:
        """The candidates among the allowed widths of an axis, ascending, the full one last."""
        wanted = np.array([*self.kept_fractions, 1.0]) * levels[-1]
        nearest = np.abs(levels[None, :] - wanted[:, None]).argmin(axis=1)
        return tuple(int(width) for width in np.unique(levels[nearest]))


@dataclass(frozen=True)
class Depths:
    """Search how many of the first blocks each chain of residual blocks keeps.

    Attributes:
        stride: Chains of more than ``short`` blocks give up so many at a time.
        short: Chains of up to so many blocks give up one at a time.

    Raises:
        BudgetError: If a number is below 1.

    References:
        Dong & Yang (TAS), arXiv:1905.09717; 1, 3, 5, ... blocks of a stage, or 1, 2, 3, in the reference code, which
        counts the block that changes the resolution. That one is no removable block here, so the last candidate of a
        chain behind it is none at all.
    """

    stride: int = 2
    short: int = 4

    def __post_init__(self) -> None:
        if self.stride < 1 or self.short < 1:
            raise BudgetError(f"`stride` and `short` must be at least 1; got {self.stride} and {self.short}.")

    def of(self, blocks: int) -> tuple[int, ...]:
        """The candidates of a chain of so many blocks, ascending, all of them last."""
        return tuple(range(blocks, -1, -(1 if blocks <= self.short else self.stride)))[::-1]


@dataclass(frozen=True)
class Pretrained:
    """Those of the model: a search of few epochs has something to judge from the first step on."""

    def of(self, model: nn.Module, seed: int) -> nn.Module:
        """The model itself."""
        del seed
        return model


@dataclass(frozen=True)
class RandomInit:
    """New ones, as in the paper: needs as many epochs as a training, and usually `SupernetWeights` or a student that is
    trained from scratch.
    """

    def of(self, model: nn.Module, seed: int) -> nn.Module:
        """A copy with weights of its own.

        Raises:
            ModelError: If a module has parameters and no way to draw them.
        """
        check_resettable(model, "begin", "search from the weights that are there (begin=Warm()).")
        return reset_weights_(copy.deepcopy(model), seed)


@dataclass(frozen=True)
class OriginalWeights:
    """Those of the model as it was: a short search leaves weights that are worse than these, cut and repaired."""

    def check(self, problem: SearchContext) -> None:
        """Nothing is needed."""

    def of(self, supernet: Supernet, calibration: Sequence[Tensor], problem: SearchContext) -> None:
        """None: the model's own."""


@dataclass(frozen=True)
class SupernetWeights:
    """Those that the search has trained: for long searches, and for models that come without trained weights."""

    def check(self, problem: SearchContext) -> None:
        """Refuse a search that could not hand on its weights, before it begins.

        Raises:
            DataError: If there are batch norms and no images to measure them on.
        """
        evidence = problem.evidence
        norms = any(isinstance(getattr(module, "running_var", None), Tensor) for module in evidence.model.modules())
        if norms and not evidence.batches:
            raise DataError(
                "`batches` must hold training images for SearchedWeights, which measures batch norms on them; got none."
                " Pass some, or use hand_on=OriginalWeights()."
            )

    def of(self, supernet: Supernet, calibration: Sequence[Tensor], problem: SearchContext) -> Mapping[str, Tensor]:
        """The whole model's ``state_dict``, in its own order of channels, with batch-norm statistics of its own."""
        statistics = calibrated(supernet, supernet.full, calibration)
        write_tensors_(supernet.model, {**tensors_of(supernet.model), **statistics})
        trained = copy.deepcopy(problem.evidence.model)
        write_tensors_(trained, tensors_of(supernet.in_original_order()))
        return {name: tensor.detach() for name, tensor in trained.state_dict().items()}
