"""The drawing of a graph: well-formed whatever the names are, complete, and written whole or not at all."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from zoo import ZOO

from secateur.cost import CostModel
from secateur.errors import ExportError
from secateur.graph import ChannelGraph, Selection, trace
from secateur.report import frozen_sentence, list_layers, write_drawing
from secateur.report.graph_drawing import Mark, dot, layout, svg

_SVG = "{http://www.w3.org/2000/svg}"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


class Net(nn.Module):
    """A stem, a residual block, a depthwise convolution and a head; one module's name is hostile."""

    def __init__(self, hostile: str = "head"):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = Block()
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.add_module(hostile, nn.Linear(8, 5))
        self.last = hostile

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.block(self.stem(x))) * self.scale
        return self.get_submodule(self.last)(x.mean((2, 3)))


HOSTILE = '<b>"&\\n]]></svg>\x07'


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    return trace(Net(), torch.zeros(1, 3, 8, 8))


@pytest.fixture(scope="module")
def hostile() -> ChannelGraph:
    return trace(Net(HOSTILE), torch.zeros(1, 3, 8, 8))


def test_layers_in_order_of_execution_with_the_whole_cost(graph: ChannelGraph):
    layers = list_layers(graph)
    assert [place.module for place in layers] == [
        "stem", "block.conv1", "block.bn1", "block.conv2", "block.bn2", "depthwise", "", "head",
    ]  # fmt: skip
    cost = CostModel(graph).original
    assert sum(place.macs for place in layers) == cost.macs
    assert sum(place.params for place in layers) == cost.params
    by_name = {place.module: place for place in layers}
    assert by_name["block.conv2"].makes == ("stem",)
    assert by_name["block.conv2"].reads == ("block.conv1",)
    assert (by_name["block.conv2"].channels_in, by_name["block.conv2"].channels_out) == (12, 8)
    assert by_name["depthwise"].carries == ("stem",)
    assert by_name["depthwise"].axes == ("stem",)
    assert by_name[""].params == 8


def test_norms_fold_into_their_layer_and_lanes_join_what_shares_an_axis(graph: ChannelGraph):
    drawn = layout(graph)
    assert [row.label for row in drawn.rows] == [
        "stem", "block.conv1 + bn1", "block.conv2 + bn2", "depthwise", "(model)", "head",
    ]  # fmt: skip
    lanes = {lane.axis.name: lane for lane in drawn.lanes}
    assert set(lanes) == {axis.name for axis in graph.axes}
    assert lanes["stem"].marks == (
        (0, Mark.MAKES), (1, Mark.READS), (2, Mark.MAKES), (3, Mark.CARRIES), (4, Mark.CARRIES), (5, Mark.READS),
    )  # fmt: skip
    assert lanes["block.conv1"].marks == ((1, Mark.MAKES), (2, Mark.READS))
    assert [(bracket.block.name, bracket.first, bracket.last) for bracket in drawn.brackets] == [("block", 1, 2)]


def test_lanes_that_overlap_have_columns_of_their_own(graph: ChannelGraph):
    lanes = layout(graph).lanes
    taken = [(lane.column, row) for lane in lanes for row in range(lane.marks[0][0], lane.marks[-1][0] + 1)]
    assert len(taken) == len(set(taken))


@pytest.mark.parametrize("which", ["graph", "hostile"])
def test_svg_is_well_formed_and_has_every_axis(which: str, request: pytest.FixtureRequest):
    graph: ChannelGraph = request.getfixturevalue(which)
    title = f'{which} <&> "title" \x00'
    root = ET.fromstring(svg(graph, title))
    assert root.tag == f"{_SVG}svg"
    assert root.find(f"{_SVG}title").text == title.replace("\x00", r"\u0000")
    hints = [node.text for node in root.iter(f"{_SVG}title")]
    for axis in graph.axes:
        name = axis.name.replace("\x07", r"\u0007")
        mine = [hint for hint in hints if hint.startswith(f"{name}: {axis.size} channels")]
        assert len(mine) == 1
        assert ("Stays whole" in mine[0]) == (axis.frozen_because is not None)
    tags = {node.tag.removeprefix(_SVG) for node in root.iter()}
    assert tags == {"svg", "title", "style", "rect", "text", "g", "path", "circle"}


def test_svg_loads_nothing_and_knows_dark_backgrounds(graph: ChannelGraph):
    text = svg(graph, "net")
    assert "prefers-color-scheme:dark" in text
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert "<script" not in text


