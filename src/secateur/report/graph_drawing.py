"""Drawings of a channel graph, as one SVG picture or as DOT text for graphviz.

`layout` gives each layer a row and each axis a vertical lane. Boxes and arrows of 60 layers with shared axes would be
unreadable and need graphviz; rows and lanes stay readable for a DenseNet, and no library is needed to draw them.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from secateur._files import write_atomic
from secateur._text import PAGE, html_text, visible
from secateur.errors import ExportError
from secateur.graph.graph import Block, ChannelAxis, ChannelGraph
from secateur.report import units
from secateur.report.graph_layers import GraphLayer, frozen_sentence, list_layers

_COLORS = ("#2f7ed8", "#d9730d", "#2a9d5c", "#c9407f", "#7d5fd3", "#0f97a6", "#b8860b", "#d04a3a")
"""Colors of medium lightness, visible on light and dark backgrounds."""
FROZEN_COLOR = "#8b8f98"
"""The color of frozen axes."""


class Mark(Enum):
    """What a layer does with an axis."""

    MAKES = "makes"
    CARRIES = "carries"
    READS = "reads"


@dataclass(frozen=True)
class LayerRow:
    """A row of the drawing: a layer and the norms directly after it, which only scale its outputs.

    Attributes:
        layer: The layer.
        folded: The norms.
    """

    layer: GraphLayer
    folded: tuple[GraphLayer, ...] = ()

    @property
    def label(self) -> str:
        """The text of the row, such as ``layer1.0.conv1 + bn1``."""
        return " + ".join((self.layer.module or "(model)", *(p.module.rpartition(".")[2] for p in self.folded)))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all its layers at batch 1."""
        return self.layer.macs + sum(layer.macs for layer in self.folded)

    @property
    def params(self) -> int:
        """Parameters of all its layers."""
        return self.layer.params + sum(layer.params for layer in self.folded)

    @property
    def color_axes(self) -> tuple[str, ...]:
        """The axes of its outputs."""
        return self.layer.makes or self.layer.carries

    @property
    def channels(self) -> str:
        """Such as ``64 → 128``; one number where channels are only carried; empty if there are none."""
        into, out = self.layer.channels_in, self.layer.channels_out
        return " → ".join(str(number) for number in (into, out) if number is not None)


@dataclass(frozen=True)
class AxisLane:
    """An axis in the drawing: a vertical line with a mark at each of its layers.

    Attributes:
        axis: The axis.
        column: Its column, from the left.
        marks: (row, mark) pairs from the first row to the last.
        color: As #rrggbb; gray for a frozen axis.
    """

    axis: ChannelAxis
    column: int
    marks: tuple[tuple[int, Mark], ...]
    color: str

    @property
    def whole(self) -> bool:
        """Whether the axis is frozen."""
        return self.axis.frozen_because is not None

    @property
    def words(self) -> str:
        """The name and size of the axis and, if it is frozen, the reason."""
        axis = self.axis
        size = f"{axis.name}: {axis.size} channels, {len(axis.sites)} sites"
        if axis.divisor > 1:
            size += f", in multiples of {axis.divisor}"
        return f"{size}. {frozen_sentence(axis)}" if self.whole else size


@dataclass(frozen=True)
class Bracket:
    """A residual block in the drawing: a bracket beside its rows.

    Attributes:
        block: The block.
        column: Its column, from the layers outward.
        first: Its first row.
        last: Its last row.
    """

    block: Block
    column: int
    first: int
    last: int

    @property
    def words(self) -> str:
        """Whether the block can be removed, or why not."""
        why = (self.block.kept_because or "").removeprefix("kept whole: ")
        return f"Block {self.block.name}: " + (f"stays, {why}" if why else "a residual branch that can be removed")


@dataclass(frozen=True)
class Layout:
    """Rows from top to bottom, lanes from left to right, and brackets beside the rows."""

    rows: tuple[LayerRow, ...]
    lanes: tuple[AxisLane, ...]
    brackets: tuple[Bracket, ...] = ()

    @property
    def columns(self) -> int:
        """Number of columns of the lanes."""
        return 1 + max((lane.column for lane in self.lanes), default=-1)

    def lanes_from(self, row: int) -> list[AxisLane]:
        """Return the lanes whose first mark is in a row, from left to right."""
        return sorted((lane for lane in self.lanes if lane.marks[0][0] == row), key=lambda lane: lane.column)


