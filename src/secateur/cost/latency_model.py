"""The latency of any architecture of a graph, from a table of layer times: nothing is built and nothing runs.

Layers are timed at a few widths (`TimeGrid`), interpolated between them, and added up (`LatencyModel`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from secateur._arrays import FloatArray, IntArray
from secateur.cost.macs import (
    Polynomial,
    block_column,
    block_factors,
    join_columns,
    join_tensor_columns,
    linear_extents,
)
from secateur.graph.graph import Activation, ChannelGraph, Extent, Operation

TERMS = ("layers", "other MACs", "activations", "constant")
"""The terms of a latency, in the order of `LatencyModel.terms`."""


@dataclass(frozen=True, eq=False)
class TimedLayer:
    """A layer of a graph and its times.

    Attributes:
        out: Its output channels.
        read: The input channels of one of its groups.
        blocks: Names of the blocks that it is removed with.
        times: Its seconds at any widths.
    """

    out: Extent
    read: Extent
    blocks: tuple[str, ...]
    times: "TimeGrid"


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """The seconds of one forward pass as a function of the widths w and of the kept blocks b.

    seconds(w, b) = factor * (c_0 * sum over layers of times(out(w), read(w)) * product of its b
                              + c_1 * MACs of all other operations + c_2 * elements of activations + c_3)

    with coefficients c that are fitted to measurements of whole models. Conventions are those of `CostModel`.

    Attributes:
        axes: Names of the prunable axes: the columns of every width array.
        sizes: (axes,) full widths.
        blocks: Names of the removable blocks: the columns of every block array.
        layers: The layers that were timed alone.
        other: MACs of all other operations, for one sample.
        elements: Number of elements in the outputs of the innermost modules, for one sample.
        coefficients: Seconds for each unit of a term, in the order of `TERMS`.
        factor: Measured time of a whole model / time by the table, see `scaled`.
    """

    axes: tuple[str, ...]
    sizes: IntArray
    blocks: tuple[str, ...]
    layers: tuple[TimedLayer, ...]
    other: Polynomial
    elements: Polynomial
    coefficients: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)
    factor: float = 1.0

    def __repr__(self) -> str:
        layers, axes = f"{len(self.layers)} timed layers", f"{len(self.axes)} axes"
        return f"LatencyModel({layers}, {axes}, {len(self.blocks)} blocks, coefficients={self.coefficients})"

    field = "latency_s"
    """The field of `Cost` that this computes."""

    @classmethod
    def of(cls, graph: ChannelGraph, timed: "Mapping[str, TimeGrid]") -> "LatencyModel":
        """Return the model of a graph, with the coefficients of a network that consists of its layers only.

        Args:
            graph: Its operations, widths and blocks.
            timed: Times by module name; each of these modules has one operation and a weight of its own.
        """
        layers = [
            TimedLayer(*layer_extents(graph, op.module), op.blocks, timed[op.module])
            for op in graph.operations
            if op.module in timed
        ]
        axes, blocks = tuple(axis.name for axis in graph.prunable), tuple(block.name for block in graph.removable)
        columns = (*axes, *map(block_column, blocks))
        others = (_with_blocks(op.factor, op.extents, op.blocks, blocks) for op in graph.operations)
        rest = [term for term, op in zip(others, graph.operations, strict=True) if op.module not in timed]
        sizes = np.array([axis.size for axis in graph.prunable], dtype=np.int64)
        elements = Polynomial.of(_elements(graph, blocks), columns)
        return cls(axes, sizes, blocks, tuple(layers), Polynomial.of(rest, columns), elements)

    def fitted(self, widths: IntArray, seconds: FloatArray) -> "LatencyModel":
        """Return this model with coefficients that are fitted to whole models of some widths.

        Least squares of the relative error, with coefficients that are not negative. c_0 is pulled to 1 with the weight
        of a hundredth of a measurement, which decides where the terms cannot be separated.

        Args:
            widths: (n, axes).
            seconds: (n,) as measured.
        """
        from scipy.optimize import nnls  # Half a second of imports, which only fitting needs.

        terms = self.terms(widths)
        rows = terms / seconds[:, None]
        scales = np.maximum(rows.max(axis=0), 1e-300)
        prior = np.array([[0.1, 0, 0, 0]])
        found, _ = nnls(np.concatenate([rows, prior]) / scales, np.append(np.ones(len(rows)), 0.1))
        coefficients = tuple(float(c) for c in np.where(terms.max(axis=0) > 0, found / scales, 0))
        return replace(self, coefficients=coefficients)

    def scaled(self, factor: float) -> "LatencyModel":
        """Return this model with all times multiplied, for models like one that was measured."""
        return replace(self, factor=self.factor * factor)

    def terms(self, widths: IntArray, blocks: IntArray | None = None) -> FloatArray:
        """Return the terms (n, 4) of the coefficients; see `of_widths` for the arguments."""
        columns = self._columns(widths, blocks)
        outs, reads = (columns @ slopes + bases for slopes, bases in self._ends)
        total = np.zeros(len(columns))
        for number, layer in enumerate(self.layers):
            there = columns[:, self._there[number]].prod(axis=1)
            total += there * layer.times.at(outs[:, number], reads[:, number])
        others, elements = self.other.at(columns), self.elements.at(columns)
        return np.stack([total, others, elements, np.ones(len(columns))], axis=1).astype(np.float64)

    def of_widths(self, widths: IntArray, blocks: IntArray | None = None) -> FloatArray:
        """Compute the seconds of many architectures at once.

        Args:
            widths: (n, axes) whole numbers, columns in the order of ``axes``.
            blocks: (n, blocks) or (1, blocks), 1 where a block is kept and 0 where it is removed; None keeps all.

        Returns:
            (n,) seconds for one pass.
        """
        return self.factor * (self.terms(widths, blocks) @ np.array(self.coefficients))

    def of_tensor(self, widths: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
        """Compute seconds (...) of real-valued widths (..., axes) and presences (..., blocks); for relaxed searches.

        Differentiable: times are interpolated linearly between well aligned widths, without the steps of kernels.
        """
        if blocks is None:
            blocks = torch.ones(len(self.blocks), dtype=widths.dtype, device=widths.device)
        columns = join_tensor_columns(widths, blocks)
        ends = [[torch.as_tensor(part).to(columns) for part in end] for end in self._ends]
        outs, reads = (columns @ slopes + bases for slopes, bases in ends)
        layers, others, elements, constant = self.coefficients
        total = constant + others * self.other.at_tensor(columns) + elements * self.elements.at_tensor(columns)
        for number, layer in enumerate(self.layers):
            there = columns[..., self._there[number]].prod(dim=-1)
            total = total + layers * there * layer.times.at_tensor(outs[..., number], reads[..., number])
        return self.factor * total

    def _columns(self, widths: IntArray, blocks: IntArray | None) -> IntArray:
        widths = np.asarray(widths)
        if blocks is None:
            blocks = np.ones((1, len(self.blocks)), dtype=np.int64)
        if widths.ndim != 2 or widths.shape[1] != len(self.axes) or not np.issubdtype(widths.dtype, np.integer):
            raise ValueError(
                f"`widths` must be whole numbers of shape (n, {len(self.axes)}), one column per prunable axis; "
                f"got {widths.dtype} of shape {widths.shape}."
            )
        return join_columns(widths, blocks)

    @cached_property
    def _ends(self) -> tuple[tuple[IntArray, IntArray], tuple[IntArray, IntArray]]:
        """Slopes (columns, layers) and bases (layers,) of the output and of the input channels."""
        columns = (*self.axes, *map(block_column, self.blocks))
        outs, reads = [layer.out for layer in self.layers], [layer.read for layer in self.layers]
        return linear_extents(outs, columns), linear_extents(reads, columns)

    @cached_property
    def _there(self) -> list[list[int]]:
        """Columns of the removable blocks that each layer goes with."""
        column = {name: len(self.axes) + number for number, name in enumerate(self.blocks)}
        return [[column[name] for name in layer.blocks if name in column] for layer in self.layers]


def timeable_operations(graph: ChannelGraph) -> dict[str, Operation]:
    """Return operations by module: of modules with one operation and a weight of at least two dimensions."""
    by_module: dict[str, list[Operation]] = {}
    for operation in graph.operations:
        by_module.setdefault(operation.module, []).append(operation)
    return {
        module: operations[0]
        for module, operations in by_module.items()
        if len(operations) == 1 and len(graph.tensors.get(_weight(module), ())) > 1
    }


def layer_extents(graph: ChannelGraph, module: str) -> tuple[Extent, Extent]:
    """Return the output channels, and the input channels of one group, of a layer of `timeable_operations`."""
    out, read, *_ = graph.tensors[_weight(module)]
    return out, read


def _weight(module: str) -> str:
    return f"{module}.weight" if module else "weight"


def _with_blocks(
    factor: float, extents: Iterable[Extent], among: Iterable[str], removable: Sequence[str]
) -> tuple[float, tuple[Extent, ...]]:
    """Return a term of a polynomial that is there if none of its blocks is removed."""
    return factor, (*extents, *block_factors(set(among).intersection(removable)))


def _elements(graph: ChannelGraph, removable: Sequence[str]) -> Iterable[tuple[float, tuple[Extent, ...]]]:
    """Yield the outputs of the innermost modules as terms of a polynomial."""
    outer = {"", *(name[:place] for name in graph.activations for place, letter in enumerate(name) if letter == ".")}
    for name, activation in graph.activations.items():
        if name in outer or len(activation.shape) < 2:
            continue
        around = [block.name for block in graph.removable if name in block.modules]
        rest = np.prod([size for dim, size in enumerate(activation.shape) if dim != activation.dim], dtype=np.int64)
        yield _with_blocks(float(rest), (_channels(graph, activation),), around, removable)


def _channels(graph: ChannelGraph, activation: Activation) -> Extent:
    base, terms = 0, list[tuple[str, int]]()
    for number, count in zip(*np.unique(activation.axis, return_counts=True), strict=True):
        axis = graph.axes[number] if number >= 0 else None
        if axis is None or axis.frozen_because is not None or count % axis.size:
            base += int(count)
        else:
            terms.append((axis.name, int(count) // axis.size))
    return Extent(base, tuple(sorted(terms)))


ALIGNMENTS = (16, 8, 4, 1)
"""Kernels work on vectors of channels, so speed depends on the largest of these that divides the width."""


def alignment(widths: IntArray) -> IntArray:
    """Return the first of `ALIGNMENTS` that divides each width; 16 divides 0."""
    found = np.ones_like(widths)
    for divisor in reversed(ALIGNMENTS):
        found[widths % divisor == 0] = divisor
    return found


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """The seconds of a layer, measured on a grid of numbers of channels.

    Times between measured ones are interpolated linearly in each direction, among widths of the same alignment only:
    63 channels lie between 31 and 95, not between 48 and 64, which keeps the steps of the kernels. A width beyond the
    measured ones takes the time of the last one. Where no width of its alignment was measured, the next better aligned
    ones are used. Along each direction, times of one alignment never decrease, whatever was measured.

    Attributes:
        outs: (o,) output channels, ascending.
        reads: (r,) input channels of a group, ascending.
        seconds: (o, r) as measured.
    """

    outs: IntArray
    reads: IntArray
    seconds: FloatArray

    def at(self, outs: IntArray, reads: IntArray) -> FloatArray:
        """Interpolate the seconds at whole widths.

        Args:
            outs: (n,).
            reads: (n,).
        """
        (low, high, share), (first, last, part) = self._lookup_outs.at(outs), self._lookup_reads.at(reads)
        table = self._rising
        near = table[low, first] * (1 - part) + table[low, last] * part
        far = table[high, first] * (1 - part) + table[high, last] * part
        return near * (1 - share) + far * share

    def at_tensor(self, outs: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
        """Interpolate at real-valued widths (...), among the best aligned and the largest ones; differentiable."""
        rows, columns = _best_aligned(self.outs), _best_aligned(self.reads)
        table = torch.as_tensor(self._rising[np.ix_(rows, columns)], dtype=outs.dtype, device=outs.device)
        low, high, share = _between(self.outs[rows], outs)
        first, last, part = _between(self.reads[columns], reads)
        near = table[low, first] * (1 - part) + table[low, last] * part
        far = table[high, first] * (1 - part) + table[high, last] * part
        return near * (1 - share) + far * share

    @cached_property
    def _rising(self) -> FloatArray:
        rising = self.seconds.astype(np.float64)
        for rows in _by_alignment(self.outs):
            for columns in _by_alignment(self.reads):
                part = rising[np.ix_(rows, columns)]
                rising[np.ix_(rows, columns)] = np.maximum.accumulate(np.maximum.accumulate(part, axis=0), axis=1)
        return rising

    @cached_property
    def _lookup_outs(self) -> "_Lookup":
        return _Lookup.of(self.outs)

    @cached_property
    def _lookup_reads(self) -> "_Lookup":
        return _Lookup.of(self.reads)


@dataclass(frozen=True, eq=False)
class _Lookup:
    """For every whole number up to the largest node: the nodes around it, and its share of the upper one."""

    low: IntArray
    high: IntArray
    share: FloatArray

    @classmethod
    def of(cls, nodes: IntArray) -> "_Lookup":
        values = np.arange(nodes[-1] + 1, dtype=np.int64)
        low, high = np.zeros_like(values), np.zeros_like(values)
        share = np.zeros(len(values))
        present, wanted = alignment(nodes), alignment(values)
        for divisor in ALIGNMENTS:
            mine = np.flatnonzero(wanted == divisor)
            usable = np.flatnonzero(present == _stand_in(divisor, present))
            place = np.searchsorted(nodes[usable], values[mine])
            above, below = np.minimum(place, len(usable) - 1), np.maximum(place - 1, 0)
            low[mine], high[mine] = usable[below], usable[above]
            gap = np.maximum(nodes[high[mine]] - nodes[low[mine]], 1)
            share[mine] = np.clip((values[mine] - nodes[low[mine]]) / gap, 0, 1)
        return cls(low, high, share)

    def at(self, values: IntArray) -> tuple[IntArray, IntArray, FloatArray]:
        inside = np.clip(values, 0, len(self.low) - 1)
        return self.low[inside], self.high[inside], self.share[inside]


def _stand_in(divisor: int, present: IntArray) -> int:
    """Return the alignment of nodes that is used for a divisor: its own, the next better, else the best one present."""
    there = {int(each) for each in present}
    better = [each for each in reversed(ALIGNMENTS) if each >= divisor and each in there]
    return better[0] if better else max(there)


def _by_alignment(nodes: IntArray) -> list[IntArray]:
    found = alignment(nodes)
    return [np.flatnonzero(found == divisor) for divisor in ALIGNMENTS if (found == divisor).any()]


def _best_aligned(nodes: IntArray) -> IntArray:
    """Return the nodes of the best alignment with at least two, and the largest of all; all nodes if there is none."""
    found = next((mine for mine in _by_alignment(nodes) if len(mine) > 1), np.arange(len(nodes)))
    return np.union1d(found, [len(nodes) - 1])


def _between(nodes: IntArray, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the nodes around real values, and the share of the upper one; beyond the ends the slope is zero."""
    places = torch.as_tensor(nodes, dtype=values.dtype, device=values.device)
    high = torch.searchsorted(places, values.detach().contiguous()).clamp(0, len(nodes) - 1)
    low = (high - 1).clamp_min(0)
    return low, high, ((values - places[low]) / (places[high] - places[low]).clamp_min(1)).clamp(0, 1)
