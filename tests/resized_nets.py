"""Nets of four layers with a piece of code in the middle, and what must hold for the channels that run through it."""

from collections.abc import Callable
from functools import partial

import torch
from cuts import apart, outputs
from torch import Tensor, nn

from secateur.architecture import Architecture
from secateur.graph import ChannelGraph, trace
from secateur.prune import apply_architecture, cut, mask_removed

IMAGES = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Resized(nn.Module):
    """The stem's 12 channels of 8 x 8 positions go through the code; as many as the head reads arrive."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor], arriving: int = 12, **held: object):
        super().__init__()
        for key, value in held.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(key, value.clone())
            else:
                setattr(self, key, value)
        self.code = code
        self.first = nn.Conv2d(3, 10, 3, padding=1)
        self.stem = nn.Conv2d(10, 12, 3, padding=1)
        self.head = nn.Conv2d(arriving, 6, 1)
        self.last = nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.first(x).relu()).relu()
        return self.last(self.head(self.code(self, x)).relu()).mean((2, 3))


def net(code: Callable[[nn.Module, Tensor], Tensor], arriving: int = 12, **held: object) -> Callable[[], Resized]:
    """Return a function that makes the net, so that no test sees what another one has changed."""
    return partial(Resized, code, arriving, **held)


def kept_promises(model: nn.Module, images: Tensor = IMAGES) -> ChannelGraph:
    """Cut a net to parts of all its axes, compare it with the masked original, and return its graph."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for tensor in model.parameters():
            nn.init.normal_(tensor, std=0.3)
    graph = trace(model.eval(), images)
    for keep in (lambda n: range(max(1, n // 2)), lambda n: range(n // 3, n), lambda n: range(1, n, 2)):
        architecture = Architecture.of({axis.name: keep(axis.size) for axis in graph.prunable})
        small, masked = apply_architecture(model, graph, architecture), mask_removed(model, graph, architecture)
        assert apart(outputs(masked.eval(), images), outputs(small.eval(), images)) < 1e-5
    assert cut(model, graph, architecture).verification.frozen == ()
    # What the code does with the stem's channels must not cost those before and behind it.
    assert {"first", "head"} <= {axis.name for axis in graph.prunable}
    return graph


def reasons(graph: ChannelGraph) -> list[str]:
    """Return why channels that the stem makes, or that the head reads, are frozen."""
    return [
        axis.frozen_because
        for axis in graph.axes
        if axis.frozen_because and any(site.tensor in {"stem.weight"} and site.dim == 0 for site in axis.sites)
    ]
