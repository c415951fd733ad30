"""Fit a model of the latency of every architecture of a graph to measurements on this machine."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor, nn

from secateur._arrays import FloatArray, IntArray
from secateur._json import finite
from secateur._provenance import sha256_of
from secateur.architecture import Architecture
from secateur.cost.denormals import flush_denormals_
from secateur.cost.latency_model import (
    ALIGNMENTS,
    LatencyModel,
    TimeGrid,
    alignment,
    layer_extents,
    timeable_operations,
)
from secateur.cost.measure import LatencyCache, inputs_for, measure_all
from secateur.cost.runtimes import InputTensors, Target
from secateur.cost.timing import ConvolutionShape, LayerShape, shape_of
from secateur.graph.graph import ChannelGraph, Extent
from secateur.prune.slice import apply_architecture
from secateur.search.space import SearchSpace

Tell = Callable[[float, str], None]
"""Called with the finished fraction (0 to 1) and what is being done."""

_NODES = 4
"""Timed widths of each alignment; three if a space has widths of every alignment."""


def layer_times(
    model: nn.Module, graph: ChannelGraph, target: Target, space: SearchSpace, *, cache: LatencyCache, tell: Tell
) -> dict[str, TimeGrid]:
    """Times of every layer of a traced model that can be timed alone, by module name.

    A layer is timed on the grid of some of its output and input widths: of those that the space allows, up to four of
    each alignment (multiples of 16, of 8, of 4, others), evenly spaced and with the smallest and the largest.
    """
    wanted = dict(_grids(model, graph, space))
    missing = [s for _, _, rows in wanted.values() for row in rows for s in row if repr(s) not in cache.seconds]
    shapes = sorted({repr(shape): shape for shape in missing}.items())
    try:
        for done, (what, shape) in enumerate(shapes):
            # Most of the time goes into the whole models, which follow.
            tell(_LAYERS * done / len(shapes), f"timing layer {done + 1} of {len(shapes)}")
            if done % 64 == 0:
                cache.write()
            cache.get(what, lambda shape=shape: target.layer_seconds(shape))
    finally:
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
    for name, operation in timeable_operations(graph).items():
        macs = operation.factor * np.prod([extent.at(graph.sizes) for extent in operation.extents], dtype=np.float64)
        shape = shape_of(modules[name], float(macs))
        if shape is None:
            continue
        out, read = layer_extents(graph, name)
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
    """Whether a grouped convolution can have this number of outputs."""
    if not isinstance(shape, ConvolutionShape) or shape.groups == 1:
        return True
    each = shape.groups if reads.terms else shape.out // shape.groups
    return out % each == 0


def _spread(values: IntArray, count: int) -> IntArray:
    """Up to ``count`` of some ascending values, evenly, with the first and the last."""
    return values[np.unique(np.round(np.linspace(0, len(values) - 1, count)).astype(np.int64))]


_FRACTIONS = (1.0, 0.5, 0.25)
"""Fractions of every axis in the whole models that are measured; two more have random fractions."""
_ROUNDS = 15
_LAYERS = 0.3
"""The part of the time of a fit that the layers take."""


@dataclass(frozen=True, eq=False)
class LatencyFit:
    """A latency model, and how well it predicts what was measured.

    Attributes:
        model: Predicts any widths.
        target: What was measured on, as text.
        widths: (n, axes) of the whole models that were measured, the uncut one first.
        measured: (n,) seconds.
        predicted: (n,) what a model fitted to the others says: no measurement is predicted from itself.
        seconds: Everything that it was fitted to, with the keys of a `LatencyCache`; the same seconds give the same
            fit.
    """

    model: LatencyModel
    target: str
    widths: IntArray
    measured: FloatArray
    predicted: FloatArray
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])

    def __repr__(self) -> str:
        largest = "" if self.largest_error is None else f", errors up to {100 * self.largest_error:.1f} %"
        return f"LatencyFit({self.target}, {len(self.measured)} models measured{largest})"

    @property
    def errors(self) -> FloatArray:
        """(n,) predicted / measured - 1."""
        return self.predicted / self.measured - 1

    @property
    def largest_error(self) -> float | None:
        """The largest of the absolute errors; None if a single model was measured, which nothing else predicts."""
        known = np.abs(self.errors[np.isfinite(self.errors)])
        return float(known.max()) if len(known) else None

    @property
    def scale(self) -> float:
        """Measured / predicted latency of the uncut model: the factor on predictions before anything is cut."""
        return float(self.measured[0]) / float(self.model.of_widths(self.model.sizes[None])[0])

    def to_json(self) -> dict[str, object]:
        """A JSON object: target, measured and predicted seconds, largest and mean absolute error."""
        return finite(
            {
                "target": self.target,
                "measured": self.measured,
                "predicted": self.predicted,
                "largest_error": self.largest_error,
                "mean_error": np.abs(self.errors).mean(),
                "coefficients": list(self.model.coefficients),
            }
        )


def fit_latency(
    model: nn.Module,
    graph: ChannelGraph,
    target: Target,
    shape: tuple[int, ...] | Tensor | InputTensors,
    *,
    space: SearchSpace = SearchSpace(divisor=8),  # noqa: B008 -- frozen
    cache: LatencyCache | None = None,
    tell: Tell | None = None,
) -> LatencyFit:
    """Time the layers of a traced model at some widths and some whole models, and fit the latency of all others.

    Convolutions and linear layers are timed alone on a grid of input and output widths (`secateur.cost.TimeGrid`).
    What else a runtime does is fitted to five whole models, cut and measured in turns: the uncut one, two with 1/2 and
    1/4 of every axis, two with fractions of their own for every axis (`secateur.cost.LatencyModel`).

    Args:
        model: The traced model; not changed.
        graph: Its channel graph.
        target: Runtime, threads and batch size.
        shape: Of one input without the batch; or real samples, see `measure`.
        space: Widths to time; others are interpolated.
        cache: Measurements of this machine; None means those in the user's cache folder, see `LatencyCache`.
        tell: Called with the finished fraction and a description.

    Raises:
        ExportError: If a model cannot be brought to the target.
    """
    cache = LatencyCache.of(target) if cache is None else cache
    cache.asked.clear()
    tell = tell or _silent
    times = layer_times(model, graph, target, space, cache=cache, tell=tell)
    plain = LatencyModel.of(graph, times)
    widths = probes(graph, space)
    tell(_LAYERS, f"timing {len(widths)} whole models")
    measured = _whole_models(model, graph, target, inputs_for(target, shape), widths, cache=cache)
    others = [np.arange(len(widths)) != left_out for left_out in range(len(widths))]
    predicted = [
        plain.fitted(widths[rest], measured[rest]).of_widths(widths[~rest])[0] if rest.any() else np.nan
        for rest in others
    ]
    fitted = plain.fitted(widths, measured)
    seconds = {what: cache.seconds[what] for what in cache.asked}
    return LatencyFit(fitted, target.key, widths, measured, np.array(predicted), seconds)


def probes(graph: ChannelGraph, space: SearchSpace) -> IntArray:
    """(n, axes) different widths of the whole models that are measured, the uncut one first; see `fit_latency`."""
    levels = space.levels(graph)
    random = np.random.default_rng(0)
    fractions = [np.full(len(levels), f) for f in _FRACTIONS] + [random.uniform(0.25, 1, len(levels)) for _ in "ab"]
    rows = [[_nearest(mine, f) for mine, f in zip(levels, row, strict=True)] for row in fractions]
    column = {axis.name: number for number, axis in enumerate(graph.prunable)}
    for row in rows:
        for number, axis in enumerate(graph.prunable):
            if axis.residual_axis in column:
                row[number] = min(row[number], row[column[axis.residual_axis]])
    return np.array(list(dict.fromkeys(map(tuple, rows))), dtype=np.int64).reshape(-1, len(levels))


def architecture_of(graph: ChannelGraph, widths: IntArray) -> Architecture:
    """The first channels of every prunable axis, (axes,) of them: any others take the same time."""
    return Architecture.of({a.name: range(int(w)) for a, w in zip(graph.prunable, widths, strict=True)})


def _nearest(levels: IntArray, fraction: float) -> int:
    return int(levels[np.abs(levels - fraction * levels[-1]).argmin()])


def _whole_models(
    model: nn.Module,
    graph: ChannelGraph,
    target: Target,
    inputs: InputTensors,
    widths: IntArray,
    *,
    cache: LatencyCache,
) -> FloatArray:
    """Seconds of each; measured together, in turns, unless all are known."""
    names = [_name(graph, inputs, row) for row in widths]
    if not all(name in cache.seconds for name in names):
        # Their times stand for those of all models of these widths, whatever the weights.
        cut = [flush_denormals_(apply_architecture(model, graph, architecture_of(graph, row))) for row in widths]
        found = measure_all(cut, target, inputs, rounds=_ROUNDS, warmup=2)
        cache.seconds.update(zip(names, (latency.seconds.median for latency in found), strict=True))
        cache.write()
    return np.array([cache.known(name) for name in names])


def _name(graph: ChannelGraph, inputs: InputTensors, widths: IntArray) -> str:
    """One whole model as text: two with the same calls, tensors and widths take the same time."""
    tensors = [(name, [extent.at(graph.sizes) for extent in extents]) for name, extents in graph.tensors.items()]
    what = repr((graph.calls, tensors, [tuple(each.shape) for each in inputs], widths.tolist()))
    return f"whole model {sha256_of(what)[:32]}"


def _silent(fraction: float, what: str) -> None:
    """Report no progress."""
