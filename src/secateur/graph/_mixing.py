"""Operations that compute something over channels: norms, means, softmax.

A cut model computes them over the channels it kept. The masked original must do the same, or the two could never be
compared: zeros in place of the removed channels would take part in the mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from secateur.graph._call import MIXING_KINDS, base_name
from secateur.graph._channels import ChannelGraph, IntArray, Lane, Mixing
from secateur.graph._running import run_under_


class OverKeptChannels(TorchDispatchMode):
    """While active, one run of a full model computes norms, means and softmaxes over the kept channels only.

    Removed positions of the results are zero.

    Args:
        graph: Of the model that runs.
        kept: Kept channels by axis name; an axis that is not named is whole.
    """

    def __init__(self, graph: ChannelGraph, kept: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self._alive = graph.alive(kept)
        self._expected = {mixing.number: mixing for mixing in graph.mixings}
        self._number = 0
        self._positions: dict[tuple[int, int], IntArray] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = base_name(func)
        if name not in MIXING_KINDS:
            return func(*args, **kwargs)
        mixing = self._expected.get(self._number)
        self._number += 1
        if mixing is None or not self._is_same(mixing, name, args, kwargs):
            return func(*args, **kwargs)
        read = [(lane, self._kept(lane)) for lane in mixing.read]
        if all(len(positions) == len(lane.axis) for lane, positions in read):
            return func(*args, **kwargs)
        args, kwargs = _gathered(name, args, kwargs, read)
        return _scattered(func(*args, **kwargs), [(lane, self._kept(lane)) for lane in mixing.written])

    def _kept(self, lane: Lane) -> IntArray:
        """Positions that remain along a lane; calls on the same stream share theirs."""
        key = id(lane.axis), id(lane.channel)
        if key not in self._positions:
            self._positions[key] = lane.kept(self._alive)
        return self._positions[key]

    def _is_same(self, mixing: Mixing, name: str, args: Any, kwargs: Any) -> bool:
        """Whether the model still runs what it ran when traced; where data decide, it may not, and all bets are off."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        same = mixing.kind == name and all(
            lane.tensor < len(tensors)
            and lane.dim < tensors[lane.tensor].dim()
            and tensors[lane.tensor].size(lane.dim) == len(lane.axis)
            for lane in mixing.read
        )
        if not same:
            self._expected = {}
        return same


def compute_over_kept_(model: nn.Module, graph: ChannelGraph, kept: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Make a full model compute norms, means and softmaxes over the kept channels whenever it runs; returns it."""
    return run_under_(model, lambda _: OverKeptChannels(graph, kept)) if graph.mixings else model


def _gathered(name: str, args: Any, kwargs: Any, read: Sequence[tuple[Lane, IntArray]]) -> tuple[tuple[Any, ...], Any]:
    leaves, spec = tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for lane, positions in read:
        tensor = leaves[places[lane.tensor]]
        leaves[places[lane.tensor]] = tensor.index_select(lane.dim, torch.from_numpy(positions).to(tensor.device))
    args, kwargs = tree_unflatten(leaves, spec)
    args = list(args)
    if name in {"native_layer_norm", "_fused_rms_norm"}:
        args[1] = list(args[0].shape[-len(args[1]) :])
    elif name == "native_group_norm":
        positions = next(p for lane, p in read if lane.tensor == 0 and lane.dim == 1)
        args[6] = len({int(p) // (args[4] // args[6]) for p in positions})
        args[4] = len(positions)
    return tuple(args), kwargs


def _scattered(out: Any, written: Sequence[tuple[Lane, IntArray]]) -> Any:
    leaves, spec = tree_flatten(out)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    for lane, positions in written:
        tensor = leaves[places[lane.tensor]]
        shape = list(tensor.shape)
        shape[lane.dim] = len(lane.axis)
        full = tensor.new_zeros(shape)
        leaves[places[lane.tensor]] = full.index_copy_(lane.dim, torch.from_numpy(positions).to(tensor.device), tensor)
    return tree_unflatten(leaves, spec)
