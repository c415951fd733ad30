"""For any selection, what may not be cut is unchanged in the cut model, and the cut is exact."""

import glob

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.cost import Cost, CostModel, count_macs, count_params
from secateur.errors import SelectionError
from secateur.graph import ChannelGraph, Role, Selection, trace
from secateur.prune import cut
from secateur.search import AxisRule, SearchSpace

NETS = sorted(ZOO)


@st.composite
def choices(draw: st.DrawFn, graph: ChannelGraph) -> Selection:
    """Some modules of the graph, or what is around them."""
    names = {site.tensor.rpartition(".")[0] for axis in graph.axes for site in axis.sites} - {""}
    names |= {name.partition(".")[0] for name in names}
    some = st.lists(st.sampled_from(sorted(names) or ["*"]), max_size=2, unique=True).map(tuple)
    return Selection(draw(some), draw(some), draw(some))


def applied(chosen: Selection, graph: ChannelGraph) -> ChannelGraph | str:
    """What is left to cut, or why nothing is."""
    try:
        return chosen.apply(graph)
    except SelectionError as error:
        return str(error)


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=5)
@given(data=st.data())
def test_what_is_chosen_to_stay_is_untouched(name: str, data: st.DataObject):
    animal = ZOO[name]()
    graph = trace(animal.model, animal.example)
    chosen = data.draw(choices(graph))
    left = applied(chosen, graph)
    if isinstance(left, str):
        # Nothing is left to cut, or the layer has no channels of its own: the refusal says which choice it was.
        assert any(pattern in left for pattern in (*chosen.include, *chosen.exclude, *chosen.whole)), left
        return
    assert {axis.name for axis in left.prunable} <= {axis.name for axis in graph.prunable}
    pruned = cut(animal.model, left, Architecture.of({a.name: range((a.size + 1) // 2) for a in left.prunable}))
    assert pruned.verification.max_rel <= pruned.verification.tolerance
    assert CostModel(left).cost(pruned.architecture) == Cost(
        count_macs(pruned.model, animal.example), count_params(pruned.model)
    )
    before, after = animal.model.state_dict(), pruned.model.state_dict()
    cuttable = {(site.tensor, site.dim) for axis in left.prunable for site in axis.sites}
    for tensor in after:
        kept = [dim for dim in range(before[tensor].dim()) if (tensor, dim) not in cuttable]
        # A parameter with two names is known by the first.
        assert tensor not in left.tensors or all(after[tensor].shape[d] == before[tensor].shape[d] for d in kept)
        if any(f"{tensor}.".startswith(f"{layer}.") for layer in chosen.whole):
            assert torch.equal(after[tensor], before[tensor])


@pytest.mark.parametrize("name", NETS)
def test_rules_bound_only_what_they_mean(name: str):
    animal = ZOO[name]()
    graph = trace(animal.model, animal.example)
    for axis in graph.prunable:
        rule = AxisRule(glob.escape(axis.name), min_kept_fraction=1.0)
        free, bound = SearchSpace().levels(graph), SearchSpace(rules=(rule,)).levels(graph)
        for other, one, two in zip(graph.prunable, free, bound, strict=True):
            made_there = any(
                site.role is not Role.INPUT and f"{site.tensor}.".startswith(f"{axis.name}.") for site in other.sites
            )
            if other.name == axis.name:
                assert two.tolist() == [axis.size]
            elif not made_there:
                assert two.tolist() == one.tolist()
