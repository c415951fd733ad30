"""The channel graph against structures written down by hand, not computed."""

import numpy as np
import pytest
import torch
from cuts import random_architecture
from torch import nn
from zoo import ZOO

from secateur.cost import CostModel
from secateur.graph import ChannelGraph, Extent, HeadUnit, trace
from secateur.surgery import cut

pytestmark = pytest.mark.window

Places = dict[tuple[str, int], list[list[int]]]


def traced(name: str) -> ChannelGraph:
    return trace(*ZOO[name]())


def places(graph: ChannelGraph, axis: str) -> Places:
    """(tensor, dim) to the positions of every channel."""
    return {(site.tensor, site.dim): site.index.tolist() for site in graph.by_name[axis].sites}


def norm(module: str) -> list[tuple[str, int]]:
    return [(f"{module}.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")]


def own(size: int, start: int = 0, times: int = 1) -> list[list[int]]:
    """Each channel has ``times`` consecutive positions."""
    return [[start + channel * times + t for t in range(times)] for channel in range(size)]


def term(name: str, times: int = 1, base: int = 0) -> Extent:
    return Extent(base, ((name, times),))


def roles(graph: ChannelGraph, axis: str) -> dict[tuple[str, int], str]:
    return {(site.tensor, site.dim): site.role.value for site in graph.by_name[axis].sites}


def test_residual_blocks_share_the_stream_and_own_their_inside():
    graph = traced("residual")
    stem = [("0.0.weight", 0), *norm("0.1"), ("1.conv1.weight", 1), ("1.conv2.weight", 0), *norm("1.bn2")]
    stem += [("2.conv1.weight", 1), ("2.shortcut.0.weight", 1)]
    assert places(graph, "0.0") == dict.fromkeys(stem, own(8))
    inside = [("1.conv1.weight", 0), *norm("1.bn1"), ("1.conv2.weight", 1)]
    assert places(graph, "1.conv1") == dict.fromkeys(inside, own(12))
    stream = [("2.conv2.weight", 0), *norm("2.bn2"), ("2.shortcut.0.weight", 0), *norm("2.shortcut.1")]
    stream += [("3.conv1.weight", 1), ("3.conv2.weight", 0), *norm("3.bn2"), ("4.fc.weight", 1)]
    assert places(graph, "2.conv2") == dict.fromkeys(stream, own(14))
    assert [axis.name for axis in graph.prunable] == ["0.0", "1.conv1", "2.conv1", "2.conv2", "3.conv1"]
    assert roles(graph, "0.0")["0.0.weight", 0] == "output"
    assert roles(graph, "0.0")["1.conv1.weight", 1] == "input"
    assert roles(graph, "0.0")["0.1.running_var", 0] == "vector"
    assert roles(graph, "2.conv2")["4.fc.weight", 1] == "input"


def test_what_stays_has_its_reason():
    graph = traced("residual")
    reasons = {axis.name: (axis.size, axis.frozen_because) for axis in graph.axes if axis.frozen_because}
    assert reasons == {
        "0.0/input": (3, "`convolution` in 0.0 reads the model's input or another tensor that carries no channels"),
        "4.fc": (5, "reaches the model's output"),
    }


def test_option_a_padding_splits_the_stream_by_where_channels_come_from():
    """6 channels, padded by 3 below and 3 above to 12, then by 4 and 4 to 20."""
    graph = traced("option_a_residual")
    first = places(graph, "0.0")
    assert first["0.0.weight", 0] == own(6)
    assert first["2.conv2.weight", 0] == own(6, start=3)
    assert first["3.conv1.weight", 1] == own(6, start=3)
    assert first["4.conv2.weight", 0] == own(6, start=7)
    assert first["5.fc.weight", 1] == own(6, start=7)
    low, high = places(graph, "2.conv2"), places(graph, "2.conv2#2")
    assert ("0.0.weight", 0) not in low
    assert (low["2.conv2.weight", 0], high["2.conv2.weight", 0]) == (own(3), own(3, start=9))
    assert (low["4.conv2.weight", 0], high["5.fc.weight", 1]) == (own(3, start=4), own(3, start=13))
    assert places(graph, "4.conv2")["5.fc.weight", 1] == own(4)
    assert places(graph, "4.conv2#2")["5.fc.weight", 1] == own(4, start=16)
    assert graph.tensors["5.fc.weight"][1] == Extent(
        0, (("0.0", 1), ("2.conv2", 1), ("2.conv2#2", 1), ("4.conv2", 1), ("4.conv2#2", 1))
    )


