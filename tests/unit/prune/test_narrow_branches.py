"""Branches with fewer channels than their residual stream: expansion, errors, export, repair and comparison."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cuts import apart, outputs
from hand_graphs import randomized
from torch import Tensor, nn
from zoo import ZOO
from zoo_convolutional import Head, conv_bn

from secateur.architecture import Architecture
from secateur.distill import AlignedFeatures
from secateur.errors import SurgeryError
from secateur.export import export_onnx, export_pt2
from secateur.graph import ChannelGraph, trace, untie
from secateur.models import cifar_resnet20
from secateur.prune import (
    ChannelExpansion,
    ExpandChannels,
    RecalibrateBatchNorm,
    Refit,
    RepairContext,
    apply_architecture,
    branch_expansions,
    cut,
    expand_branches_,
    find_expansions,
    mask_removed,
    original_names,
    restrict_branches,
)
from secateur.prune.repair import batch_statistics, find_layers_to_refit


def zoo(name: str) -> tuple[nn.Module, Tensor, ChannelGraph]:
    model, example = ZOO[name]()
    return model, example, untie(model, trace(model, example))


def halves(graph: ChannelGraph) -> Architecture:
    """Streams lose their last channel; branches have the first half of theirs or every other channel, in turns."""
    kept = {axis.name: range(axis.size - 1) for axis in graph.prunable}
    branches = [axis for axis in graph.prunable if axis.residual_axis]
    for number, axis in enumerate(branches):
        kept[axis.name] = range(0, axis.size - 1, 2) if number % 2 else range(axis.size // 2)
    return Architecture.of(kept)


def test_channels_are_put_at_their_places():
    x = torch.arange(1.0, 13.0).view(2, 3, 2)
    padded = ExpandChannels(nn.Identity(), 1, 2)(x)
    assert torch.equal(padded[:, :3], x)
    assert torch.equal(padded[:, 3:], torch.zeros(2, 2, 2))
    placed = ExpandChannels(nn.Identity(), 1, 1, (3, 0, 3, 1, 2))(x)
    assert torch.equal(placed[:, [1, 3, 4]], x)
    assert not placed[:, [0, 2]].any()
    last = ExpandChannels(nn.Identity(), 2, 1, (2, 0, 1))(x)
    assert torch.equal(last, F.pad(x, (1, 0)))
    assert ExpandChannels(nn.Identity(), 1, 2).state_dict() == {}
    assert repr(ExpandChannels(nn.Identity(), 1, 1, (1, 0))).startswith(
        "ExpandChannels(\n  dim=1, missing=1, order=(1, 0)"
    )


def test_a_prefix_of_the_stream_is_only_padded():
    model, _, graph = zoo("residual")
    stream = {"0.0": [0, 2, 4, 6, 7]}
    assert branch_expansions(graph, Architecture.of({**stream, "1.conv2/branch": [0, 2]})) == (
        ChannelExpansion("1.bn2", 1, 3),
    )
    assert branch_expansions(graph, Architecture.of({**stream, "1.conv2/branch": [2, 7]})) == (
        ChannelExpansion("1.bn2", 1, 1, (2, 0, 2, 2, 1)),
    )
    assert branch_expansions(graph, Architecture.of({**stream, "1.conv2/branch": [0, 2, 4, 6, 7]})) == ()
    small = apply_architecture(model, graph, Architecture.of({**stream, "1.conv2/branch": [2, 7]}))
    assert find_expansions(small) == (ChannelExpansion("1.bn2", 1, 1, (2, 0, 2, 2, 1)),)


def test_names_in_a_cut_model_and_in_the_original():
    model, _, graph = zoo("residual")
    small = apply_architecture(model, graph, halves(graph))
    names = original_names(small)
    assert names["1.bn2.inner"] == "1.bn2"
    assert names["2.shortcut.1.inner"] == "2.shortcut.1"
    assert "1.bn2" not in names
    assert sorted(names.values()) == sorted(name for name, _ in model.named_modules())
    assert original_names(model) == {name: name for name in original_names(model)}


def test_what_cannot_be_widened_is_refused():
    with pytest.raises(SurgeryError, match="`widenings` must name modules of the model; got 'body'"):
        expand_branches_(nn.Sequential(nn.ReLU()), [ChannelExpansion("body", 1, 1)])
    with pytest.raises(SurgeryError, match="`widenings` must name modules within the model; got the model itself"):
        expand_branches_(nn.Sequential(nn.ReLU()), [ChannelExpansion("", 1, 1)])


def test_a_branch_that_keeps_more_than_its_stream_is_refused():
    model, _, graph = zoo("residual")
    message = (
        r"must keep in '1.conv2/branch' only channels that it keeps in its residual axis '0.0'.*got \[4, 7\] besides"
    )
    for kept in ({"1.conv2/branch": [0, 4, 7]}, {"1.conv2/branch": [4, 7]}):
        with pytest.raises(SurgeryError, match=message):
            apply_architecture(model, graph, Architecture.of({"0.0": [0, 1], **kept}))
    with pytest.raises(SurgeryError, match=r"Remove these from '1.conv2/branch' too \(.*\), or keep them in '0.0'"):
        cut(model, graph, Architecture.of({"0.0": [0, 1]}))


def test_branches_are_brought_within_their_streams():
    _, _, graph = zoo("residual")
    asked = Architecture.of(
        {"0.0": [2, 4], "1.conv2/branch": [0, 1, 4], "2.conv2": [1, 3], "3.conv2/branch": [0]}, ["3"]
    )
    assert restrict_branches(graph, asked) == Architecture.of(
        {
            "0.0": [2, 4],
            "1.conv2/branch": [4],
            "2.conv2": [1, 3],
            "2.conv2/branch": [1, 3],
            "2.shortcut.0/branch": [1, 3],
            "3.conv2/branch": [1],
        },
        ["3"],
    )


def test_what_a_removed_block_keeps_of_its_branch_has_no_effect():
    model, example, graph = zoo("residual")
    kept = {"0.0": [0, 1, 2]}
    small = apply_architecture(model, graph, Architecture.of({**kept, "1.conv2/branch": [5]}, ["1"]))
    assert find_expansions(small) == ()
    same = apply_architecture(model, graph, Architecture.of(kept, ["1"]))
    assert torch.equal(outputs(small, example)[0], outputs(same, example)[0])


@pytest.mark.parametrize("name", ["residual", "preact_residual", "attention"])
def test_exports_equal_eager(name: str, tmp_path: Path):
    model, example, graph = zoo(name)
    small = apply_architecture(model, graph, halves(graph)).eval()
    assert any(widening.order for widening in find_expansions(small))
    for export, file in ((export_onnx, "small.onnx"), (export_pt2, "small.pt2")):
        parity = export(small, example, tmp_path / file)
        assert parity.max_rel <= parity.tolerance


def test_exported_programs_take_any_batch(tmp_path: Path):
    import onnxruntime

    model, example, graph = zoo("residual")
    small = apply_architecture(model, graph, halves(graph)).eval()
    export_onnx(small, example, tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    x = torch.randn(5, *example.shape[1:], generator=torch.Generator().manual_seed(3))
    (found,) = session.run(None, {"input": x.numpy()})
    assert apart(outputs(small, x), [torch.from_numpy(found)]) <= 1e-5


class Shift(nn.Module):
    """Adds softplus(s) to every channel: zero parameters do not give zeros."""

    def __init__(self, channels: int):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.softplus(self.shift)


class Norm(nn.Module):
    """Divides every channel by its own length: a channel of zeros is no number."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / x.square().mean((2, 3), keepdim=True).sqrt()


