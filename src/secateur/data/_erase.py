"""Random erasing: a rectangle of an image becomes the mean colour."""

import math

import numpy as np
import torch
from torch import Tensor

from secateur.data._augment import ERASE_STREAM

_AREA = (0.02, 1 / 3)
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
"""Part of the image and height / width; timm's, which are those of the paper but for the largest part, 0.4 there."""


def erased_boxes(n: int, probability: float, height: int, width: int, *, seed: int, epoch: int) -> Tensor:
    """One box for every image of a set; the global random state is neither read nor changed.

    With probability p: area a uniform in [0.02, 1/3] of the image, aspect r log-uniform in [0.3, 1/0.3], sides
    round(sqrt(a h w r)) and round(sqrt(a h w / r)), position uniform. A side that is longer than the image is cut to
    it; timm draws again instead. Cutting keeps the number of draws fixed, and few boxes are so long.

    Args:
        n: Images.
        probability: p.
        height: h, of the images, in pixels.
        width: w.
        seed: Of the run.
        epoch: From 0.

    Returns:
        (n, 4) int64: top, left, bottom, right (exclusive); all zero where nothing is erased.

    References:
        Zhong et al., arXiv:1708.04896, Algorithm 1.
    """
    draws = np.random.default_rng((seed, epoch, ERASE_STREAM)).random((n, 5))
    area = (_AREA[0] + (_AREA[1] - _AREA[0]) * draws[:, 1]) * height * width
    aspect = np.exp(_LOG_ASPECT[0] + (_LOG_ASPECT[1] - _LOG_ASPECT[0]) * draws[:, 2])
    down = np.minimum(np.rint(np.sqrt(area * aspect)), height)
    across = np.minimum(np.rint(np.sqrt(area / aspect)), width)
    top = np.floor(draws[:, 3] * (height - down + 1))
    left = np.floor(draws[:, 4] * (width - across + 1))
    boxes = np.stack([top, left, top + down, left + across], axis=1) * (draws[:, :1] < probability)
    return torch.from_numpy(boxes.astype(np.int64))


def erase_(images: Tensor, boxes: Tensor) -> Tensor:
    """Set the inside of each image's box to 0, which is the mean colour of normalised images.

    Args:
        images: (n, c, h, w), changed in place.
        boxes: (n, 4) top, left, bottom, right, on their device.
    """
    rows = torch.arange(images.shape[2], device=images.device)
    columns = torch.arange(images.shape[3], device=images.device)
    inside_rows = (rows >= boxes[:, 0, None]) & (rows < boxes[:, 2, None])
    inside_columns = (columns >= boxes[:, 1, None]) & (columns < boxes[:, 3, None])
    return images.masked_fill_((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0.0)
