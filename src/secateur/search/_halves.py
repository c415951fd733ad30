"""The training images in two: one half teaches the weights, the other judges the choice."""

import numpy as np
import torch
from torch import Tensor

from secateur.errors import DataError
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
    labels, subset = getattr(images, "labels", None), getattr(images, "subset", None)
    if not isinstance(labels, Tensor) or subset is None:
        raise DataError(
            f"`data.train` must have `labels` and `subset(index)` to be split in two; got {type(images).__name__}. "
            "Use secateur.load_data, or give your class both."
        )
    classes = labels.cpu().numpy()
    shuffled = np.random.default_rng(seed).permutation(len(classes))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    parts = [np.sort(by_class[first::2]) for first in (0, 1)]
    for part in parts:
        found = np.unique(classes[part])
        if len(found) < 2:
            raise DataError(
                f"`data.train` must give both halves images of two classes or more; got {len(found)} in one of them "
                f"({len(classes)} images of {len(np.unique(classes))} classes in all). Use more images."
            )
    first, second = (subset(torch.from_numpy(part)) for part in parts)
    return first, second
