"""Removed blocks: their stand-ins, which removals are refused, and which blocks are kept because of an inexact cut."""

import copy
from dataclasses import replace

import pytest
import torch
import torchvision
from cuts import apart, outputs
from torch import nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph import ChannelGraph, Replacement, StandIn, trace
from secateur.prune import (
    PassThrough,
    RecalibrateBatchNorm,
    Refit,
    ZeroOutput,
    apply_architecture,
    cut,
    find_replacements,
    mask_removed,
    output_distance,
    replace_modules_,
    split_calibration,
)


def zoo(name: str) -> tuple[nn.Module, torch.Tensor, ChannelGraph]:
    model, example = ZOO[name]()
    return model, example, trace(model, example)


def test_stand_ins_hand_on_or_silence_the_first_tensor():
    x = torch.randn(2, 3)
    assert PassThrough()(None, x, torch.zeros(1)) is x
    assert torch.equal(ZeroOutput()(x, 1), torch.zeros(2, 3))
    assert PassThrough()(hidden=x) is x
    first, second, third = ZeroOutput(items=3)(x)
    assert torch.equal(first, torch.zeros(2, 3))
    assert second is third is None
    assert repr(PassThrough(2)) == "PassThrough(items=2)"


def test_modules_are_replaced_and_nothing_is_left_of_them():
    model, _, graph = zoo("attention")
    small = apply_architecture(model, graph, Architecture.of({}, ["block.attention"]))
    assert type(small.get_submodule("block.norm1")) is PassThrough
    assert type(small.get_submodule("block.attention")) is ZeroOutput
    gone = set(model.state_dict()) - set(small.state_dict())
    assert gone == {name for name in model.state_dict() if name.startswith(("block.attention.", "block.norm1."))}
    assert find_replacements(small) == graph.blocks_by_name["block.attention"].replacements
    assert find_replacements(model) == ()


def test_removing_equals_zeroing_the_last_layer_of_the_branch():
    """A reference that needs no hooks: a last layer of zeros gives zeros."""
    model, example, graph = zoo("preact_residual")
    silent = copy.deepcopy(model)
    for parameter in silent[1].conv2.parameters():
        nn.init.zeros_(parameter)
    small = apply_architecture(model, graph, Architecture.of({}, ["1"]))
    assert all(torch.equal(a, b) for a, b in zip(outputs(silent, example), outputs(small, example), strict=True))


def test_a_replaced_module_within_a_replaced_module_is_gone_with_it():
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2))
    replace_modules_(model, [Replacement("0.0", StandIn.SILENCE), Replacement("0", StandIn.PASS_THROUGH)])
    assert find_replacements(model) == (Replacement("0", StandIn.PASS_THROUGH),)
    assert [name for name, _ in model.named_children()] == ["0", "1"]


@pytest.mark.parametrize("name", ["", "9.conv"])
def test_replacements_must_name_modules(name):
    with pytest.raises(SurgeryError, match="`replacements` must name modules"):
        replace_modules_(nn.Sequential(nn.Linear(3, 3)), [Replacement(name, StandIn.SILENCE)])


def test_the_branch_of_torchs_own_attention_is_removed_exactly():
    """Its forward returns a tuple, and its fast path would hide the sum that the reference looks for."""
    layer = torchvision.models.vision_transformer.EncoderBlock(2, 8, 16, 0.0, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.5)
    model, example = nn.Sequential(nn.Linear(3, 8), layer, nn.Linear(8, 4)).eval(), torch.randn(2, 5, 3)
    graph = trace(model, example)
    assert len(graph.removable) == 2
    for block in graph.removable:
        only = Architecture.of({}, [block.name])
        assert cut(model, graph, only).architecture == only
        small = apply_architecture(model, graph, only)
        # The one runs without the fast path, the other with it.
        assert apart(outputs(mask_removed(model, graph, only), example), outputs(small, example)) <= 1e-6
    assert torch.backends.mha.get_fastpath_enabled()


def test_the_reference_runs_as_often_as_it_is_called_and_leaves_the_model_alone():
    model, example, graph = zoo("residual")
    before = outputs(model, example)
    masked = mask_removed(model, graph, Architecture.of({}, ["1"]))
    first, second = outputs(masked, example), outputs(masked, example)
    assert torch.equal(first[0], second[0])
    assert apart(before, first) > 1e-3
    assert torch.equal(before[0], outputs(model, example)[0])


