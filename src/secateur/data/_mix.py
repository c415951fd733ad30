"""Mixup and CutMix: pairs of a batch are mixed, and their labels become probabilities.

The only augmentation that depends on the batch, and so on the batch size and its place in the epoch: an image is mixed
with the one that stands as far from the end of the batch as it does from the beginning, as in timm.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.nn import functional

from secateur.data._augment import MIX_STREAM, Augment

Box = tuple[int, int, int, int]
"""Top, bottom, left, right, in pixels; bottom and right exclusive."""


@dataclass(frozen=True)
class Mix:
    """How one batch is mixed.

    Attributes:
        share: lambda, of each image's own label, in [0, 1].
        box: What is pasted from the other image; None blends the whole images.
    """

    share: float
    box: Box | None = None

    def images_(self, images: Tensor) -> Tensor:
        """Mix (n, c, h, w) images in place.

        Blended: lambda * x + (1 - lambda) * x', with x' the images of the batch in reverse order. Pasted: x' inside of
        the box, x outside.
        """
        if self.box is None:
            return images.copy_(images * self.share + images.flip(0) * (1.0 - self.share))
        top, bottom, left, right = self.box
        images[:, :, top:bottom, left:right] = images[:, :, top:bottom, left:right].flip(0)
        return images

    def labels(self, labels: Tensor, classes: int) -> Tensor:
        """(n, classes) float32: lambda for an image's own class, 1 - lambda for the other's, their sum if it is one."""
        own = functional.one_hot(labels, classes).float()
        return own * self.share + own.flip(0) * (1.0 - self.share)


def drawn_mixes(augment: Augment, batches: int, height: int, width: int, *, seed: int, epoch: int) -> tuple[Mix, ...]:
    """A mix for each batch of an epoch, in order; the global random state is neither read nor changed.

    lambda ~ Beta(alpha, alpha). For CutMix a box of the sides floor(h sqrt(1 - lambda)) and floor(w sqrt(1 - lambda))
    is laid around a pixel drawn uniformly and cut to the image; lambda then becomes 1 - its area / (h w), the part that
    remains of the image. These are the formulas of ``timm.data.Mixup``, with its default modes (one draw per batch).

    Args:
        augment: With a positive ``mixup`` or ``cutmix``.
        batches: How many.
        height: h, of the images, in pixels.
        width: w.
        seed: Of the run.
        epoch: From 0.

    References:
        Zhang et al. (mixup), arXiv:1710.09412, Eq. (1) and Section 2; Yun et al. (CutMix), arXiv:1905.04899, Eq. (1)
        and (2).
    """
    random = np.random.default_rng((seed, epoch, MIX_STREAM))
    return tuple(_drawn(augment, height, width, random) for _ in range(batches))


def _drawn(augment: Augment, height: int, width: int, random: np.random.Generator) -> Mix:
    pastes = augment.cutmix > 0 and (augment.mixup == 0 or random.random() < 0.5)
    if not pastes:
        return Mix(float(random.beta(augment.mixup, augment.mixup)))
    box = pasted_box(float(random.beta(augment.cutmix, augment.cutmix)), height, width, random)
    top, bottom, left, right = box
    return Mix(1.0 - (bottom - top) * (right - left) / (height * width), box)


def pasted_box(share: float, height: int, width: int, random: np.random.Generator) -> Box:
    """The box of CutMix for a lambda, see `drawn_mixes`."""
    side = np.sqrt(1.0 - share)
    down, across = int(height * side), int(width * side)
    y, x = int(random.integers(height)), int(random.integers(width))
    return (
        max(y - down // 2, 0),
        min(y + (down + 1) // 2, height),
        max(x - across // 2, 0),
        min(x + (across + 1) // 2, width),
    )
