"""A channel graph in the language of graphviz."""

import itertools

from secateur.graph import ChannelGraph
from secateur.report import _format
from secateur.report._layout import WHOLE, Lane, Mark, layout


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
    colours = {lane.axis.name: lane.colour for lane in drawn.lanes}
    for number, row in enumerate(drawn.rows):
        words = "\n".join(filter(None, (row.label, row.channels, f"{_format.count(row.macs)} MACs")))
        colour = next((colours[name] for name in row.colour_axes), WHOLE)
        lines.append(f"  n{number} [label={_quoted(words)}, color={_quoted(colour)}];")
    for lane in drawn.lanes:
        lines += _edges(lane)
    return "\n".join((*lines, "}\n"))


def _edges(lane: Lane) -> list[str]:
    name = f"{lane.axis.name} ({lane.axis.size})"
    hint = f"color={_quoted(lane.colour)}, tooltip={_quoted(lane.words)}"
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
