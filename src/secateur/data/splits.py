"""Which images are used for training, and which of them are held out."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError

TEST_SEED = 0
"""Seed of the test split of sets that have none. It is fixed, so that everybody tests on the same images."""


def count_training_images(labels: Tensor, limit: int | None, classes: Sequence[str]) -> int:
    """Return the number of training images to use.

    Args:
        labels: (n,) classes of the whole training set.
        limit: Number of images to use, the first ones; None uses all.
        classes: Class names, by label.

    Raises:
        DataError: If ``limit`` is more than there are, or leaves a class without an image.
    """
    n = len(labels)
    if limit is None:
        return n
    if not 1 <= limit <= n:
        raise DataError(f"`limit` must lie between 1 and the {n} training images there are; got {limit}.")
    absent = sorted(set(labels.tolist()) - set(labels[:limit].tolist()))
    if absent:
        raise DataError(
            f"`limit` must hold at least one image of each class; the first {limit} training images have none of "
            f"class {classes[absent[0]]!r} ({len(absent)} of {len(classes)} classes are absent). Raise it."
        )
    return limit


def hold_out(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split positions into two parts, class by class, so that both have the classes in the same proportion.

    The number held out is round(fraction * n), at least 1. Each class gives its share rounded down and the classes
    with the largest remainders one more (Hamilton's method); a class always keeps one image.

    Args:
        labels: (n,) classes.
        fraction: Fraction of the images to hold out, in (0, 1).
        seed: Random seed.

    Returns:
        Positions kept and positions held out, both increasing.

    Raises:
        DataError: If the fraction is outside (0, 1) or no class can spare an image.
    """
    if not 0.0 < fraction < 1.0:
        raise DataError(f"`validation_fraction` must lie in (0, 1), both excluded; got {fraction}. 0.1 is usual.")
    if seed < 0:
        raise DataError(f"`seed` must not be negative; got {seed}.")
    random = np.random.default_rng(seed)
    array = labels.numpy()
    counts = np.bincount(array)
    wanted = max(1, round(fraction * len(array)))
    quotas = fraction * counts
    taken = np.minimum(np.floor(quotas).astype(np.int64), np.maximum(counts - 1, 0))
    for c in np.argsort(-(quotas - np.floor(quotas)), kind="stable"):
        if taken.sum() < wanted and taken[c] < counts[c] - 1:
            taken[c] += 1
    if not taken.any():
        raise DataError(
            f"`validation_fraction` must leave something to validate on; got {fraction} of {len(array)} training "
            f"images, of which no class has two. Use more images."
        )
    shuffled = random.permutation(len(array))
    by_class = shuffled[np.argsort(array[shuffled], kind="stable")]
    rank = np.arange(len(array)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = np.zeros(len(array), dtype=bool)
    held[by_class] = rank < np.repeat(taken, counts)
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