def test_everything_lies_inside_of_the_picture(graph: ChannelGraph):
    root = ET.fromstring(svg(graph, "net"))
    width, height = float(root.get("width")), float(root.get("height"))
    for node in root.iter():
        for key, most in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert 0 <= float(node.get(key, 0)) <= most
    ends = [
        float(n.get("x", 0)) + 6.75 * len(n.text or "") for n in root.iter(f"{_SVG}text") if not n.get("text-anchor")
    ]
    assert max(ends) <= width


def test_frozen_axes_are_gray_and_say_why(graph: ChannelGraph):
    chosen = Selection(exclude=("block.conv1",)).apply(graph)
    lane = next(lane for lane in layout(chosen).lanes if lane.axis.name == "block.conv1")
    assert lane.whole
    assert lane.color == "#8b8f98"
    assert lane.words.endswith("Stays whole: matched exclude pattern 'block.conv1'")
    assert frozen_sentence(chosen.by_name["head"]) == "Stays whole: reaches the model's output"
    (bracket,) = layout(chosen).brackets
    assert bracket.words == "Block block: stays, matched exclude pattern 'block.conv1'"
    assert "stroke-dasharray" in svg(chosen, "net")


def test_axes_that_go_in_multiples_say_so(graph: ChannelGraph):
    axes = tuple(replace(axis, divisor=4) if axis.name == "stem" else axis for axis in graph.axes)
    lanes = {lane.axis.name: lane for lane in layout(replace(graph, axes=axes)).lanes}
    assert lanes["stem"].words == f"stem: 8 channels, {len(graph.by_name['stem'].sites)} sites, in multiples of 4"


def test_dot_has_a_node_for_each_row_and_an_arrow_for_each_reader(graph: ChannelGraph):
    text = dot(graph, "net")
    assert text.startswith('digraph "net" {')
    assert text.endswith("}\n")
    assert len(re.findall(r"^  n\d+ \[label=", text, flags=re.MULTILINE)) == 6
    arrows = re.findall(r"^  n(\d+) -> n(\d+) \[.*label=\"([^\"]*)\"\];", text, flags=re.MULTILINE)
    assert arrows == [
        ("0", "1", "stem (8)"), ("4", "5", "stem (8)"), ("1", "2", "block.conv1 (12)"),
    ]  # fmt: skip
    coupled = re.findall(r"^  n(\d+) -> n(\d+) \[.*style=dotted\];", text, flags=re.MULTILINE)
    assert coupled == [("0", "2"), ("2", "3"), ("3", "4")]


def test_names_cannot_leave_their_quotes_in_dot(hostile: ChannelGraph):
    for line in dot(hostile, HOSTILE).splitlines()[1:-1]:
        if not line.startswith("  //"):
            outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", line)
            assert re.fullmatch(r"[\w =,;\[\]>-]*", outside), outside


@pytest.mark.parametrize("name", ZOO)
def test_every_net_of_the_zoo_can_be_drawn(name: str):
    animal = ZOO[name]()
    graph = trace(animal.model, animal.example)
    layers, cost = list_layers(graph), CostModel(graph).original
    assert (sum(p.macs for p in layers), sum(p.params for p in layers)) == (cost.macs, cost.params)
    hints = [node.text for node in ET.fromstring(svg(graph, name)).iter(f"{_SVG}title")]
    for axis in graph.prunable:
        assert sum(hint.startswith(f"{axis.name}: {axis.size} channels") for hint in hints) == 1
    assert sum(hint.startswith("Block ") for hint in hints) == len(graph.blocks)
    text = dot(graph, name)
    assert text.count("{") == text.count("}") == 1
    for axis in graph.prunable:
        assert axis.name in text


def test_files_are_written_whole(tmp_path: Path, graph: ChannelGraph, monkeypatch: pytest.MonkeyPatch):
    for name in ("net.svg", "deep/net.DOT"):
        path = write_drawing(tmp_path / name, graph, "net")
        assert path == tmp_path / name
        assert path.read_text(encoding="utf-8").strip()
    before = (tmp_path / "net.svg").read_bytes()

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_drawing(tmp_path / "net.svg", graph, "other")
    assert (tmp_path / "net.svg").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "net.svg"]


def test_other_files_are_refused(tmp_path: Path, graph: ChannelGraph):
    with pytest.raises(ExportError, match=r"`draw` must be a file name that ends in \.svg .* or \.dot .*net\.png"):
        write_drawing(tmp_path / "net.png", graph, "net")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(ExportError, match=r"`draw` must be a file; got a folder.*folder\.svg"):
        write_drawing(tmp_path / "folder.svg", graph, "net")
