"""Channel-wise interpolation: features of one width seen at another."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@lru_cache(maxsize=4096)
def neighbours(channels: int, onto: int) -> tuple[IntArray, IntArray]:
    """The first and the last channel that each one of ``onto`` channels averages when ``channels`` are spread over it.

    Row i averages the channels from floor(i * channels / onto) up to, not including, ceil((i + 1) * channels / onto):
    adaptive average pooling along the channels. Spread over as many or more, that is one channel or two neighbours.

    Args:
        channels: Width of the features.
        onto: Width to see them at.

    Returns:
        Two (onto,) arrays.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, Eq. (4), with adaptive average pooling as in the reference code.
    """
    rows = np.arange(onto)
    return rows * channels // onto, -(-(rows + 1) * channels // onto) - 1


def interpolation_matrix(channels: int, onto: int) -> FloatArray:
    """The matrix A of channel-wise interpolation: CWI(x)_i = sum_j A_ij x_j; see `neighbours`.

    Args:
        channels: Width of the features.
        onto: Width to see them at.

    Returns:
        (onto, channels), rows sum to 1.
    """
    first, last = neighbours(channels, onto)
    columns = np.arange(channels)[None, :]
    inside = (columns >= first[:, None]) & (columns <= last[:, None])
    return inside / inside.sum(axis=1, keepdims=True)


def interpolate_channels(x: Tensor, onto: int, *, dim: int = 1) -> Tensor:
    """Channel-wise interpolation of features along one dimension; see `interpolation_matrix`.

    Args:
        x: Features of any shape.
        onto: Number of channels of the result.
        dim: The dimension with the channels.

    Returns:
        The shape of ``x`` with ``onto`` channels.
    """
    matrix = torch.as_tensor(interpolation_matrix(x.shape[dim], onto), dtype=x.dtype, device=x.device)
    return (x.movedim(dim, -1) @ matrix.T).movedim(-1, dim)
