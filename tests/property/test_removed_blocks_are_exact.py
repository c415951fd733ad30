"""For any kept channels and any removed blocks, the cut model equals the masked original."""

import copy

import pytest
import torch
from cuts import EXACT, apart, declared_shapes, outputs, tensor_shapes, zoo_net
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.architecture import Architecture
from secateur.cost import Cost, CostModel, count_macs, count_params
from secateur.graph import ChannelGraph, trace
from secateur.prune import apply_architecture, cut, mask_removed

WITH_BLOCKS = (
    "residual", "preact_residual", "option_a_residual", "inverted_residual_se", "layer_scale", "nested", "branching",
    "attention", "grouped_query_attention",
)  # fmt: skip
each_net = pytest.mark.parametrize("name", WITH_BLOCKS)


@st.composite
def architectures(draw: st.DrawFn, graph: ChannelGraph) -> Architecture:
    """Any multiples of the divisors of any axes, and any of the blocks."""

    def channels(size: int, divisor: int) -> st.SearchStrategy[list[int]]:
        counts = st.integers(1, size // divisor).map(lambda n: n * divisor)
        return counts.flatmap(lambda n: st.permutations(range(size)).map(lambda order: order[:n]))

    kept = {axis.name: channels(axis.size, axis.divisor) for axis in graph.prunable}
    blocks = st.sets(st.sampled_from([block.name for block in graph.removable]))
    return Architecture.of(draw(st.fixed_dictionaries({}, optional=kept)), draw(blocks))


@each_net
@settings(max_examples=8)
@given(data=st.data())
def test_sliced_equals_masked(name, data):
    model, example, graph = zoo_net(name)
    architecture = data.draw(architectures(graph))
    for dtype, tolerance in EXACT.items():
        full, x = copy.deepcopy(model).to(dtype), example.to(dtype)
        small = outputs(apply_architecture(full, graph, architecture), x)
        assert apart(outputs(mask_removed(full, graph, architecture), x), small) <= tolerance


@each_net
@settings(max_examples=4)
@given(data=st.data())
def test_blocks_alone_are_removed_to_the_last_bit(name, data):
    """No sum changes its terms, so nothing is rounded differently."""
    model, example, graph = zoo_net(name)
    removed = data.draw(st.sets(st.sampled_from([block.name for block in graph.removable])))
    only = Architecture.of({}, removed)
    small = apply_architecture(model, graph, only)
    want = outputs(mask_removed(model, graph, only), example)
    assert all(torch.equal(a, b) for a, b in zip(want, outputs(small, example), strict=True))
    assert not removed or apart(outputs(model, example), want) > 1e-3


@each_net
@settings(max_examples=4)
@given(data=st.data())
def test_costs_and_tensors_are_those_of_the_cut_model(name, data):
    model, example, graph = zoo_net(name)
    architecture = data.draw(architectures(graph))
    small = apply_architecture(model, graph, architecture)
    assert CostModel(graph).cost(architecture) == Cost(count_macs(small, example), count_params(small))
    assert tensor_shapes(small) == declared_shapes(graph, architecture)


@each_net
def test_every_block_can_be_removed_with_half_of_every_width(name):
    model, example, graph = zoo_net(name)
    kept = {axis.name: range(max(1, axis.size // 2 // axis.divisor) * axis.divisor) for axis in graph.prunable}
    architecture = Architecture.of(kept, [block.name for block in graph.removable])
    made = cut(model, graph, architecture)
    assert made.architecture == architecture
    assert made.verification.frozen == ()
    assert apart(outputs(mask_removed(model, graph, architecture), example), outputs(made.model, example)) <= 1e-5


@each_net
@settings(max_examples=2)
@given(data=st.data())
def test_a_model_without_blocks_can_be_traced_and_cut_again(name, data):
    model, example, graph = zoo_net(name)
    first = data.draw(architectures(graph))
    middle = apply_architecture(model, graph, first)
    again = trace(middle, example)
    rest = Architecture.of(
        {axis.name: range(axis.divisor) for axis in again.prunable}, [block.name for block in again.removable]
    )
    assert CostModel(again).original == CostModel(graph).cost(first)
    assert not {block.name for block in again.blocks} & set(first.removed_blocks)
    small = apply_architecture(middle, again, rest)
    masked = mask_removed(middle, again, rest)
    assert apart(outputs(masked, example), outputs(small, example)) <= EXACT[torch.float32]
