"""What TAS and SWP share: candidate widths and depths, initial and final weights, and splits of the training images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._arrays import IntArray
from secateur._kinds import settings
from secateur._runtime import copy_model
from secateur.data.loaders import ItemSplit
from secateur.errors import BudgetError, DataError
from secateur.graph.graph import Block, ChannelGraph
from secateur.nas.supernet import Supernet, measure_batch_norms
from secateur.search.base import SearchContext
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.tasks.imitation import Imitation
from secateur.train.checkpoint import tensors_of, write_tensors_
from secateur.train.config import Batches
from secateur.train.recipes import check_resettable, reset_weights_


@settings
class Widths:
    """The candidate widths of each axis.

    Attributes:
        kept_fractions: Candidate widths as fractions of the full one, which is always among them. Each becomes the
            nearest width that the search space allows.
        truncated: Whether each becomes the widest allowed width of at most int(C * fraction) channels instead, as in
            the reference code: 4, 6, 8, 9, 11, 12, 14, 16 of 16 channels. The nearest are 5, 6, 8, 10, 11, 13, 14, 16.

    Raises:
        BudgetError: If a fraction is not above 0 and at most 1.

    References:
        Dong & Yang (TAS), arXiv:1905.09717; the fractions are those of the reference code.
    """

    kept_fractions: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    truncated: bool = False

    def __post_init__(self) -> None:
        if not self.kept_fractions or not all(0 < f <= 1 for f in self.kept_fractions):
            raise BudgetError(f"`kept_fractions` must lie above 0 and up to 1; got {self.kept_fractions}.")

    def of(self, levels: IntArray) -> tuple[int, ...]:
        """Return the candidates among the allowed widths of an axis, ascending, the full one last."""
        if self.truncated:
            whole = np.array([int(levels[-1] * fraction) for fraction in (*self.kept_fractions, 1.0)])
            below = np.maximum(np.searchsorted(levels, whole, side="right") - 1, 0)
            return tuple(int(width) for width in np.unique(levels[below]))
        # A width must be one that the search space allows, so the nearest one is taken; of two equally near ones,
        # `argmin` takes the narrower.
        wanted = np.array([*self.kept_fractions, 1.0]) * levels[-1]
        nearest = np.abs(levels[None, :] - wanted[:, None]).argmin(axis=1)
        # Several fractions can have the same nearest width, which is one candidate only.
        return tuple(int(width) for width in np.unique(levels[nearest]))


@settings
class Depths:
    """The candidate depths of each chain of residual blocks, which keeps its first blocks.

    Attributes:
        stride: Difference between candidate depths in chains of more than ``short`` blocks; it is 1 in shorter ones.
        short: The most blocks of a chain for which every depth is a candidate.

    Raises:
        BudgetError: If a number is below 1.

    References:
        Dong & Yang (TAS), arXiv:1905.09717. The reference code has 1, 3, 5, ... blocks of a stage, or 1, 2, 3, and
        counts the block that changes the resolution. That block is not removable here, so the smallest candidate of
        the chain behind it is 0 blocks.
    """

    stride: int = 2
    short: int = 4

    def __post_init__(self) -> None:
        if self.stride < 1 or self.short < 1:
            raise BudgetError(f"`stride` and `short` must be at least 1; got {self.stride} and {self.short}.")

    def of(self, blocks: int) -> tuple[int, ...]:
        """Return the candidate depths of a chain of that many blocks, ascending, the full depth last."""
        # Counted down from the full depth, which therefore is a candidate whatever the stride is.
        return tuple(range(blocks, -1, -(1 if blocks <= self.short else self.stride)))[::-1]

    def of_chains(self, graph: ChannelGraph) -> list[tuple[int, ...]]:
        """Return the candidates of every chain of a graph."""
        return [self.of(len(chain)) for chain in graph.chains]


@settings
class ReferenceDepths:
    """The candidate depths of the reference code of TAS, which counts all blocks of a stage.

    A stage of n blocks has the candidates 1, 3, 5, ... and n (1, 2, 3 if n = 3; 1, 2 if n = 2), or in proportion to the
    shallowest stage of m blocks: int(n * j / m) for j = 1 ... m. A block that cannot be removed, since it changes the
    resolution, counts as one that is always kept.

    Attributes:
        proportional: Whether depths are those of the reference code for ImageNet.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, reference code, get_depth_choices for CIFAR and for ImageNet.
    """

    proportional: bool = False

    def of_chains(self, graph: ChannelGraph) -> list[tuple[int, ...]]:
        """Return the numbers of blocks of each chain that may stay, ascending, the full depth last."""
        always = [_blocks_beside(graph, chain) for chain in graph.chains]
        stages = [len(chain) + kept for chain, kept in zip(graph.chains, always, strict=True)]
        shallowest = min(stages, default=1)
        found: list[tuple[int, ...]] = []
        for blocks, kept in zip(stages, always, strict=True):
            if self.proportional:
                depths = [int(blocks * j / shallowest) for j in range(1, shallowest + 1)]
            else:
                depths = [*range(1, blocks + 1, 1 if blocks <= 3 else 2), blocks]
            found.append(tuple(sorted({depth - kept for depth in depths if depth >= kept})))
        return found


def _blocks_beside(graph: ChannelGraph, chain: Sequence[Block]) -> int:
    """Count the modules that lie beside the blocks of a chain in one container, but are none of them."""
    modules = [block.replacements[0].module for block in chain]
    parents = {module.rpartition(".")[0] for module in modules}
    parent = next(iter(parents))
    if len(parents) > 1 or not parent or any(len(block.replacements) > 1 for block in chain):
        return 0
    depth = parent.count(".") + 1
    beside = {".".join(name.split(".")[: depth + 1]) for name in graph.tensors if name.startswith(f"{parent}.")}
    return len(beside - set(modules))


@settings
class Pretrained:
    """Start the search from the model's weights, so that a search of few epochs judges trained networks."""

    def of(self, model: nn.Module, seed: int) -> nn.Module:
        """Return the model itself."""
        # Not a copy: `Supernet` makes its own.
        del seed
        return model