@pytest.mark.parametrize(
    ("graph", "blocks", "message"),
    [
        ("residual", ["2"], "removes the block '2', which this model lacks. It has: 1, 3"),
        ("plain", ["0"], "which this model lacks. It has: none"),
    ],
)
def test_unknown_blocks_are_refused(graph, blocks, message):
    model, _, found = zoo(graph)
    for act in (apply_architecture, cut, mask_removed):
        with pytest.raises(SurgeryError, match=message):
            act(model, found, Architecture.of({}, blocks))


def test_a_block_that_must_stay_is_refused():
    model, _, graph = zoo("residual")
    kept = graph.with_kept_blocks({"1": "the user wants it"})
    with pytest.raises(SurgeryError, match="removes the block '1', which must stay: the user wants it"):
        apply_architecture(model, kept, Architecture.of({}, ["1"]))


def wrong(graph: ChannelGraph, name: str, **changes) -> ChannelGraph:
    """The graph with one block described wrongly."""
    blocks = tuple(replace(b, **changes) if b.name == name else b for b in graph.blocks)
    return replace(graph, blocks=blocks)


@pytest.mark.parametrize(
    "replacements",
    [
        (Replacement("3.conv1", StandIn.SILENCE),),  # the norms behind it add their biases
        (Replacement("3", StandIn.SILENCE),),  # the shortcut goes too
        (Replacement("3.conv1", StandIn.PASS_THROUGH),),  # what follows takes another number of channels: it fails
    ],
)
def test_a_block_that_is_not_removed_exactly_is_kept_with_the_reason(replacements):
    model, example, graph = zoo("residual")
    widths = {axis.name: range(axis.size // 2) for axis in graph.prunable}
    made = cut(model, wrong(graph, "3", replacements=replacements), Architecture.of(widths, ["1", "3"]))
    assert made.architecture == Architecture.of(widths, ["1"])
    assert [name for name, _ in made.verification.frozen] == ["3"]
    assert made.graph.blocks_by_name["3"].kept_because.startswith("removing it was not exact: ")
    assert apart(outputs(mask_removed(model, graph, made.architecture), example), outputs(made.model, example)) <= 1e-5


def test_a_block_whose_sum_is_another_one_is_kept():
    """The reference looks at the sum alone, the cut at the modules alone: they must agree."""
    model, _, graph = zoo("preact_residual")
    made = cut(model, wrong(graph, "1", addition=graph.blocks_by_name["2"].addition), Architecture.of({}, ["1"]))
    assert made.architecture == Architecture()
    assert made.graph.removable == graph.removable[1:]


def test_a_cut_with_blocks_blames_the_axis_that_is_wrong():
    model, _, graph = zoo("residual")
    axis = graph.by_name["3.conv1"]
    sites = tuple(replace(s, index=(s.index + 1) % axis.size) if s.dim == 1 else s for s in axis.sites)
    axes = tuple(replace(a, sites=sites) if a is axis else a for a in graph.axes)
    made = cut(model, replace(graph, axes=axes), Architecture.of({"3.conv1": [0, 1, 2]}, ["1"]))
    assert made.architecture == Architecture.of({}, ["1"])
    assert [name for name, _ in made.verification.frozen] == ["3.conv1"]


def test_healing_passes_over_what_is_gone():
    model, _, graph = zoo("residual")
    images = (torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)
    kept = {axis.name: range(axis.size * 2 // 3) for axis in graph.prunable}
    architecture = Architecture.of(kept, ["3"])
    raw = cut(model, graph, architecture)
    repaired = cut(model, graph, architecture, calibration=images, repairs=[Refit(), RecalibrateBatchNorm()])
    assert any(step.kept for step in repaired.repairs)
    assert output_distance(model, repaired.model, images) < output_distance(model, raw.model, images)
    assert find_replacements(repaired.model) == find_replacements(raw.model) != ()


def test_removing_a_block_alone_is_a_wound_too():
    model, _, graph = zoo("residual")
    images = (torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)),)
    made = cut(model, graph, Architecture.of({}, ["1"]), calibration=images, repairs=[RecalibrateBatchNorm()])
    assert [step.repair for step in made.repairs] == ["RecalibrateBatchNorm(eps=1e-08)"]
    held_out = split_calibration(images).held_out
    assert made.repairs[0].before == pytest.approx(
        output_distance(model, cut(model, graph, made.architecture).model, held_out)
    )


def test_axes_within_a_removed_block_have_no_effect():
    model, example, graph = zoo("residual")
    inner = graph.by_name["3.conv1"]
    without = apply_architecture(model, graph, Architecture.of({}, ["3"]))
    narrow = apply_architecture(model, graph, Architecture.of({inner.name: [0]}, ["3"]))
    assert torch.equal(outputs(without, example)[0], outputs(narrow, example)[0])
    assert [t.shape for t in without.parameters()] == [t.shape for t in narrow.parameters()]