class Block(nn.Module):
    def __init__(self, last: nn.Module):
        super().__init__()
        self.conv, self.last = nn.Conv2d(8, 8, 3, padding=1), last

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.conv(torch.relu(x)))


def around(last: nn.Module) -> tuple[nn.Module, ChannelGraph]:
    model = randomized(nn.Sequential(conv_bn(3, 8), Block(last), conv_bn(8, 6), Head(6)))
    example = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return model, untie(model, trace(model, example))


def test_a_branch_that_cannot_be_cut_right_stays_whole_and_its_stream_too():
    model, graph = around(Shift(8))
    assert "1.conv/branch" in {axis.name for axis in graph.prunable}
    made = cut(model, graph, Architecture.of({"1.conv/branch": range(5), "0.0": range(6), "2.0": range(3)}))
    assert made.architecture == Architecture.of({"2.0": range(3)})
    assert {name for name, _ in made.verification.frozen} == {"1.conv/branch", "0.0"}
    assert {axis.name for axis in made.graph.axes if axis.frozen_because} >= {"1.conv/branch", "0.0"}


def test_branches_are_compared_where_a_channel_of_zeros_is_no_number():
    model, graph = around(Norm(8))
    architecture = Architecture.of({"1.conv/branch": range(5), "0.0": range(6)})
    assert not torch.isfinite(outputs(mask_removed(model, graph, architecture), *graph.example)[0]).all()
    made = cut(model, graph, architecture)
    assert made.architecture == architecture
    assert made.verification.max_rel <= 1e-5