@settings
class RandomInit:
    """Start the search from random weights, as in the paper.

    This needs as many epochs as a training, and usually `SupernetWeights` or a student that is trained from scratch.
    """

    def of(self, model: nn.Module, seed: int) -> nn.Module:
        """Return a copy with random weights.

        Raises:
            ModelError: If a module has parameters and no way to draw them.
        """
        check_resettable(model, "init", "search from the weights of the model (init=Pretrained()).")
        return reset_weights_(copy_model(model), seed)


@settings
class OriginalWeights:
    """Cut the student from the original weights, which after a short search are better than the supernet's."""

    def check(self, problem: SearchContext) -> None:
        """Accept any search."""

    def of(self, supernet: Supernet, calibration: Sequence[Tensor], problem: SearchContext) -> None:
        """Return None, which stands for the model's own weights."""


@dataclass(frozen=True)
class SupernetWeights:
    """Cut the student from the weights that the search has trained.

    This is for long searches, and for models that come without trained weights.
    """

    def check(self, problem: SearchContext) -> None:
        """Refuse, before it begins, a search whose weights could not be used.

        Raises:
            DataError: If there are batch norms and no images to measure them on.
        """
        inputs = problem.inputs
        norms = any(isinstance(getattr(module, "running_var", None), Tensor) for module in inputs.model.modules())
        if norms and not inputs.batches:
            raise DataError(
                "`batches` must hold training images for SupernetWeights, which measures batch norms on them; got none."
                " Pass some, or use student_weights=OriginalWeights()."
            )

    def of(self, supernet: Supernet, calibration: Sequence[Tensor], problem: SearchContext) -> Mapping[str, Tensor]:
        """Return the trained model's ``state_dict`` in the original order of channels, with measured batch norms."""
        supernet.merge_norms_()
        # The running statistics of the supernet belong to no single subnet, so those of the full net are measured.
        statistics = measure_batch_norms(supernet, supernet.full, calibration)
        write_tensors_(supernet.model, {**tensors_of(supernet.model), **statistics})
        trained = copy_model(problem.inputs.model)
        write_tensors_(trained, tensors_of(supernet.in_original_order()))
        return {name: tensor.detach() for name, tensor in trained.state_dict().items()}


