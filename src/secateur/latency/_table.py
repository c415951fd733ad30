"""Which widths of which layers are timed alone, and the table of their times."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from torch import nn

from secateur.cost import ALIGNMENTS, TimeGrid, alignment, ends_of, timeable
from secateur.graph import ChannelGraph, Extent
from secateur.latency._cache import Cache
from secateur.latency._layers import ConvolutionShape, LayerShape, shape_of
from secateur.latency._targets import Target
from secateur.search import SearchSpace

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Tell = Callable[[float, str], None]
"""Called with the finished fraction (0 to 1) and what is being done."""

_NODES = 4
"""Widths of each alignment; three where a space has widths of every alignment."""


def layer_times(
    model: nn.Module, graph: ChannelGraph, target: Target, space: SearchSpace, *, cache: Cache, tell: Tell
) -> dict[str, TimeGrid]:
    """Times of every layer of a traced model that can be timed alone, by module name.

    A layer is timed on the grid of some of its output and input widths: of those that the space allows, up to four of
    each alignment (multiples of 16, of 8, of 4, others), evenly spaced and with the smallest and the largest.
    """
    wanted = dict(_grids(model, graph, space))
    missing = [s for _, _, rows in wanted.values() for row in rows for s in row if repr(s) not in cache.seconds]
    shapes = sorted({repr(shape): shape for shape in missing}.items())
    for done, (what, shape) in enumerate(shapes):
        if done % 64 == 0:
            tell(done / len(shapes), "timing layers")
            cache.write()
        cache.get(what, lambda shape=shape: target.seconds_alone(shape))
    if shapes:
        cache.write()
    return {
        module: TimeGrid(outs, reads, np.array([[cache.known(repr(shape)) for shape in row] for row in rows]))
        for module, (outs, reads, rows) in wanted.items()
    }


def _grids(
    model: nn.Module, graph: ChannelGraph, space: SearchSpace
) -> Iterator[tuple[str, tuple[IntArray, IntArray, list[list[LayerShape]]]]]:
    modules = dict(model.named_modules())
    levels = dict(zip((axis.name for axis in graph.prunable), space.levels(graph), strict=True))
    for name, operation in timeable(graph).items():
        macs = operation.factor * np.prod([extent.at(graph.sizes) for extent in operation.extents], dtype=np.float64)
        shape = shape_of(modules[name], float(macs))
        if shape is None:
            continue
        out, read = ends_of(graph, name)
        if (out.at(graph.sizes), read.at(graph.sizes)) != (shape.out, shape.read):
            continue  # A weight of another layout than torch's own layers have.
        outs, reads = nodes(out, levels), nodes(read, levels)
        outs = outs[[_fits(shape, int(width), read) for width in outs]]
        rows = [[resized(shape, int(o), int(r), read) for r in reads] for o in outs]
        yield name, (outs, reads, rows)


def nodes(extent: Extent, levels: Mapping[str, IntArray]) -> IntArray:
    """Some of the values that an extent can take, ascending.

    Args:
        extent: Linear in the widths.
        levels: Allowed widths by axis. Of several axes each takes its widths in step with the others.
    """
    if not extent.terms:
        return np.array([extent.base], dtype=np.int64)
    most = max(len(levels[name]) for name, _ in extent.terms)
    steps = np.arange(most) / max(most - 1, 1)
    values = np.full(most, extent.base, dtype=np.int64)
    for name, multiplicity in extent.terms:
        mine = levels[name]
        values += multiplicity * mine[np.round(steps * (len(mine) - 1)).astype(np.int64)]
    values = np.unique(values[values > 0])
    kinds = alignment(values)
    present = [values[kinds == divisor] for divisor in ALIGNMENTS if (kinds == divisor).any()]
    count = _NODES - 1 if len(present) == len(ALIGNMENTS) else _NODES
    return np.unique(np.concatenate([_spread(mine, count) for mine in present]))


def resized(shape: LayerShape, out: int, read: int, reads: Extent) -> LayerShape:
    """A layer with other widths. Where its groups read a fixed number of channels, whole groups come and go."""
    if isinstance(shape, ConvolutionShape) and shape.groups > 1 and not reads.terms:
        return replace(shape, out=out, read=read, groups=out * shape.groups // shape.out)
    return replace(shape, out=out, read=read)


def _fits(shape: LayerShape, out: int, reads: Extent) -> bool:
    """Whether a grouped convolution can have so many outputs."""
    if not isinstance(shape, ConvolutionShape) or shape.groups == 1:
        return True
    each = shape.groups if reads.terms else shape.out // shape.groups
    return out % each == 0


def _spread(values: IntArray, count: int) -> IntArray:
    """Up to ``count`` of some ascending values, evenly, with the first and the last."""
    return values[np.unique(np.round(np.linspace(0, len(values) - 1, count)).astype(np.int64))]