def wounded(name: str) -> tuple[RepairContext, nn.Module]:
    model, _, graph = zoo(name)
    images = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(16)
    architecture = halves(graph)
    return RepairContext(model, graph, architecture, images), apply_architecture(model, graph, architecture).eval()


@pytest.mark.parametrize("name", ["residual", "preact_residual", "inverted_residual_se"])
def test_a_refit_brings_narrow_branches_nearer_to_the_original(name: str):
    wound, _ = wounded(name)
    (repairs,) = cut(
        wound.original, wound.graph, wound.architecture, calibration=wound.images, repairs=[Refit()]
    ).repairs
    assert repairs.kept
    assert repairs.after < repairs.before


def test_statistics_of_a_norm_within_are_measured_against_the_same_norm_of_the_original():
    wound, small = wounded("residual")
    before, after = (batch_statistics(model, wound.images) for model in (wound.original, small))
    kept = torch.tensor(wound.architecture.by_name["1.conv2/branch"])
    old = wound.original.get_buffer("1.bn2.running_mean")[kept]
    change = after["1.bn2.inner"][0] - before["1.bn2"][0][kept]
    RecalibrateBatchNorm().apply_(small, wound)
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(small.get_buffer("1.bn2.inner.running_mean"), (old + change).float())


def test_the_layers_that_read_a_stream_are_repaired_behind_a_narrow_branch():
    model, _, graph = zoo("preact_residual")
    architecture = Architecture.of({"1.conv2/branch": [0, 3]})
    wound = RepairContext(model, graph, architecture, ())
    small = apply_architecture(model, graph, architecture)
    assert find_layers_to_refit(small, wound, {}) == ["2.conv1", "5.fc"]


def test_the_layer_within_is_repaired():
    wound, small = wounded("preact_residual")
    before = small.get_parameter("1.conv2.inner.weight").clone()
    Refit().apply_(small, wound)
    assert not torch.equal(before, small.get_parameter("1.conv2.inner.weight"))


def test_an_uncut_model_keeps_its_statistics():
    wound, _ = wounded("residual")
    same = apply_architecture(wound.original, wound.graph, Architecture())
    RecalibrateBatchNorm().apply_(same, RepairContext(wound.original, wound.graph, Architecture(), wound.images))
    state = wound.original.state_dict()
    assert all(torch.allclose(state[name], tensor) for name, tensor in same.state_dict().items())


def test_stages_of_teacher_and_student_are_compared_channel_by_channel():
    with torch.random.fork_rng(devices=[]):
        model = cifar_resnet20().eval()
    graph = untie(model, trace(model, torch.zeros(1, 3, 8, 8)))
    kept = {axis.name: range(axis.size // 2) if axis.residual_axis else range(axis.size - 1) for axis in graph.prunable}
    architecture = Architecture.of(kept)
    student = apply_architecture(model, graph, architecture).eval()
    aligned = AlignedFeatures.of(graph, architecture)
    assert [tap.module for tap in aligned.taps] == ["layer1", "layer2", "layer3"]
    assert [len(tap.kept) for tap in aligned.taps] == [15, 15 + 7 + 7, 15 + 7 + 7 + 15 + 15]
    narrow = AlignedFeatures.of(graph, architecture, modules=["layer1.0.bn2", "layer1.0.conv2"])
    assert [len(tap.kept) for tap in narrow.taps] == [15, 8]
    images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for features in (aligned, narrow):
        with features.record(student, model) as recorder, torch.no_grad():
            model(images)
            student(images)
            assert torch.isfinite(recorder.loss())