def split_in_half(images: Batches, seed: int) -> tuple[Batches, Batches]:
    """Split images into two halves, class by class.

    Where a class has an odd number of images, the halves take turns with the larger part.

    Args:
        images: With ``labels``, (n,), and ``subset``, as the splits of `secateur.data` have them.
        seed: Seed of the split.

    Returns:
        Two disjoint parts that differ by at most one image.

    Raises:
        DataError: If the images cannot be split, or a half would hold fewer than two classes.
    """
    labels, subset = _labels_and_subset(images)
    by_class = _shuffled_by_class(labels, seed)
    # Every second image in order of class: half of each class.
    # Sorted back into the order of the data set: the shuffle only decides which image belongs to which half.
    parts = [np.sort(by_class[first::2]) for first in (0, 1)]
    for part in parts:
        _check_classes(labels, part)
    first, second = (subset(torch.from_numpy(part)) for part in parts)
    return first, second


def set_aside(images: Batches, count: int, seed: int) -> tuple[Batches, Batches]:
    """Set images aside, from each class in proportion to its size.

    Args:
        images: As for `split_in_half`.
        count: How many to set aside; at most half of all images.
        seed: Seed of the choice.

    Returns:
        The rest, and the images set aside.

    Raises:
        DataError: If the images cannot be split, or those set aside would hold fewer than two classes.
    """
    labels, subset = _labels_and_subset(images)
    by_class = _shuffled_by_class(labels, seed)
    aside = np.zeros(len(labels), dtype=np.bool_)
    # Positions evenly spaced over the images in order of class give each class its share.
    aside[np.linspace(0, len(labels), min(count, len(labels) // 2), endpoint=False).astype(np.int64)] = True
    parts = [np.sort(by_class[~aside]), np.sort(by_class[aside])]
    _check_classes(labels, parts[1])
    rest, part = (subset(torch.from_numpy(part)) for part in parts)
    return rest, part


def check_searched_task(task: Task, context: SearchContext, name: str) -> None:
    """Refuse a task or a model that a search with a supernet is not for.

    Args:
        task: What the supernet is trained for.
        context: For the model and its calibration images.
        name: Of the strategy, for the message.

    Raises:
        DataError: If there are no targets, or the model does not take one tensor and return one.
    """
    if isinstance(task, Imitation):
        raise DataError(
            f"`task` must have targets for {name}, which trains a supernet; got Imitation. Use Knapsack or Fastest, "
            "which need no labels."
        )
    if not context.inputs.batches:
        return
    inputs: Any = context.inputs.batches[0][0]
    outputs: Any = None
    if isinstance(inputs, Tensor):
        with torch.no_grad():
            outputs = copy_model(context.inputs.model).eval()(inputs[:2])
    if not isinstance(outputs, Tensor):
        got = type(inputs if outputs is None else outputs).__name__
        raise DataError(
            f"`model` must take one tensor and return one for {name}; got {got}. Use Knapsack or Fastest, which take "
            "any model."
        )


def settings_of_task(task: Task) -> dict[str, str]:
    """Return what a resumed search must have in common; nothing for classifiers, as in the first release."""
    return {} if task == Classification() else {"task": repr(task)}


def _labels_and_subset(images: Batches) -> tuple[IntArray, Callable[[Tensor], Batches]]:
    labels, subset = getattr(images, "labels", None), getattr(images, "subset", None)
    if labels is None and isinstance(images, ItemSplit):
        # Targets of other tasks have no classes to take turns by.
        return np.full(len(images), -1), lambda index: images.subset(index.tolist())
    if not isinstance(labels, Tensor) or subset is None:
        raise DataError(
            f"`data.train` must have `labels` and `subset(index)` to be split in two; got {type(images).__name__}. "
            "Use secateur.load_data, or give your class both."
        )
    return labels.cpu().numpy().astype(np.int64), subset


def _shuffled_by_class(labels: IntArray, seed: int) -> IntArray:
    # A stable sort by class keeps the random order within each class.
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    return shuffled[np.argsort(labels[shuffled], kind="stable")]


def _check_classes(labels: IntArray, part: IntArray) -> None:
    found = np.unique(labels[part])
    if found.tolist() == [-1]:
        return
    if len(found) < 2:
        raise DataError(
            f"`data.train` must give both parts images of two classes or more; got {len(found)} in one of them "
            f"({len(labels)} images of {len(np.unique(labels))} classes in all). Use more images."
        )