def test_dense_concatenation_adds_extents_up():
    graph = traced("dense")
    widths = [term("0"), Extent(0, (("0", 1), ("1.conv", 1))), Extent(0, (("0", 1), ("1.conv", 1), ("2.conv", 1)))]
    for layer, extent in zip((1, 2, 3), widths, strict=True):
        assert graph.tensors[f"{layer}.conv.weight"][1] == extent
        assert graph.tensors[f"{layer}.norm.running_mean"] == (extent,)
    assert graph.tensors["4.weight"] == (Extent(0, (("0", 1), ("1.conv", 1), ("2.conv", 1), ("3.conv", 1))),)
    assert places(graph, "2.conv")["3.conv.weight", 1] == own(5, start=13)
    assert places(graph, "2.conv")["6.weight", 1] == own(5, start=13)


def test_flatten_gives_every_channel_its_positions():
    graph = traced("flatten_linear")
    assert places(graph, "2.0")["5.weight", 1] == own(12, times=4)
    assert graph.tensors["5.weight"] == (term("5"), term("2.0", 4))
    operation = next(o for o in graph.operations if o.module == "5")
    assert operation.extents[1:] == (term("2.0", 4), term("5"))


def test_few_groups_lose_the_same_positions_of_every_group():
    """3 groups of 4: channel i stands for i, i + 4 and i + 8."""
    graph = traced("few_groups")
    strided = [[i, i + 4, i + 8] for i in range(4)]
    entering, leaving = places(graph, "1.0"), places(graph, "2.0")
    assert entering["1.0.weight", 0] == strided
    assert entering["2.0.weight", 1] == own(4)
    assert leaving["2.0.weight", 0] == strided
    assert leaving["3.0.weight", 1] == strided
    assert graph.edits == ()
    assert graph.tensors["2.0.weight"][:2] == (term("2.0", 3), term("1.0"))


def test_many_groups_lose_whole_groups():
    """8 groups of 2 in and 3 out: channel i is group i."""
    graph = traced("many_groups")
    group = places(graph, "0.0")
    assert group["0.0.weight", 0] == own(8, times=2)
    assert group["1.0.weight", 0] == own(8, times=3)
    assert group["2.0.weight", 1] == own(8, times=3)
    assert ("1.0.weight", 1) not in group
    assert graph.tensors["1.0.weight"][:2] == (term("0.0", 3), Extent(2))
    assert [(e.module, e.attribute, e.extent) for e in graph.edits] == [("1.0", "groups", term("0.0"))]


def test_depthwise_convolutions_pass_channels_through():
    graph = traced("depthwise_separable")
    chain = [("0.0.weight", 0), *norm("0.1"), ("1.0.weight", 0), *norm("1.1"), ("2.0.weight", 1)]
    assert places(graph, "0.0") == dict.fromkeys(chain, own(10))
    assert roles(graph, "0.0")["1.0.weight", 0] == "vector"


def test_shuffles_follow_the_permutation():
    """Half of 12 channels stay, half go through the branch; interleaved; then again."""
    graph = traced("shuffle_v2")
    assert graph.sizes["0.0"] == 3
    ids = np.arange(6)
    group = np.arange(12)
    pairs = {frozenset(channel) for channel in places(graph, "0.0")["0.0.weight", 0]}
    # Tie by hand: i ~ i + 6 by the equal halves; the branch's output ties nothing by itself.
    parent = {i: i % 6 for i in group}
    # After cat(left, branch) and the shuffle, position 2 i holds left i and 2 i + 1 holds branch i; halves again equal:
    # position p ~ p + 6, so left i (p = 2 i) ~ left i + 3.
    merged = {i: parent[i] % 3 for i in group}
    by_hand = {frozenset(int(i) for i in group if merged[i] == key) for key in set(merged.values())}
    assert pairs == by_hand
    assert len(ids) == 6


def test_a_gate_ties_the_halves_of_what_makes_it():
    graph = traced("gated_chunk")
    assert places(graph, "expand")["expand.weight", 0] == [[i, i + 12] for i in range(12)]
    assert places(graph, "expand")["project.weight", 1] == own(12)


def test_a_tied_parameter_is_cut_in_all_its_roles():
    graph = traced("tied_parameter")
    found = places(graph, "stem.0")
    assert found["first.weight", 0] == found["first.weight", 1] == found["second.bias", 0] == own(8)
    assert not any(tensor == "second.weight" for tensor, _ in found)
    assert graph.parameters.count("first.weight") == 1


def test_squeeze_excite_is_tied_to_what_it_scales():
    graph = traced("inverted_residual_se")
    found = places(graph, "1.expand.0")
    assert {("1.excite.reduce.weight", 1), ("1.excite.expand.weight", 0), ("1.excite.expand.bias", 0)} <= set(found)
    assert {("1.depthwise.0.weight", 0), ("1.project.0.weight", 1)} <= set(found)


