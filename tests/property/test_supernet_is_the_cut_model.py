"""For any widths and blocks, a subnet computes and learns what the corresponding cut model computes and learns."""

import copy
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from cuts import apart, outputs, zoo_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.graph import ChannelGraph, untie
from secateur.nas import Subnet, Supernet, invert_order, reorder_channels
from secateur.prune import apply_architecture, cut, original_names

TOLERANCE = 1e-12
"""Relative, float64: the same terms are summed in another order."""
WITH_BRANCHES = (
    "residual", "preact_residual", "option_a_residual", "inverted_residual_se", "gated_chunk", "layer_scale",
    "multi_branch_add", "nested", "branching", "attention", "grouped_query_attention",
)  # fmt: skip
each_net = pytest.mark.parametrize("name", ZOO)
each_graph = pytest.mark.parametrize(
    ("name", "untied"),
    [pytest.param(name, False, id=name) for name in ZOO]
    + [pytest.param(name, True, id=f"{name}-untied") for name in WITH_BRANCHES],
)


@dataclass(frozen=True, eq=False)
class Case:
    """A net in float64, whose channels stand in a random order."""

    model: nn.Module
    example: Tensor
    graph: ChannelGraph
    supernet: Supernet


@cache
def case(name: str, untied: bool) -> Case:
    model, example, graph = zoo_net(name)
    model, example = copy.deepcopy(model).double(), example.double()
    graph = replace(graph, example=tuple(tensor.double() for tensor in graph.example))
    if untied:
        graph = untie(model, graph)
    draw = np.random.default_rng(7)
    order = {axis.name: draw.permutation(axis.size) for axis in graph.prunable}
    return Case(model, example, graph, Supernet(model, graph, order))


@st.composite
def subnets(draw: st.DrawFn, graph: ChannelGraph) -> Subnet:
    """Any multiple of the divisor of every axis, branches no wider than their streams, and any blocks."""
    widths: dict[str, int] = {}
    for axis in sorted(graph.prunable, key=lambda axis: axis.residual_axis is not None):
        most = widths.get(str(axis.residual_axis), axis.size)
        widths[axis.name] = draw(st.integers(1, most // axis.divisor)) * axis.divisor
    blocks = [block.name for block in graph.removable]
    removed = draw(st.sets(st.sampled_from(blocks))) if blocks else ()
    return Subnet(tuple(widths[name] for name in graph.sizes), tuple(sorted(removed)))


@each_graph
@settings(max_examples=2)
@given(data=st.data())
def test_a_subnet_is_the_cut_model(name, untied, data):
    """Channels in the order of the supernet, and really cut from the original by the same architecture."""
    net = case(name, untied)
    subnet = data.draw(subnets(net.graph))
    with torch.no_grad():
        got = tree_leaves(net.supernet(subnet, net.example))
    assert apart(outputs(net.supernet.extract(subnet), net.example), got) <= TOLERANCE
    small = apply_architecture(net.model, net.graph, net.supernet.architecture(subnet))
    assert apart(outputs(small, net.example), got) <= TOLERANCE


@each_graph
def test_half_of_everything_is_the_verified_cut(name, untied):
    """`cut` proves that the model without the rest is the original with the rest zeroed; the subnet is that model."""
    net = case(name, untied)
    halves = tuple(max(1, axis.size // 2 // axis.divisor) * axis.divisor for axis in net.graph.prunable)
    subnet = Subnet(halves, tuple(sorted(block.name for block in net.graph.removable)[::2]))
    made = cut(net.model, net.graph, net.supernet.architecture(subnet))
    assert made.architecture == net.supernet.architecture(subnet)
    with torch.no_grad():
        got = tree_leaves(net.supernet(subnet, net.example))
    assert apart(outputs(made.model, net.example), got) <= TOLERANCE


@each_graph
@settings(max_examples=1)
@given(data=st.data())
def test_gradients_land_where_the_cut_model_has_them(name, untied, data):
    """The gradients of the really cut model at the kept positions of the whole tensors, and zeros elsewhere."""
    net = case(name, untied)
    subnet = data.draw(subnets(net.graph))
    small = net.supernet.extract(subnet)
    loss_of(small(net.example)).backward()
    net.supernet.zero_grad()
    loss_of(net.supernet(subnet, net.example)).backward()
    wanted = scattered(net.supernet, subnet, small)
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for tensor, parameter in net.supernet.model.named_parameters():
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        want = wanted.get(tensor, torch.zeros_like(parameter))
        assert float((got - want).abs().max()) <= 1e-11 * scale, tensor
    net.supernet.zero_grad()


def loss_of(output: object) -> Tensor:
    """A number that every output matters to, each in another way."""
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    return sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).sum() for t in tensors)


def scattered(supernet: Supernet, subnet: Subnet, small: nn.Module) -> dict[str, Tensor]:
    """Gradients of the cut model, put back to the positions that its tensors have been taken from.

    Where they come from is found without the graph: a cut of the model whose every number is its own position tells.
    """
    numbered = copy.deepcopy(supernet)
    with torch.no_grad():
        for parameter in numbered.model.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=parameter.dtype).view(parameter.shape))
    positions = dict(numbered.extract(subnet).named_parameters())
    names = original_names(small)
    whole = dict(supernet.model.named_parameters())
    aliases = {
        name: next(first for first, other in whole.items() if other is parameter)
        for name, parameter in supernet.model.named_parameters(remove_duplicate=False)
    }
    found: dict[str, Tensor] = {}
    for name, parameter in small.named_parameters():
        if parameter.grad is None:
            continue
        module, _, leaf = name.rpartition(".")
        original = aliases[f"{names[module]}.{leaf}".removeprefix(".")]
        full = torch.zeros_like(whole[original]).flatten()
        full[positions[name].detach().long().flatten()] = parameter.grad.flatten()
        found[original] = full.view(whole[original].shape)
    return found


@each_graph
@settings(max_examples=1)
@given(seed=st.integers(0, 10**6), some=st.booleans())
def test_another_order_of_channels_computes_the_same(name, untied, seed, some):
    """For permutations of all axes or of some of them; the inverse order gives the very same tensors back."""
    net = case(name, untied)
    draw = np.random.default_rng(seed)
    axes = [axis for axis in net.graph.prunable if not some or draw.random() < 0.5]
    order = {axis.name: draw.permutation(axis.size) for axis in axes}
    supernet = Supernet(net.model, net.graph, order)
    assert apart(outputs(net.model, net.example), outputs(supernet.model, net.example)) <= TOLERANCE
    back = supernet.in_original_order()
    assert_equal_tensors(back, net.model)
    again = reorder_channels(
        reorder_channels(net.model, net.graph, supernet.order), net.graph, invert_order(supernet.order)
    )
    assert_equal_tensors(again, net.model)
    assert (
        apart(outputs(reorder_channels(net.model, net.graph, order), net.example), outputs(net.model, net.example))
        <= 1e-12
    )


def assert_equal_tensors(one: nn.Module, other: nn.Module) -> None:
    """Every parameter and buffer bit by bit."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@each_net
def test_the_architecture_names_channels_of_the_original(name):
    """The first channels here are those that the order puts first."""
    net = case(name, False)
    widths = tuple(max(1, axis.size // 2 // axis.divisor) * axis.divisor for axis in net.graph.prunable)
    architecture = net.supernet.architecture(Subnet(widths))
    want = {
        axis.name: sorted(net.supernet.order[axis.name][:width].tolist())
        for axis, width in zip(net.graph.prunable, widths, strict=True)
    }
    assert architecture == Architecture.of(want)
