"""The layers of a traced model: what each costs, and which axes it makes, carries and reads.

Where the layers and axes of a graph stand in a drawing: a row for each layer, a lane for each axis.

A channel graph in the language of graphviz.

A channel graph as one SVG picture that needs nothing else.

A channel graph as a file to look at."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from html import escape
from pathlib import Path

from secateur._files import atomic_file
from secateur.errors import ExportError
from secateur.graph.graph import Block, ChannelAxis, ChannelGraph, Role
from secateur.report import units as _format


@dataclass(frozen=True)
class Place:
    """One module that holds weights or runs multiply-accumulates itself, not through its children.

    Attributes:
        module: Its qualified name; "" is the model itself.
        params: Parameters of its own; a shared one counts where it is named first.
        macs: Multiply-accumulates of its own at batch 1.
        makes: Names of the axes of its outputs, in order of first appearance.
        carries: Names of the axes that it scales or shifts channel by channel (norms, depthwise convolutions).
        reads: Names of the axes of its inputs.
        channels_out: Length of the dimension that ``makes`` or ``carries`` lie on, or None if there is none.
        channels_in: The same for ``reads``.
    """

    module: str
    params: int
    macs: int
    makes: tuple[str, ...] = ()
    carries: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    channels_out: int | None = None
    channels_in: int | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis here, once: those of the outputs first."""
        return tuple(dict.fromkeys((*self.makes, *self.carries, *self.reads)))


def places(graph: ChannelGraph) -> tuple[Place, ...]:
    """The layers of a graph in order of execution.

    The sum of their ``params`` and ``macs`` is the cost of the whole model.
    """
    sizes = graph.sizes
    shapes = {name: tuple(extent.at(sizes) for extent in extents) for name, extents in graph.tensors.items()}
    params: dict[str, int] = {}
    for name in graph.parameters:
        params[_owner(name)] = params.get(_owner(name), 0) + math.prod(shapes[name])
    macs: dict[str, float] = {}
    for operation in graph.operations:
        here = operation.factor * math.prod(extent.at(sizes) for extent in operation.extents)
        macs[operation.module] = macs.get(operation.module, 0.0) + here
    roles = _roles(graph)
    lengths: dict[tuple[str, Role], int] = {}
    for axis in graph.axes:
        for site in axis.sites:
            lengths.setdefault((_owner(site.tensor), site.role), shapes[site.tensor][site.dim])
    found: list[Place] = []
    for module in _in_order(graph, dict.fromkeys((*map(_owner, graph.tensors), *params, *macs))):
        makes, reads, carries = (
            tuple(roles.get((module, role), ())) for role in (Role.OUTPUT, Role.INPUT, Role.VECTOR)
        )
        out = lengths.get((module, Role.OUTPUT), lengths.get((module, Role.VECTOR)))
        into = lengths.get((module, Role.INPUT))
        found.append(
            Place(module, params.get(module, 0), round(macs.get(module, 0.0)), makes, carries, reads, out, into)
        )
    return tuple(place for place in found if place.params or place.macs or place.axes)


def sizes_in_order(graph: ChannelGraph) -> dict[str, int]:
    """Full width of each prunable axis, in order of the first layer that has it.

    An untied branch stands where it is computed; the graph itself names branches after everything else.
    """
    met = dict.fromkeys(axis for place in places(graph) for axis in (*place.reads, *place.axes))
    return {axis: graph.sizes[axis] for axis in dict.fromkeys((*met, *graph.sizes)) if axis in graph.sizes}


def inside(block: Block, layers: Iterable[Place]) -> tuple[Place, ...]:
    """The layers that go with a block."""
    return tuple(place for place in layers if block.replaces(place.module))


def sentence_of(axis: ChannelAxis) -> str:
    """Why a frozen axis stays whole: ``Stays whole: reaches the model's output``."""
    return f"Stays whole: {(axis.frozen_because or '').removeprefix('kept whole: ')}"


def _roles(graph: ChannelGraph) -> Mapping[tuple[str, Role], dict[str, None]]:
    """Names of the axes by module and role, in order."""
    found: dict[tuple[str, Role], dict[str, None]] = {}
    for axis in graph.axes:
        for site in axis.sites:
            found.setdefault((_owner(site.tensor), site.role), {})[axis.name] = None
    return found


def _in_order(graph: ChannelGraph, modules: Iterable[str]) -> list[str]:
    """Modules in order of their first operation; one that ran none stands behind the one before it in the state."""
    ran = {name: number for number, name in enumerate(dict.fromkeys((*graph.touching, *graph.activations)))}
    place, keyed = -1, list[tuple[int, int, str]]()
    for number, name in enumerate(modules):
        place = ran.get(name, place)
        keyed.append((place, number, name))
    return [name for *_, name in sorted(keyed)]


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


