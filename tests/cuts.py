"""Helper functions for tests of tracing and cutting: random architectures, and distances between models."""

import copy
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.graph import ChannelGraph, Role, trace

EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Relative to the largest output. The same terms are summed in another order: a few ulps for each layer."""


def random_architecture(graph: ChannelGraph, seed: int) -> Architecture:
    """Any non-empty subset of every prunable axis."""
    draw = np.random.default_rng(seed)
    return Architecture.of(
        {a.name: draw.choice(a.size, draw.integers(1, a.size + 1), replace=False) for a in graph.prunable}
    )


def one_channel(graph: ChannelGraph, channel: int = 0) -> Architecture:
    """The narrowest architecture: a single channel of every prunable axis."""
    return Architecture.of({a.name: [channel % a.size] for a in graph.prunable})


def outputs(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Every tensor a model gives, in evaluation mode as it is."""
    with torch.no_grad():
        return [t for t in tree_leaves(model(*inputs)) if isinstance(t, Tensor)]


def apart(first: list[Tensor], second: list[Tensor]) -> float:
    """Largest difference relative to the largest value of the first; infinity where shapes differ."""
    if [t.shape for t in first] != [t.shape for t in second]:
        return float("inf")
    scale = max(float(t.abs().max()) for t in first)
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True)) / max(scale, 1e-30)


@cache
def zoo_net(name: str) -> tuple[nn.Module, Tensor, ChannelGraph]:
    """A net of the zoo, its example and its graph; traced once."""
    model, example = ZOO[name]()
    return model, example, trace(model, example)


def tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of every parameter and buffer."""
    return {name: tuple(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}


def declared_shapes(graph: ChannelGraph, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """What a cut model's tensors must be like, from the graph's formula alone."""
    widths = {**graph.sizes, **architecture.widths}
    gone = {name for block in architecture.removed_blocks for name in graph.blocks_by_name[block].tensors}
    extents = {name: found for name, found in graph.tensors.items() if name not in gone}
    return {name: tuple(extent.at(widths) for extent in found) for name, found in extents.items()}


def blind_to_removed(model: nn.Module, graph: ChannelGraph, architecture: Architecture) -> nn.Module:
    """The full model in which nobody *reads* a removed channel; what produces them runs on as before.

    Derived from the INPUT sites alone, unlike `secateur.surgery.mask_removed`, which zeroes everything.
    """
    blind = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, kept in architecture.kept:
            axis = graph.by_name[name]
            gone = np.setdiff1d(np.arange(axis.size), kept)
            for site in axis.sites:
                if site.role is Role.INPUT and len(gone):
                    positions = torch.from_numpy(site.index[gone].reshape(-1))
                    blind.get_parameter(site.tensor).index_fill_(site.dim, positions, 0.0)
    return blind