def layout(graph: ChannelGraph) -> Layout:
    """Lay out a graph: rows in order of execution, each axis in the leftmost column that is free along its rows."""
    rows = _rows(list_layers(graph))
    marks = _marks(rows)
    colors = dict(zip((axis.name for axis in graph.prunable), itertools.cycle(_COLORS), strict=False))
    columns, lanes = _Columns(), list[AxisLane]()
    for axis in sorted((axis for axis in graph.axes if axis.name in marks), key=lambda a: min(marks[a.name])):
        here = sorted(marks[axis.name].items())
        column = columns.free(here[0][0], here[-1][0])
        lanes.append(AxisLane(axis, column, tuple(here), colors.get(axis.name, FROZEN_COLOR)))
    return Layout(rows, tuple(lanes), _brackets(graph, rows))


def _brackets(graph: ChannelGraph, rows: Sequence[LayerRow]) -> tuple[Bracket, ...]:
    columns, found = _Columns(), list[Bracket]()
    for block in graph.blocks:
        inside = [number for number, row in enumerate(rows) if block.replaces(row.layer.module)]
        if inside:
            found.append(Bracket(block, columns.free(inside[0], inside[-1]), inside[0], inside[-1]))
    return tuple(found)


class _Columns:
    """Assigns columns so that the contents of a column do not overlap."""

    def __init__(self) -> None:
        self.busy: list[list[tuple[int, int]]] = []

    def free(self, first: int, last: int) -> int:
        """Take the first column that is free from one row to another."""
        for column, taken in enumerate(self.busy):
            if all(last < begin or end < first for begin, end in taken):
                taken.append((first, last))
                return column
        self.busy.append([(first, last)])
        return len(self.busy) - 1


def _rows(layers: Sequence[GraphLayer]) -> tuple[LayerRow, ...]:
    rows: list[LayerRow] = []
    for layer in layers:
        last = rows[-1] if rows else None
        if last is not None and _follows(last.layer, layer):
            rows[-1] = LayerRow(last.layer, (*last.folded, layer))
        else:
            rows.append(LayerRow(layer))
    return tuple(rows)


def _follows(layer: GraphLayer, norm: GraphLayer) -> bool:
    """Whether a layer is a norm of the one before it, in the same parent module."""
    only_carries = bool(norm.carries) and not (norm.macs or norm.makes or norm.reads)
    beside = layer.module.rpartition(".")[0] == norm.module.rpartition(".")[0] and norm.module != ""
    return only_carries and beside and norm.carries == (layer.makes or layer.carries)


def _marks(rows: Sequence[LayerRow]) -> Mapping[str, dict[int, Mark]]:
    """Return for every axis the mark of each row; of several marks the first of `Mark` counts."""
    found: dict[str, dict[int, Mark]] = {}
    for number, layer in ((number, layer) for number, row in enumerate(rows) for layer in (row.layer, *row.folded)):
        for mark, axes in ((Mark.MAKES, layer.makes), (Mark.CARRIES, layer.carries), (Mark.READS, layer.reads)):
            for axis in axes:
                found.setdefault(axis, {}).setdefault(number, mark)
    return found