_COLORS = ("#2f7ed8", "#d9730d", "#2a9d5c", "#c9407f", "#7d5fd3", "#0f97a6", "#b8860b", "#d04a3a")
"""Of mid lightness, so that they show on light and on dark."""
WHOLE = "#8b8f98"
"""The color of what stays whole."""


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
    def color_axes(self) -> tuple[str, ...]:
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
        color: As #rrggbb; gray for one that stays whole.
    """

    axis: ChannelAxis
    column: int
    marks: tuple[tuple[int, Mark], ...]
    color: str

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
    colors = dict(zip((axis.name for axis in graph.prunable), itertools.cycle(_COLORS), strict=False))
    columns, lanes = _Columns(), list[Lane]()
    for axis in sorted((axis for axis in graph.axes if axis.name in marks), key=lambda a: min(marks[a.name])):
        here = sorted(marks[axis.name].items())
        column = columns.free(here[0][0], here[-1][0])
        lanes.append(Lane(axis, column, tuple(here), colors.get(axis.name, WHOLE)))
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


def dot(graph: ChannelGraph, title: str) -> str:
    """A graph as DOT text: an arrow from the layer that makes channels to each that reads them, dotted lines between
    layers whose channels must stay or go together.

    Args:
        graph: What to draw.
        title: Of the drawing; quoted, like every name.
    """
    drawn = layout(graph)
    lines = [
        f"digraph {_quoted(title)} {{",
        f"  graph [rankdir=TB, label={_quoted(title)}, labelloc=t, fontname=Helvetica];",
        "  node [shape=box, style=rounded, fontname=Helvetica, fontsize=10];",
        "  edge [fontname=Helvetica, fontsize=9];",
    ]
    colors = {lane.axis.name: lane.color for lane in drawn.lanes}
    for number, row in enumerate(drawn.rows):
        words = "\n".join(filter(None, (row.label, row.channels, f"{_format.count(row.macs)} MACs")))
        color = next((colors[name] for name in row.color_axes), WHOLE)
        lines.append(f"  n{number} [label={_quoted(words)}, color={_quoted(color)}];")
    for lane in drawn.lanes:
        lines += _edges(lane)
    return "\n".join((*lines, "}\n"))


def _edges(lane: Lane) -> list[str]:
    name = f"{lane.axis.name} ({lane.axis.size})"
    hint = f"color={_quoted(lane.color)}, tooltip={_quoted(lane.words)}"
    look = f"{hint}, style=dashed" if lane.whole else hint
    makers = [row for row, mark in lane.marks if mark is not Mark.READS]
    lines: list[str] = []
    for row, mark in lane.marks:
        if mark is Mark.READS:
            before = [maker for maker in makers if maker < row] or makers
            if before:
                lines.append(f"  n{before[-1]} -> n{row} [{look}, label={_quoted(name)}];")
    for one, other in itertools.pairwise(makers):
        lines.append(f"  n{one} -> n{other} [{hint}, dir=none, style=dotted];")
    return lines or [f"  // {_comment(lane.words)}"]


def _quoted(text: str) -> str:
    """A DOT string: quotes and backslashes escaped, line ends as \\n."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _comment(text: str) -> str:
    return " ".join(text.split())


_ROW, _COLUMN, _LETTER = 22, 13, 6.75
"""Pixels: height of a row, distance of two lanes, advance of a letter of the 11 px monospace font."""
_TOP, _PAD, _BAR, _BRACKET = 94, 14, 56, 9
_MOST_LETTERS, _MOST_NOTE = 64, 90
_NO_XML = frozenset({*map(chr, range(0xD800, 0xE000)), "\ufffe", "\uffff"})
"""Characters beyond the control codes that no XML file may have."""
_LEGEND = "● makes channels   ■ scales them   ○ reads them   ┆ stays whole   [ block"
_STYLE = """
text{font:11px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;fill:#1d2330}
.bg{fill:#ffffff}.faint{fill:#5b6270}.head{font-size:15px;font-weight:600}
.guide{stroke:#dfe3ea}.bar{fill:#e6e9ef}.used{fill:#7b8494}.ring{fill:#ffffff}.block{stroke:#5b6270}
.axis:hover path{stroke-width:5}
@media (prefers-color-scheme:dark){
text{fill:#e8ebf1}.bg{fill:#14171d}.faint{fill:#a4abb8}
.guide{stroke:#2b313c}.bar{fill:#2b313c}.used{fill:#8b94a5}.ring{fill:#14171d}.block{stroke:#a4abb8}}
"""


