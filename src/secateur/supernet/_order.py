"""Channels in another order: the most important ones first, so that every subnet is a prefix."""

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import SurgeryError
from secateur.graph import ChannelGraph
from secateur.surgery import copy_with

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def best_first(scores: Mapping[str, FloatArray]) -> dict[str, IntArray]:
    """For each axis the channels with the highest scores first; of equal ones those with the lower index.

    Args:
        scores: Axis name to (axis size,).
    """
    return {name: np.argsort(-values, kind="stable") for name, values in scores.items()}


def reordered(model: nn.Module, graph: ChannelGraph, order: Mapping[str, IntArray]) -> nn.Module:
    """A copy whose channels stand in another order; it computes what the model computes.

    Channel i of an axis is the original's ``order[axis][i]``, in every tensor that has the axis: rows, columns, norms
    and statistics move together, so that nothing but the order of sums changes. The graph holds for the copy too,
    since it speaks of positions. A channel with several positions in a tensor (after a flatten, in a head) takes all
    of them along.

    Args:
        model: The traced model; not modified.
        graph: Its channel graph.
        order: Axis name to a permutation of its channels; an axis that is not named stays as it is. Branches go with
            their streams, see `with_branches`.

    Raises:
        SurgeryError: If an order names an unknown axis or is no permutation.
    """
    moves = _moves(graph, with_branches(graph, order))

    def moved(name: str, tensor: Tensor) -> Tensor:
        for dim, positions in moves[name].items():
            tensor = tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))
        return tensor

    return copy_with(model, dict.fromkeys(moves, moved))


def inverse(order: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """The order that undoes another one."""
    return {name: np.argsort(permutation) for name, permutation in order.items()}


def order_digest(order: Mapping[str, IntArray]) -> str:
    """SHA-256 of an order: weights of a supernet stand in it."""
    sha = hashlib.sha256()
    for name, permutation in sorted(order.items()):
        sha.update(f"{name}: {permutation.tolist()}\n".encode())
    return sha.hexdigest()


def with_branches(graph: ChannelGraph, order: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """The order with branches in that of their streams, whose channels they have, whatever it says of them itself."""
    into = {axis.name: axis.into for axis in graph.axes if axis.into is not None}
    found = {name: permutation for name, permutation in order.items() if name not in into}
    return {**found, **{name: found[stream] for name, stream in into.items() if stream in found}}


def _moves(graph: ChannelGraph, order: Mapping[str, IntArray]) -> dict[str, dict[int, IntArray]]:
    """For every tensor and dimension that changes: where each position's content comes from."""
    moves: dict[str, dict[int, IntArray]] = {}
    for name, permutation in order.items():
        axis = graph.by_name.get(name)
        if axis is None or not np.array_equal(np.sort(permutation), np.arange(axis.size)):
            raise SurgeryError(
                f"`order` must hold a permutation of the channels of each axis; got another one for {name!r}. "
                "Make it with best_first()."
            )
        for site in axis.sites:
            dims = moves.setdefault(site.tensor, {})
            if site.dim not in dims:
                dims[site.dim] = np.arange(graph.tensors[site.tensor][site.dim].at(graph.sizes))
            dims[site.dim][site.index] = site.index[permutation]
    return moves
