"""The training images in two: one part teaches the weights, the other judges the choice."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError
from secateur.search._space import IntArray
from secateur.train import Batches


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
