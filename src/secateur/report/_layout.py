"""Where the layers and axes of a graph stand in a drawing: a row for each layer, a lane for each axis."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from secateur.graph import Block, ChannelAxis, ChannelGraph
from secateur.report._places import Place, places, sentence_of

_COLOURS = ("#2f7ed8", "#d9730d", "#2a9d5c", "#c9407f", "#7d5fd3", "#0f97a6", "#b8860b", "#d04a3a")
"""Of mid lightness, so that they show on light and on dark."""
WHOLE = "#8b8f98"
"""The colour of what stays whole."""


class Mark(Enum):
    """What a layer does with an axis."""

    MAKES = "makes"
    CARRIES = "carries"
    READS = "reads"


@dataclass(frozen=True)
class Row:
    """A layer and the norms right behind it, which only scale what it makes.

    Attributes:
        place: The layer.
        folded: The norms.
    """

    place: Place
    folded: tuple[Place, ...] = ()

    @property
    def label(self) -> str:
        """``layer1.0.conv1 + bn1``."""
        return " + ".join((self.place.module or "(model)", *(p.module.rpartition(".")[2] for p in self.folded)))

    @property
    def macs(self) -> int:
        """Multiply-accumulates at batch 1."""
        return self.place.macs + sum(place.macs for place in self.folded)

    @property
    def params(self) -> int:
        """Parameters."""
        return self.place.params + sum(place.params for place in self.folded)

    @property
    def colour_axes(self) -> tuple[str, ...]:
        """The axes of its outputs."""
        return self.place.makes or self.place.carries

    @property
    def channels(self) -> str:
        """``64 → 128``; one number where channels are only carried; empty if there are none."""
        into, out = self.place.channels_in, self.place.channels_out
        return " → ".join(str(number) for number in (into, out) if number is not None)


@dataclass(frozen=True)
class Lane:
    """One axis: a vertical line with a mark at each of its layers.

    Attributes:
        axis: The axis.
        column: Counted from the left.
        marks: (row, what the layer does) pairs from the first row to the last.
        colour: As #rrggbb; grey for one that stays whole.
    """

    axis: ChannelAxis
    column: int
    marks: tuple[tuple[int, Mark], ...]
    colour: str

    @property
    def whole(self) -> bool:
        """Whether it stays whole."""
        return self.axis.frozen_because is not None

    @property
    def words(self) -> str:
        """Name, size, layers and, if it stays whole, the reason."""
        axis = self.axis
        size = f"{axis.name}: {axis.size} channels, {len(axis.sites)} sites"
        if axis.divisor > 1:
            size += f", in multiples of {axis.divisor}"
        return f"{size}. {sentence_of(axis)}" if self.whole else size


@dataclass(frozen=True)
class Bracket:
    """A residual block: the rows that go with it.

    Attributes:
        block: The block.
        column: Counted from the layers outwards.
        first: Its first row.
        last: Its last row.
    """

    block: Block
    column: int
    first: int
    last: int

    @property
    def words(self) -> str:
        """Whether it may be removed, or why not."""
        why = (self.block.kept_because or "").removeprefix("kept whole: ")
        return f"Block {self.block.name}: " + (f"stays, {why}" if why else "a residual branch that can be removed")


@dataclass(frozen=True)
class Layout:
    """Rows from top to bottom, lanes from left to right, and brackets beside the rows."""

    rows: tuple[Row, ...]
    lanes: tuple[Lane, ...]
    brackets: tuple[Bracket, ...] = ()

    @property
    def columns(self) -> int:
        """Number of columns that the lanes take."""
        return 1 + max((lane.column for lane in self.lanes), default=-1)

    def beginning(self, row: int) -> list[Lane]:
        """The lanes whose first mark is in a row, left to right."""
        return sorted((lane for lane in self.lanes if lane.marks[0][0] == row), key=lambda lane: lane.column)


def layout(graph: ChannelGraph) -> Layout:
    """Rows in order of execution; every axis takes the leftmost column that is free from its first row to its last."""
    rows = _rows(places(graph))
    marks = _marks(rows)
    colours = dict(zip((axis.name for axis in graph.prunable), itertools.cycle(_COLOURS), strict=False))
    columns, lanes = _Columns(), list[Lane]()
    for axis in sorted((axis for axis in graph.axes if axis.name in marks), key=lambda a: min(marks[a.name])):
        here = sorted(marks[axis.name].items())
        column = columns.free(here[0][0], here[-1][0])
        lanes.append(Lane(axis, column, tuple(here), colours.get(axis.name, WHOLE)))
    return Layout(rows, tuple(lanes), _brackets(graph, rows))


def _brackets(graph: ChannelGraph, rows: Sequence[Row]) -> tuple[Bracket, ...]:
    columns, found = _Columns(), list[Bracket]()
    for block in graph.blocks:
        inside = [number for number, row in enumerate(rows) if block.replaces(row.place.module)]
        if inside:
            found.append(Bracket(block, columns.free(inside[0], inside[-1]), inside[0], inside[-1]))
    return tuple(found)


class _Columns:
    """Hands out columns, the first that is free from one row to another."""

    def __init__(self) -> None:
        self.busy: list[list[tuple[int, int]]] = []

    def free(self, first: int, last: int) -> int:
        for column, taken in enumerate(self.busy):
            if all(last < begin or end < first for begin, end in taken):
                taken.append((first, last))
                return column
        self.busy.append([(first, last)])
        return len(self.busy) - 1


def _rows(layers: Sequence[Place]) -> tuple[Row, ...]:
    rows: list[Row] = []
    for place in layers:
        last = rows[-1] if rows else None
        if last is not None and _follows(last.place, place):
            rows[-1] = Row(last.place, (*last.folded, place))
        else:
            rows.append(Row(place))
    return tuple(rows)


def _follows(layer: Place, norm: Place) -> bool:
    """Whether a layer is only a norm of the one before it, in the same module."""
    only_carries = bool(norm.carries) and not (norm.macs or norm.makes or norm.reads)
    beside = layer.module.rpartition(".")[0] == norm.module.rpartition(".")[0] and norm.module != ""
    return only_carries and beside and norm.carries == (layer.makes or layer.carries)


def _marks(rows: Sequence[Row]) -> Mapping[str, dict[int, Mark]]:
    """For every axis what each row does with it; a row that does several things shows the first of `Mark`."""
    found: dict[str, dict[int, Mark]] = {}
    for number, row in enumerate(rows):
        for place in (row.place, *row.folded):
            doing = ((Mark.MAKES, place.makes), (Mark.CARRIES, place.carries), (Mark.READS, place.reads))
            for mark, axes in doing:
                for axis in axes:
                    found.setdefault(axis, {}).setdefault(number, mark)
    return found
