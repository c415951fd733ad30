"""Selections by name patterns: which axes are frozen, with which reason, and which patterns are refused."""

import pytest
import torch
from torch import nn

from secateur.errors import SelectionError
from secateur.graph import ChannelGraph, Selection, matches_axis, trace


class Stage(nn.Module):
    """A residual block between a stem and a head that reads it."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(8, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(x).relu())


class Net(nn.Module):
    """stem -> layer1 (residual: shares the stem's channels) -> down -> layer2 (residual) -> head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = Stage()
        self.down = nn.Conv2d(8, 8, 2, stride=2)
        self.layer2 = Stage()
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer2(self.down(self.layer1(self.stem(x)))).mean((2, 3)))


@pytest.fixture(scope="module")
def graph() -> ChannelGraph:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trace(Net(), torch.randn(1, 3, 8, 8))


def names(graph: ChannelGraph) -> list[str]:
    return [axis.name for axis in graph.prunable]


def test_the_net_has_the_axes_that_these_tests_speak_of(graph: ChannelGraph):
    assert names(graph) == ["stem", "layer1.conv1", "down", "layer2.conv1"]


@pytest.mark.parametrize(
    ("choices", "left"),
    [
        (Selection(), ["stem", "layer1.conv1", "down", "layer2.conv1"]),
        # A stage by its name, or by what is inside of it: the streams that it makes are its own too.
        (Selection(include=("layer2",)), ["down", "layer2.conv1"]),
        (Selection(include=("layer2.*",)), ["down", "layer2.conv1"]),
        # `down` reads the stem's channels, but they are not its own.
        (Selection(include=("down",)), ["down"]),
        (Selection(exclude=("down",)), ["stem", "layer1.conv1", "layer2.conv1"]),
        # ... unless it shall lose no weight.
        (Selection(whole=("down",)), ["layer1.conv1", "layer2.conv1"]),
        (Selection(include=("*.conv1",)), ["layer1.conv1", "layer2.conv1"]),
        (Selection(include=("layer?",), exclude=("layer2.conv2",)), ["stem", "layer1.conv1", "layer2.conv1"]),
        (Selection(include=("stem", "layer2.conv1")), ["stem", "layer2.conv1"]),
        (Selection(exclude=("layer1.conv1.bias",)), ["stem", "down", "layer2.conv1"]),
        # Reading only: the head's own channels are frozen anyway.
        (Selection(exclude=("head",)), ["stem", "layer1.conv1", "down", "layer2.conv1"]),
        (Selection(whole=("head",)), ["stem", "layer1.conv1", "layer2.conv1"]),
    ],
)
def test_what_may_still_be_cut(graph: ChannelGraph, choices: Selection, left: list[str]):
    assert names(choices.apply(graph)) == left


@pytest.mark.parametrize(
    ("choices", "left"),
    [
        (Selection(), ["layer1", "layer2"]),
        (Selection(include=("layer2",)), ["layer2"]),
        (Selection(include=("layer2.*",)), ["layer2"]),
        # Only a part of the block may go: it stays.
        (Selection(include=("layer2.conv1",)), []),
        (Selection(exclude=("layer2.conv2.bias",)), ["layer1"]),
        (Selection(whole=("layer1.conv1",)), ["layer2"]),
        # A block has its own weights: what it reads is not one of them.
        (Selection(whole=("down",)), ["layer1", "layer2"]),
        (Selection(exclude=("down",)), ["layer1", "layer2"]),
    ],
)
def test_which_blocks_may_still_be_removed(graph: ChannelGraph, choices: Selection, left: list[str]):
    assert [block.name for block in choices.apply(graph).removable] == left


@pytest.mark.parametrize(
    ("choices", "reason"),
    [
        (Selection(include=("layer1",)), "kept whole: not all of it matched an include pattern ('layer1')"),
        (Selection(exclude=("*2.conv1",)), "kept whole: matched exclude pattern '*2.conv1'"),
        (Selection(whole=("layer2.conv2",)), "kept whole: a layer of it matched 'layer2.conv2'"),
    ],
)
def test_blocks_say_why_they_stay(graph: ChannelGraph, choices: Selection, reason: str):
    assert choices.apply(graph).blocks_by_name["layer2"].kept_because == reason