def svg(graph: ChannelGraph, title: str) -> str:
    """Draw a graph: layers in order of execution, and for each axis a lane through all layers that share it.

    A filled dot makes the channels, a small square scales them, a ring reads them. Gray dashed lanes stay whole; their
    reason shows when the mouse rests on them. Colors suit a light and a dark background.

    Args:
        graph: What to draw.
        title: Above the picture; escaped, like every name.
    """
    return _Picture(layout(graph), _summary(graph)).draw(title)


def _summary(graph: ChannelGraph) -> str:
    blocks = f", {len(graph.removable)} of {len(graph.blocks)} residual blocks removed" if graph.blocks else ""
    return f"{len(graph.prunable)} of {len(graph.axes)} channel axes can be cut{blocks}."


class _Picture:
    """Positions of one drawing, in pixels."""

    def __init__(self, drawn: Layout, summary: str):
        self.drawn, self.summary = drawn, summary
        self.macs = max(sum(row.macs for row in drawn.rows), 1)
        self.most = max((row.macs for row in drawn.rows), default=0)
        brackets = max((bracket.column + 1 for bracket in drawn.brackets), default=0)
        self.left = _PAD + brackets * _BRACKET
        letters = min(max((len(row.label) for row in drawn.rows), default=0), _MOST_LETTERS)
        self.box = 2 * _PAD + letters * _LETTER
        self.channels = (
            self.left + self.box + max((len(row.channels) for row in drawn.rows), default=0) * _LETTER + _PAD
        )
        self.bar = self.channels + _PAD
        self.lanes = self.bar + _BAR + 8 * _LETTER + _PAD
        self.notes = self.lanes + drawn.columns * _COLUMN + _PAD
        notes = [len(self._note(number)) for number in range(len(drawn.rows))]
        self.width = max(
            self.notes + max(notes, default=0) * _LETTER + _PAD, max(len(summary), len(_LEGEND)) * _LETTER + 2 * _PAD
        )
        self.height = _TOP + len(drawn.rows) * _ROW + _PAD

    def draw(self, title: str) -> str:
        size = f'width="{self.width:.0f}" height="{self.height}" viewBox="0 0 {self.width:.0f} {self.height}"'
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<title>{_text(title)}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect class="bg" width="{self.width:.0f}" height="{self.height}"/>',
            _words(_PAD, 28, title, "head"),
            _words(_PAD, 47, self.summary, "faint"),
            _words(_PAD, 64, _LEGEND, "faint"),
            _words(self.bar, _TOP - 8, "MACs", "faint"),
            _words(self.left, _TOP - 8, "layer", "faint"),
            _words(self.channels, _TOP - 8, "channels", "faint", anchor="end"),
            _words(self.notes, _TOP - 8, "axes that begin here", "faint"),
            *(self._row(number, row) for number, row in enumerate(self.drawn.rows)),
            *(self._lane(lane) for lane in self.drawn.lanes),
            *(self._bracket(bracket) for bracket in self.drawn.brackets),
            "</svg>\n",
        ]
        return "\n".join(parts)

    def _middle(self, row: int) -> float:
        return _TOP + (row + 0.5) * _ROW

    def _row(self, number: int, row: Row) -> str:
        middle, share = self._middle(number), row.macs / self.macs
        mine = {lane.axis.name: lane for lane in self.drawn.lanes}
        lanes = [mine[name] for name in row.color_axes]
        top, tall = middle - _ROW / 2 + 2, _ROW - 4
        color = lanes[0].color if lanes else WHOLE
        parts = [
            f"<g><title>{_text(self._row_words(row))}</title>",
            f'<rect x="{self.left}" y="{top}" width="{self.box:.1f}" height="{tall}" rx="3" fill="{color}" '
            'fill-opacity="0.14"/>',
        ]
        for place, lane in enumerate(lanes):
            part = tall / len(lanes)
            box = f'x="{self.left}" y="{top + place * part:.2f}" width="5" height="{part:.2f}"'
            parts.append(f'<rect {box} fill="{lane.color}"/>')
        parts.append(_words(self.left + 11, middle + 4, _short(row.label, _MOST_LETTERS)))
        parts.append(_words(self.channels, middle + 4, row.channels, "faint", anchor="end"))
        if row.macs:
            bar = f'x="{self.bar:.1f}" y="{middle - 4}" height="8"'
            parts.append(f'<rect class="bar" {bar} width="{_BAR}"/>')
            parts.append(f'<rect class="used" {bar} width="{max(_BAR * row.macs / self.most, 0.5):.2f}"/>')
            parts.append(_words(self.bar + _BAR + 6, middle + 4, f"{100 * share:.1f} %", "faint"))
        last = max((lane.column for lane in mine.values() if number in dict(lane.marks)), default=None)
        if last is not None:
            start, end = self.lanes - _PAD / 2, self.lanes + last * _COLUMN
            parts.append(f'<path class="guide" d="M{start:.1f} {middle}H{end:.1f}" fill="none"/>')
        parts.append(_words(self.notes, middle + 4, self._note(number), "faint"))
        return "".join(parts) + "</g>"

    def _row_words(self, row: Row) -> str:
        return f"{row.label}: {_format.count(row.params)} parameters, {_format.count(row.macs)} MACs"

    def _note(self, row: int) -> str:
        """The axes that begin in a row, in words."""
        notes = [
            f"{lane.axis.name} {lane.axis.size}" + (" (whole)" if lane.whole else "")
            for lane in self.drawn.beginning(row)
        ]
        return _short(", ".join(notes), _MOST_NOTE)

    def _bracket(self, bracket: Bracket) -> str:
        x, end = self.left - 5 - bracket.column * _BRACKET, _ROW / 2 - 3
        line = f"M{x + 3} {self._middle(bracket.first) - end}h-4V{self._middle(bracket.last) + end}h4"
        dashed = ' stroke-dasharray="2 3"' if bracket.block.kept_because is not None else ""
        shape = f'<path class="block" d="{line}" stroke-width="1.5" fill="none"{dashed}/>'
        return f"<g><title>{_text(bracket.words)}</title>{shape}</g>"

    def _lane(self, lane: Lane) -> str:
        x, color = self.lanes + lane.column * _COLUMN, lane.color
        first, last = self._middle(lane.marks[0][0]), self._middle(lane.marks[-1][0])
        dashed = ' stroke-dasharray="3 3"' if lane.whole else ""
        line = f'<path d="M{x:.1f} {first}V{last}" stroke="{color}" stroke-width="2.5" fill="none"{dashed}/>'
        marks = "".join(_mark(x, self._middle(row), mark, color) for row, mark in lane.marks)
        return f'<g class="axis"><title>{_text(lane.words)}</title>{line}{marks}</g>'