def dot(graph: ChannelGraph, title: str) -> str:
    """Draw a graph as DOT text.

    Arrows lead from the layer that makes channels to each that reads them; dotted lines are between layers whose
    channels must be kept or removed together.

    Args:
        graph: The graph.
        title: The title; quoted, like every name.
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
        words = "\n".join(filter(None, (row.label, row.channels, f"{units.count(row.macs)} MACs")))
        color = next((colors[name] for name in row.color_axes), FROZEN_COLOR)
        lines.append(f"  n{number} [label={_quoted(words)}, color={_quoted(color)}];")
    for lane in drawn.lanes:
        lines += _edges(lane)
    return "\n".join((*lines, "}\n"))


def _edges(lane: AxisLane) -> list[str]:
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
    """Return a DOT string: quotes and backslashes escaped, line ends as \\n."""
    shown = visible(text, keep=PAGE)
    return '"' + shown.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _comment(text: str) -> str:
    return " ".join(visible(text, keep=PAGE).split())


_ROW, _COLUMN, _LETTER = 22, 13, 6.75
"""Pixels: height of a row, distance of two lanes, advance of a letter of the 11 px monospace font."""
_TOP, _PAD, _BAR, _BRACKET = 94, 14, 56, 9
_MAX_LABEL, _MAX_NOTE = 64, 90
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
    """Draw a graph as SVG: layers in order of execution, and for each axis a lane through all layers that share it.

    A filled dot makes the channels, a small square scales them, a ring reads them. Gray dashed lanes are
    frozen; a tooltip says why. Colors suit a light and a dark background.

    Args:
        graph: The graph.
        title: The title above the picture; escaped, like every name.
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
        letters = min(max((len(row.label) for row in drawn.rows), default=0), _MAX_LABEL)
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
            f"<title>{html_text(title)}</title>",
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

    def _row(self, number: int, row: LayerRow) -> str:
        middle, share = self._middle(number), row.macs / self.macs
        mine = {lane.axis.name: lane for lane in self.drawn.lanes}
        lanes = [mine[name] for name in row.color_axes]
        top, tall = middle - _ROW / 2 + 2, _ROW - 4
        color = lanes[0].color if lanes else FROZEN_COLOR
        parts = [
            f"<g><title>{html_text(self._row_words(row))}</title>",
            f'<rect x="{self.left}" y="{top}" width="{self.box:.1f}" height="{tall}" rx="3" fill="{color}" '
            'fill-opacity="0.14"/>',
        ]
        for index, lane in enumerate(lanes):
            part = tall / len(lanes)
            box = f'x="{self.left}" y="{top + index * part:.2f}" width="5" height="{part:.2f}"'
            parts.append(f'<rect {box} fill="{lane.color}"/>')
        parts.append(_words(self.left + 11, middle + 4, _short(row.label, _MAX_LABEL)))
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

    def _row_words(self, row: LayerRow) -> str:
        return f"{row.label}: {units.count(row.params)} parameters, {units.count(row.macs)} MACs"

    def _note(self, row: int) -> str:
        """Return the text for the axes that begin in a row."""
        notes = [
            f"{lane.axis.name} {lane.axis.size}" + (" (whole)" if lane.whole else "")
            for lane in self.drawn.lanes_from(row)
        ]
        return _short(", ".join(notes), _MAX_NOTE)

    def _bracket(self, bracket: Bracket) -> str:
        x, end = self.left - 5 - bracket.column * _BRACKET, _ROW / 2 - 3
        line = f"M{x + 3} {self._middle(bracket.first) - end}h-4V{self._middle(bracket.last) + end}h4"
        dashed = ' stroke-dasharray="2 3"' if bracket.block.kept_because is not None else ""
        shape = f'<path class="block" d="{line}" stroke-width="1.5" fill="none"{dashed}/>'
        return f"<g><title>{html_text(bracket.words)}</title>{shape}</g>"

    def _lane(self, lane: AxisLane) -> str:
        x, color = self.lanes + lane.column * _COLUMN, lane.color
        first, last = self._middle(lane.marks[0][0]), self._middle(lane.marks[-1][0])
        dashed = ' stroke-dasharray="3 3"' if lane.whole else ""
        line = f'<path d="M{x:.1f} {first}V{last}" stroke="{color}" stroke-width="2.5" fill="none"{dashed}/>'
        marks = "".join(_mark(x, self._middle(row), mark, color) for row, mark in lane.marks)
        return f'<g class="axis"><title>{html_text(lane.words)}</title>{line}{marks}</g>'


def _mark(x: float, y: float, mark: Mark, color: str) -> str:
    if mark is Mark.CARRIES:
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5}" width="7" height="7" fill="{color}"/>'
    if mark is Mark.MAKES:
        return f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{color}"/>'
    return f'<circle class="ring" cx="{x:.1f}" cy="{y}" r="3.5" stroke="{color}" stroke-width="2"/>'


def _words(x: float, y: float, text: str, kind: str = "", *, anchor: str = "start") -> str:
    kind = f' class="{kind}"' if kind else ""
    end = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y}"{kind}{end} xml:space="preserve">{html_text(text)}</text>'


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


_WRITERS = {".svg": svg, ".dot": dot}


def check_drawing(path: Path | str) -> None:
    """Refuse a path that `write_drawing` could not write.

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
    """Write a drawing of a graph: its layers, and which of them share an axis.

    An ``.svg`` is one self-contained file that suits a light and a dark background; a ``.dot`` is for graphviz.

    Args:
        path: The file; replaced atomically.
        graph: The graph, with a selection applied or without.
        title: The title above the drawing, such as the name of the model.

    Returns:
        The absolute path of the file.

    Raises:
        ExportError: If the name does not end in .svg or .dot, or is that of a folder.
        OSError: If the file cannot be written.
    """
    check_drawing(path)
    path = Path(path).absolute()
    text = _WRITERS[path.suffix.lower()](graph, title)
    write_atomic(path, text.encode("utf-8", "backslashreplace"))
    return path