def test_frozen_axes_say_why_and_old_reasons_stay(graph: ChannelGraph):
    chosen = Selection(include=("layer*",), exclude=("layer1.*",), whole=("head",)).apply(graph)
    why = {axis.name: axis.frozen_because for axis in chosen.axes}
    assert why["stem"] == why["layer1.conv1"] == "kept whole: matched exclude pattern 'layer1.*'"
    assert why["down"] == "kept whole: a layer that matched 'head' makes or reads it"
    assert why["layer2.conv1"] is None
    assert why["head"] == graph.by_name["head"].frozen_because
    only = Selection(include=("down", "stem")).apply(graph)
    assert only.by_name["layer2.conv1"].frozen_because == "kept whole: matched no include pattern ('down', 'stem')"


def test_the_given_graph_stays_as_it_was(graph: ChannelGraph):
    before = names(graph)
    Selection(exclude=("stem",)).apply(graph)
    assert names(graph) == before
    assert Selection().apply(graph) is graph


def test_extents_of_kept_axes_become_constant(graph: ChannelGraph):
    chosen = Selection(include=("layer2.conv1",)).apply(graph)
    left = {name for extents in chosen.tensors.values() for extent in extents for name, _ in extent.terms}
    assert left == {"layer2.conv1"}


def test_pattern_that_means_nothing_names_what_is_near_and_the_list(graph: ChannelGraph):
    with pytest.raises(SelectionError, match=r"`exclude` must match.*'laier1'.*Did you mean layer1.*secateur inspect"):
        Selection(exclude=("laier1",)).apply(graph)
    with pytest.raises(SelectionError, match=r"`include` must match.*'layer9\.\*'.*Did you mean layer"):
        Selection(include=("layer9.*",)).apply(graph)
    with pytest.raises(SelectionError, match=r"`whole` must match.*'zzz' matches none\. `secateur inspect`"):
        Selection(whole=("zzz",)).apply(graph)


def test_whole_may_name_a_layer_that_only_reads(graph: ChannelGraph):
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)
            self.mix = nn.Linear(6, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix(self.conv(x).mean((2, 3)))

    reads = trace(Reads(), torch.zeros(1, 3, 8, 8))
    assert names(reads) == ["conv"]
    with pytest.raises(SelectionError, match=r"must leave something to cut; got keep whole mix"):
        Selection(whole=("mix",)).apply(reads)


def test_whole_knows_a_layer_that_shares_the_weight_of_another():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1)
            self.first = nn.Conv2d(8, 8, 1, bias=False)
            self.second = nn.Conv2d(8, 8, 1, bias=False)
            self.second.weight = self.first.weight
            self.mid, self.head = nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.mid(self.second(self.first(self.stem(x)).relu()).mean((2, 3))))

    tied = trace(Tied(), torch.zeros(1, 3, 4, 4))
    assert names(tied) == ["stem", "mid"]
    assert names(Selection(whole=("second",)).apply(tied)) == ["mid"]
    with pytest.raises(SelectionError, match="'second' matches none"):
        Selection(exclude=("second",)).apply(tied)


def test_choices_that_leave_nothing_are_refused_with_the_reasons(graph: ChannelGraph):
    with pytest.raises(
        SelectionError, match=r"keeps all 4 axes whole\. What it includes is frozen: head \(reaches.*output\)"
    ):
        Selection(include=("head",)).apply(graph)
    with pytest.raises(
        SelectionError, match=r"got exclude \*, which keeps all 4 axes whole\. Include more or exclude less"
    ):
        Selection(exclude=("*",)).apply(graph)


@pytest.mark.parametrize("name", ["include", "exclude", "whole"])
@pytest.mark.parametrize("patterns", ["layer1", ["layer1"], ("",), (1,), None])
def test_patterns_that_are_no_tuple_of_texts_are_refused(name: str, patterns: object):
    with pytest.raises(SelectionError, match=f"`{name}` must be a tuple of name patterns"):
        Selection(**{name: patterns})


def test_choices_in_words():
    assert str(Selection(include=("a", "b"), whole=("c",))) == "include a b, keep whole c"
    assert str(Selection()) == ""
    assert not Selection()
    assert Selection(exclude=("x",))


def test_means_is_exact_about_case_and_partial_names(graph: ChannelGraph):
    axis = graph.by_name["layer1.conv1"]
    assert matches_axis("layer1.conv1", axis)
    assert matches_axis("layer1", axis)
    assert not matches_axis("layer", axis)
    assert not matches_axis("Layer1", axis)
    assert not matches_axis("layer1.conv2", axis)