def _mark(x: float, y: float, mark: Mark, color: str) -> str:
    if mark is Mark.CARRIES:
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5}" width="7" height="7" fill="{color}"/>'
    if mark is Mark.MAKES:
        return f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{color}"/>'
    return f'<circle class="ring" cx="{x:.1f}" cy="{y}" r="3.5" stroke="{color}" stroke-width="2"/>'


def _words(x: float, y: float, text: str, kind: str = "", *, anchor: str = "start") -> str:
    kind = f' class="{kind}"' if kind else ""
    end = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y}"{kind}{end} xml:space="preserve">{_text(text)}</text>'


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(text: str) -> str:
    """Escaped, and without the characters that XML cannot hold."""
    return escape("".join(c if c in "\t\n" or (c >= " " and c not in _NO_XML) else "\ufffd" for c in text))


_WRITERS = {".svg": svg, ".dot": dot}


def check_drawing(path: Path | str) -> None:
    """Refuse a file that `write_drawing` could not write.

    Raises:
        ExportError: If the name does not end in .svg or .dot, or is that of a folder.
    """
    path = Path(path)
    if path.suffix.lower() not in _WRITERS:
        raise ExportError(
            f"`draw` must be a file name that ends in .svg (opens in a browser) or .dot (for graphviz); got {path}."
        )
    if path.is_dir():
        raise ExportError(f"`draw` must be a file; got a folder: {path}. Choose another name.")


def write_drawing(path: Path | str, graph: ChannelGraph, title: str) -> Path:
    """Draw a graph: its layers, and which of them share an axis.

    An ``.svg`` needs nothing else and suits a light and a dark background; a ``.dot`` is for graphviz.

    Args:
        path: Where; replaced atomically.
        graph: A traced model, with choices applied or without.
        title: Above the drawing, such as the name of the model.

    Returns:
        The absolute path of the file.

    Raises:
        ExportError: If the name does not end in .svg or .dot, or is that of a folder.
        OSError: If the file cannot be written.
    """
    check_drawing(path)
    path = Path(path).absolute()
    text = _WRITERS[path.suffix.lower()](graph, title)
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
    return path
