"""For any channels that branches keep, the cut model equals the original in which the others are zero."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from cuts import EXACT, apart, declared_shapes, outputs, tensor_shapes, zoo_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.cost import Cost, CostModel, count_macs, count_params
from secateur.graph import ChannelAxis, ChannelGraph, trace, untie
from secateur.prune import ExpandChannels, apply_architecture, cut, mask_removed, original_names

UNTIED = (
    "residual", "preact_residual", "option_a_residual", "inverted_residual_se", "gated_chunk", "layer_scale",
    "multi_branch_add", "nested", "branching", "attention", "grouped_query_attention",
)  # fmt: skip
each_net = pytest.mark.parametrize("name", UNTIED)


@cache
def untied(name: str) -> tuple[nn.Module, Tensor, ChannelGraph]:
    """A net of the zoo, its example and its untied graph."""
    model, example, graph = zoo_net(name)
    return model, example, untie(model, graph)


@st.composite
def architectures(draw: st.DrawFn, graph: ChannelGraph) -> Architecture:
    """Some channels of every axis; of every branch, some of those of its stream; and any of the blocks."""
    kept: dict[str, set[int]] = {}
    for axis in sorted(graph.prunable, key=lambda axis: axis.residual_axis is not None):
        stream = sorted(kept[axis.residual_axis]) if axis.residual_axis else range(axis.size)
        kept[axis.name] = draw(st.sets(st.sampled_from(stream), min_size=1) | st.just(set(stream)))
    blocks = [block.name for block in graph.removable]
    return Architecture.of(kept, draw(st.sets(st.sampled_from(blocks))) if blocks else ())


@each_net
@settings(max_examples=8)
@given(data=st.data())
def test_sliced_equals_masked(name, data):
    model, example, graph = untied(name)
    architecture = data.draw(architectures(graph))
    for dtype, tolerance in EXACT.items():
        full, x = copy.deepcopy(model).to(dtype), example.to(dtype)
        small = outputs(apply_architecture(full, graph, architecture), x)
        assert apart(outputs(mask_removed(full, graph, architecture), x), small) <= tolerance


@each_net
@settings(max_examples=5)
@given(data=st.data())
def test_a_branch_without_some_channels_adds_zeros_there(name, data):
    """The reference knows nothing of parameters: it zeroes what the modules give that are added to the stream."""
    model, example, graph = untied(name)
    whole = {axis.name: range(axis.size) for axis in graph.prunable}
    kept = {n: c for n, c in data.draw(architectures(graph)).kept if graph.by_name[n].residual_axis}
    architecture = Architecture.of({**whole, **kept})
    reference = copy.deepcopy(model)
    for axis in graph.axes:
        if axis.residual_axis is not None:
            reference.get_submodule(axis.residual_output).register_forward_hook(silencing(graph, axis, architecture))
    small = apply_architecture(model, graph, architecture)
    assert apart(outputs(reference, example), outputs(small, example)) <= EXACT[torch.float32]


def silencing(graph: ChannelGraph, axis: ChannelAxis, architecture: Architecture) -> Callable[..., Tensor]:
    """A hook that zeroes the channels of a branch which are not kept."""
    activation = graph.activations[axis.residual_output]
    stream = [found.name for found in graph.axes].index(axis.residual_axis)
    gone = set(range(axis.size)) - set(architecture.by_name[axis.name])
    silent = [p for p in range(len(activation.axis)) if activation.axis[p] == stream and activation.channel[p] in gone]
    return lambda _module, _args, out: out.index_fill(activation.dim, torch.tensor(silent, dtype=torch.int64), 0.0)


@each_net
@settings(max_examples=4)
@given(data=st.data())
def test_costs_and_tensors_are_those_of_the_cut_model(name, data):
    model, example, graph = untied(name)
    architecture = data.draw(architectures(graph))
    small = apply_architecture(model, graph, architecture)
    assert CostModel(graph).cost(architecture) == Cost(count_macs(small, example), count_params(small))
    names = original_names(small)
    shapes = {named(tensor, names): shape for tensor, shape in tensor_shapes(small).items()}
    assert {tensor: shape for tensor, shape in shapes.items() if tensor} == declared_shapes(graph, architecture)


def named(tensor: str, names: dict[str, str]) -> str:
    """The name of a tensor in the original; empty for those that the original has not."""
    module, _, leaf = tensor.rpartition(".")
    return f"{names[module]}.{leaf}".removeprefix(".") if module in names else ""


@pytest.mark.parametrize("name", ZOO)
def test_keeping_all_is_bit_identical(name):
    model, example, graph = untied(name)
    for architecture in (Architecture(), Architecture.of({a.name: range(a.size) for a in graph.prunable})):
        small = apply_architecture(model, graph, architecture)
        assert not any(isinstance(module, ExpandChannels) for module in small.modules())
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, example), outputs(small, example), strict=True))
    assert CostModel(graph).original == CostModel(zoo_net(name)[2]).original


@pytest.mark.parametrize("name", ZOO)
def test_branches_as_wide_as_their_streams_are_the_tied_cut(name):
    model, example, graph = untied(name)
    tied = zoo_net(name)[2]
    kept = {axis.name: range(0, axis.size, 2) for axis in graph.prunable}
    small = apply_architecture(model, graph, Architecture.of(kept))
    same = apply_architecture(model, tied, Architecture.of({axis.name: kept[axis.name] for axis in tied.prunable}))
    assert tensor_shapes(small) == tensor_shapes(same)
    assert all(torch.equal(a, b) for a, b in zip(outputs(same, example), outputs(small, example), strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_every_branch_can_be_cut_to_one_channel(name):
    """The first, so that a pad is enough, and one from the middle."""
    model, example, graph = untied(name)
    for first in (0, 1):
        kept = {axis.name: [first] if axis.residual_axis else range(axis.size // 2 + 1) for axis in graph.prunable}
        made = cut(model, graph, Architecture.of(kept))
        assert made.architecture == Architecture.of(kept)
        assert made.verification.frozen == ()
        narrow = {axis.residual_output for axis in graph.prunable if axis.residual_axis}
        assert {n for n, m in made.model.named_modules() if isinstance(m, ExpandChannels)} == narrow
        masked = mask_removed(model, graph, made.architecture)
        assert apart(outputs(masked, example), outputs(made.model, example)) <= EXACT[torch.float32]


@each_net
@settings(max_examples=3)
@given(data=st.data())
def test_a_model_with_narrow_branches_can_be_traced_and_cut_again(name, data):
    model, example, graph = untied(name)
    first = data.draw(architectures(graph))
    middle = apply_architecture(model, graph, first)
    again = trace(middle, example)
    again = untie(middle, again)
    assert CostModel(again).original == CostModel(graph).cost(first)
    made = cut(middle, again, Architecture.of({axis.name: range(axis.divisor) for axis in again.prunable}))
    assert made.verification.max_rel <= made.verification.tolerance