def test_names_are_unique_and_sites_point_at_real_positions():
    for name in ZOO:
        model, example = ZOO[name]()
        graph = trace(model, example)
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert len({axis.name for axis in graph.axes}) == len(graph.axes)
        taken: dict[tuple[str, int], list[int]] = {}
        for axis in graph.axes:
            for site in axis.sites:
                assert site.index.shape[0] == axis.size
                assert site.index.max() < tensors[site.tensor].shape[site.dim]
                taken.setdefault((site.tensor, site.dim), []).extend(site.index.reshape(-1).tolist())
        assert all(len(positions) == len(set(positions)) for positions in taken.values())


def test_operations_count_the_original():
    """Plain: 3x3 convolutions at 8x8, 4x4 and 4x4, then a linear layer; by hand."""
    graph = traced("plain")
    macs = 9 * 64 * 3 * 12 + 9 * 16 * 12 * 16 + 9 * 16 * 16 * 10 + 10 * 5
    assert CostModel(graph).original.macs == macs
    assert [o.module for o in graph.operations] == ["0.0", "1.0", "2.0", "3.fc"]
    assert graph.stages == ("0", "2")
    assert graph.touching["1.0"] == ("1.0",)


def test_activations_tell_which_channels_a_module_gives():
    graph = traced("dense")
    activation = graph.activations["1"]
    assert (activation.shape, activation.dim) == ((1, 13, 8, 8), 1)
    names = [graph.axes[number].name for number in activation.axis]
    assert names == ["0"] * 8 + ["1.conv"] * 5
    assert activation.channel.tolist() == [*range(8), *range(5)]
    kept = graph.kept_positions("1", {"0": (1, 7), "1.conv": (0, 4)})
    assert kept.tolist() == [1, 7, 8, 12]
    assert graph.kept_positions("1", {}).tolist() == list(range(13))


def test_freezing_an_axis_removes_it_from_every_formula():
    graph = traced("dense")
    frozen = graph.with_frozen({"1.conv": "because"})
    assert frozen.by_name["1.conv"].frozen_because == "because"
    assert frozen.tensors["2.conv.weight"][1] == Extent(5, (("0", 1),))
    assert CostModel(frozen).original == CostModel(graph).original
    assert "1.conv" not in frozen.sizes
    assert graph.by_name["1.conv"].frozen_because is None
    assert frozen.with_frozen({"1.conv": "other"}).by_name["1.conv"].frozen_because == "because"


def test_a_buffer_that_holds_no_channels_is_left_alone():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(1, 3, 1, 1))
            self.body, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x - self.mean))

    graph = trace(Scaled(), torch.zeros(1, 3, 4, 4))
    assert graph.tensors["mean"] == (Extent(1), Extent(3), Extent(1), Extent(1))
    assert {a.name: a.size for a in graph.prunable} == {"body": 6}


def test_attention_that_takes_the_width_of_its_output_from_its_input_ties_the_two():
    graph = traced("attention")
    # Twelve channels of the stream, three heads of four dimensions: one of the latter goes with three of the former.
    assert {a.name: a.size for a in graph.prunable} == {"patch": 4, "block.mlp.0": 20}
    shared = places(graph, "patch")
    assert shared["patch.weight", 0] == [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
    assert shared["block.attention.proj.weight", 1] == shared["patch.weight", 0]
    assert shared["block.attention.qkv.weight", 0][0] == list(range(0, 36, 4))


def test_heads_can_be_asked_for():
    graph = trace(*ZOO["attention"](), heads=HeadUnit.HEAD)
    assert {a.name: a.size for a in graph.prunable} == {"patch": 3, "block.mlp.0": 20}
    assert places(graph, "patch")["patch.weight", 0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_attention_of_default_scale_goes_by_groups_of_whole_heads():
    graph = traced("grouped_query_attention")
    assert {a.name: a.size for a in graph.prunable} == {"patch": 12, "block.attention.q": 2, "block.mlp.0": 20}


def test_the_attention_of_torch_is_left_whole_at_once():
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True).eval()
    example = torch.randn(2, 5, 12)
    graph = trace(layer, example)
    assert {a.name: a.size for a in graph.prunable} == {"linear1": 20}
    reasons = {a.name: str(a.frozen_because) for a in graph.axes}
    assert "has one width for its input and for all its heads" in reasons["self_attn"]
    made = cut(layer, graph, random_architecture(graph, 0))
    assert made.verification.frozen == ()
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_channels_of_an_output_are_those_of_an_axis_not_the_tokens():
    graph = traced("grouped_query_attention")
    assert graph.activations["block.mlp.0"].dim == 2
    assert graph.activations["block"].dim == 2
    assert graph.kept_positions("block", {"patch": (0, 3)}).tolist() == [0, 3]
