"""A channel graph as one SVG picture that needs nothing else."""

from html import escape

from secateur.graph import ChannelGraph
from secateur.report import _format
from secateur.report._layout import WHOLE, Bracket, Lane, Layout, Mark, Row, layout

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

    A filled dot makes the channels, a small square scales them, a ring reads them. Grey dashed lanes stay whole; their
    reason shows when the mouse rests on them. Colours suit a light and a dark background.

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
        lanes = [mine[name] for name in row.colour_axes]
        top, tall = middle - _ROW / 2 + 2, _ROW - 4
        colour = lanes[0].colour if lanes else WHOLE
        parts = [
            f"<g><title>{_text(self._row_words(row))}</title>",
            f'<rect x="{self.left}" y="{top}" width="{self.box:.1f}" height="{tall}" rx="3" fill="{colour}" '
            'fill-opacity="0.14"/>',
        ]
        for place, lane in enumerate(lanes):
            part = tall / len(lanes)
            box = f'x="{self.left}" y="{top + place * part:.2f}" width="5" height="{part:.2f}"'
            parts.append(f'<rect {box} fill="{lane.colour}"/>')
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
        x, colour = self.lanes + lane.column * _COLUMN, lane.colour
        first, last = self._middle(lane.marks[0][0]), self._middle(lane.marks[-1][0])
        dashed = ' stroke-dasharray="3 3"' if lane.whole else ""
        line = f'<path d="M{x:.1f} {first}V{last}" stroke="{colour}" stroke-width="2.5" fill="none"{dashed}/>'
        marks = "".join(_mark(x, self._middle(row), mark, colour) for row, mark in lane.marks)
        return f'<g class="axis"><title>{_text(lane.words)}</title>{line}{marks}</g>'


def _mark(x: float, y: float, mark: Mark, colour: str) -> str:
    if mark is Mark.CARRIES:
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5}" width="7" height="7" fill="{colour}"/>'
    if mark is Mark.MAKES:
        return f'<circle cx="{x:.1f}" cy="{y}" r="4.5" fill="{colour}"/>'
    return f'<circle class="ring" cx="{x:.1f}" cy="{y}" r="3.5" stroke="{colour}" stroke-width="2"/>'


def _words(x: float, y: float, text: str, kind: str = "", *, anchor: str = "start") -> str:
    kind = f' class="{kind}"' if kind else ""
    end = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y}"{kind}{end} xml:space="preserve">{_text(text)}</text>'


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(text: str) -> str:
    """Escaped, and without the characters that XML cannot hold."""
    return escape("".join(c if c in "\t\n" or (c >= " " and c not in _NO_XML) else "\ufffd" for c in text))
