"""The most important tests: for any kept channels, the cut model equals the masked original and has the stated cost."""

import copy

import pytest
import torch
from cuts import EXACT, apart, blind_to_removed, declared_shapes, one_channel, outputs, tensor_shapes, zoo_net
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.cost import Cost, CostModel, count_macs, count_params
from secateur.graph import ChannelGraph, trace
from secateur.prune import apply_architecture, cut, mask_removed

each_net = pytest.mark.parametrize("name", ZOO)


@st.composite
def kept_channels(draw: st.DrawFn, graph: ChannelGraph) -> Architecture:
    """Any non-empty subset of any of the axes; an axis may also be left out, which keeps it whole."""
    subsets = {a.name: st.sets(st.integers(0, a.size - 1), min_size=1) for a in graph.prunable}
    return Architecture.of(draw(st.fixed_dictionaries({}, optional=subsets)))


@each_net
@settings(max_examples=6)
@given(data=st.data())
def test_sliced_equals_masked(name, data):
    model, example, graph = zoo_net(name)
    architecture = data.draw(kept_channels(graph))
    for dtype, tolerance in EXACT.items():
        full, x = copy.deepcopy(model).to(dtype), example.to(dtype)
        sliced = outputs(apply_architecture(full, graph, architecture), x)
        assert sliced[0].dtype is dtype
        assert apart(outputs(mask_removed(full, graph, architecture), x), sliced) <= tolerance
        if not graph.mixings:  # where zeros would take part in a mean, silencing the readers is not enough
            assert apart(outputs(blind_to_removed(full, graph, architecture), x), sliced) <= tolerance


@each_net
@settings(max_examples=3)
@given(data=st.data())
def test_cost_is_that_of_the_cut_model(name, data):
    model, example, graph = zoo_net(name)
    architecture = data.draw(kept_channels(graph))
    # torch.einsum multiplies elementwise, uncounted, where the summed dimension has length one.
    assume(name != "functional" or architecture.widths.get("weight") != 1)
    small = apply_architecture(model, graph, architecture)
    assert CostModel(graph).cost(architecture) == Cost(count_macs(small, example), count_params(small))


@each_net
@settings(max_examples=3)
@given(data=st.data())
def test_every_tensor_has_the_declared_extents(name, data):
    """Shapes of all tensors of the cut model, from the graph's formula alone."""
    model, _, graph = zoo_net(name)
    architecture = data.draw(kept_channels(graph))
    small = apply_architecture(model, graph, architecture)
    assert tensor_shapes(small) == declared_shapes(graph, architecture)


@each_net
def test_keeping_all_is_bit_identical(name):
    model, example, graph = zoo_net(name)
    want = outputs(model, example)
    for architecture in (Architecture(), Architecture.of({a.name: range(a.size) for a in graph.prunable})):
        small = apply_architecture(model, graph, architecture)
        assert all(torch.equal(a, b) for a, b in zip(want, outputs(small, example), strict=True))
        state, same = small.state_dict(), model.state_dict()
        assert all(torch.equal(same[key], tensor) for key, tensor in state.items())
        assert len(state) == len(same)


@each_net
def test_every_axis_can_be_cut_to_one_channel(name):
    model, example, graph = zoo_net(name)
    assert all(axis.size >= 2 for axis in graph.prunable)
    for channel in (0, 1, -1):
        architecture = one_channel(graph, channel)
        made = cut(model, graph, architecture)
        assert made.architecture == architecture
        assert made.verification.frozen == ()
        assert apart(outputs(mask_removed(model, graph, architecture), example), outputs(made.model, example)) <= 1e-5


@each_net
@settings(max_examples=2)
@given(data=st.data())
def test_cutting_twice_equals_cutting_once(name, data):
    """A cut model is a model: trace it again, cut it again."""
    model, example, graph = zoo_net(name)
    first = data.draw(kept_channels(graph))
    middle = apply_architecture(model, graph, first)
    again = trace(middle, example)
    narrow = apply_architecture(middle, again, one_channel(again))
    masked = mask_removed(middle, again, one_channel(again))
    assert apart(outputs(masked, example), outputs(narrow, example)) <= EXACT[torch.float32]
    traced, computed = CostModel(again).original, CostModel(graph).cost(first)
    assert traced.params == computed.params
    # A sum over a single channel is a plain product, which is no multiply-accumulate: torch.einsum then skips the sum.
    assert traced.macs <= computed.macs if 1 in first.widths.values() else traced.macs == computed.macs


@each_net
def test_slicing_leaves_the_original_alone_and_shares_nothing_with_it(name):
    model, _, graph = zoo_net(name)
    before = {key: (tensor.data_ptr(), tensor._version) for key, tensor in model.state_dict(keep_vars=True).items()}
    small = apply_architecture(model, graph, one_channel(graph))
    after = {key: (tensor.data_ptr(), tensor._version) for key, tensor in model.state_dict(keep_vars=True).items()}
    assert before == after
    mine = {t.data_ptr() for t in small.state_dict().values() if t.numel()}
    assert not mine & {pointer for pointer, _ in before.values()}


@each_net
def test_shared_parameters_stay_shared(name):
    model, _, graph = zoo_net(name)
    small = apply_architecture(model, graph, one_channel(graph))
    assert [key for key, _ in small.named_parameters()] == [key for key, _ in model.named_parameters()]
