"""Repairs: each compared with its equation, and without effect where there is nothing to repair."""

import copy

import pytest
import torch
from cuts import apart, outputs, random_architecture
from torch import Tensor, nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph import ChannelGraph, trace
from secateur.prune import RecalibrateBatchNorm, Refit, RepairContext, apply_architecture, cut, output_distance
from secateur.prune.repair import LayerSampler, _group_samplers, find_layers_to_refit

REPAIRS = [Refit(), RecalibrateBatchNorm()]
each_repair = pytest.mark.parametrize("repair", REPAIRS, ids=lambda h: type(h).__name__)


def images(count: int = 48, size: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    drawn = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
    return tuple(drawn.split(16))


def cut_with_context(name: str, kept: dict[str, list[int]]) -> tuple[nn.Module, ChannelGraph, RepairContext, nn.Module]:
    model, example = ZOO[name]()
    graph = trace(model, example)
    architecture = Architecture.of(kept)
    context = RepairContext(model, graph, architecture, images())
    return model, graph, context, apply_architecture(model, graph, architecture).eval()


def redundant(seed: int = 0) -> tuple[nn.Module, ChannelGraph]:
    """The last two of six channels of the first convolution are linear mixtures of the first four, and stay so."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 5, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(320, 7),
        ).eval()
        mixture = torch.randn(2, 4)
    first = model[0]
    with torch.no_grad():
        first.weight[4:] = torch.einsum("ij,jabc->iabc", mixture, first.weight[:4])
        first.bias[4:] = mixture @ first.bias[:4]
    return model, trace(model, torch.zeros(1, 3, 8, 8))


def test_refit_restores_what_was_redundant():
    model, graph = redundant()
    architecture = Architecture.of({"0": [0, 1, 2, 3]})
    pictures = images()
    before = cut(model, graph, architecture)
    after = cut(model, graph, architecture, calibration=pictures, repairs=[Refit(ridge=1e-9)])
    fresh = images(seed=9)[0]
    want = outputs(model, fresh)
    assert apart(want, outputs(before.model, fresh)) > 0.05
    assert apart(want, outputs(after.model, fresh)) < 1e-4
    assert after.repairs[0].kept
    assert after.repairs[0].after < 1e-6 < after.repairs[0].before


def test_refit_touches_only_layers_that_lost_inputs():
    model, graph = redundant()
    architecture = Architecture.of({"0": [0, 2, 3]})
    small = apply_architecture(model, graph, architecture)
    before = copy.deepcopy(small.state_dict())
    Refit().apply_(small, RepairContext(model, graph, architecture, images()))
    changed = {key for key, tensor in small.state_dict().items() if not torch.equal(before[key], tensor)}
    assert changed == {"1.weight", "1.bias"}


class ChannelsLast(nn.Module):
    """A linear layer over the channels of an image, as in ConvNeXt."""

    def __init__(self, inputs: int, given: int):
        super().__init__()
        self.linear = nn.Linear(inputs, given)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """Rows of the least-squares problem by torch's own unfold, not by indexing."""
    if isinstance(layer, nn.Linear):
        return x if x.dim() == 2 else x.permute(0, 2, 3, 1).flatten(0, 2)
    columns = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return columns.transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("reader", ["conv", "conv_no_bias", "linear", "channels_last"])
def test_refit_solves_the_written_equation(reader):
    """The minimizer of ||Y - X W'^T||^2 + r ||W' - W_S||^2 by an independent augmented least squares, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        body = {
            "conv": nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
            "conv_no_bias": nn.Conv2d(6, 4, 3, padding=1, bias=False),
            "linear": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
            "channels_last": ChannelsLast(6, 4),
        }[reader]
        model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), body).double().eval()
    pictures = tuple(batch.double() for batch in images(30))
    graph = trace(model, pictures[0])
    architecture = Architecture.of({"0": [0, 2, 5]})
    small = apply_architecture(model, graph, architecture)
    repair = Refit(ridge=0.05, rows_per_unknown=10_000)
    name = {"linear": "2.2", "channels_last": "2.linear"}.get(reader, "2")
    x = small[:2](torch.cat(pictures))
    y = model(torch.cat(pictures))
    layer = small.get_submodule(name)
    x = small[2][:2](x) if reader == "linear" else x
    rows = patches(layer, x)
    target = y if reader == "linear" else y.flatten(2).transpose(1, 2).flatten(0, 1)
    sliced = layer.weight.detach().flatten(1)
    if layer.bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        sliced = torch.cat([sliced, layer.bias.detach()[:, None]], 1)
    pull = 0.05 * rows.square().sum(0).mean()
    stacked = torch.cat([rows, pull.sqrt() * torch.eye(rows.shape[1], dtype=rows.dtype)])
    solution = torch.linalg.lstsq(stacked, torch.cat([target, pull.sqrt() * sliced.T])).solution.T
    repair.apply_(small, RepairContext(model, graph, architecture, pictures))
    found = layer.weight.detach().flatten(1)
    if layer.bias is not None:
        found = torch.cat([found, layer.bias.detach()[:, None]], 1)
    assert torch.allclose(found, solution.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["residual", "dense", "flatten_linear", "inception", "layer_scale", "mlp"])
def test_refit_brings_outputs_closer(name):
    model, example = ZOO[name]()
    graph = trace(model, example)
    architecture = Architecture.of({a.name: range((a.size + 1) // 2) for a in graph.prunable})
    made = cut(model, graph, architecture, calibration=images(96), repairs=[Refit(ridge=1e-2)])
    assert made.repairs[0].kept
    assert made.repairs[0].after < made.repairs[0].before


class Standardized(nn.Conv2d):
    """Semantics its class does not have: the weight is scaled before use."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, 3.0 * self.weight, self.bias)


def test_refit_skips_layers_that_do_not_compute_what_their_class_says():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), Standardized(6, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)
        ).eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    architecture = Architecture.of({"0": [0, 1, 2], "2": [1, 2, 3]})
    small = apply_architecture(model, graph, architecture)
    before = copy.deepcopy(small.state_dict())
    Refit().apply_(small, RepairContext(model, graph, architecture, images()))
    changed = {key for key, tensor in small.state_dict().items() if not torch.equal(before[key], tensor)}
    assert changed == {"4.weight", "4.bias"}


@each_repair
@pytest.mark.parametrize("name", ["residual", "few_groups", "depthwise_separable", "shared_weights", "tied_parameter"])
def test_an_uncut_model_is_left_exactly_as_it_is(repair, name):
    model, graph, context, small = cut_with_context(name, {})
    repair.apply_(small, context)
    state = model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in small.state_dict().items())
    whole = Architecture.of({a.name: range(a.size) for a in graph.prunable})
    made = cut(model, graph, whole, calibration=images(), repairs=[repair])
    assert made.repairs == ()


@each_repair
@pytest.mark.parametrize("name", list(ZOO))
def test_healing_is_deterministic_and_leaves_the_original_alone(repair, name):
    model, example = ZOO[name]()
    graph = trace(model, example)
    model.train()
    context = RepairContext(model, graph, random_architecture(graph, 1), images(32))
    before = {key: (tensor.clone(), tensor._version) for key, tensor in model.state_dict(keep_vars=True).items()}
    pictures, state = [batch.clone() for batch in context.images], torch.get_rng_state()
    results = []
    for _ in range(2):
        small = apply_architecture(model, graph, context.architecture).eval()
        repair.apply_(small, context)
        assert not small.training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())
        results.append(small.state_dict())
    assert all(torch.equal(tensor, results[1][key]) for key, tensor in results[0].items())
    assert all(tensor.isfinite().all() for tensor in results[0].values())
    assert model.training
    for key, tensor in model.state_dict(keep_vars=True).items():
        assert torch.equal(before[key][0], tensor)
        assert before[key][1] == tensor._version
    assert all(torch.equal(a, b) for a, b in zip(pictures, context.images, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_recalibration_follows_the_written_formula():
    """One batch norm after a convolution that lost inputs: both statistics measured by hand."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    model = model.double().eval()
    with torch.no_grad():
        model[3].running_mean.normal_(generator=torch.Generator().manual_seed(0))
        model[3].running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    pictures = tuple(batch.double() for batch in images(32))
    graph = trace(model, pictures[0])
    architecture = Architecture.of({"0": [0, 1, 4], "2": [0, 2, 3]})
    small = apply_architecture(model, graph, architecture)
    old_mean, old_var = small[3].running_mean.clone(), small[3].running_var.clone()
    with torch.no_grad():
        full, now = model[:3](torch.cat(pictures))[:, [0, 2, 3]], small[:3](torch.cat(pictures))
    RecalibrateBatchNorm(eps=0.0).apply_(small, RepairContext(model, graph, architecture, pictures))
    mean = old_mean + now.mean((0, 2, 3)) - full.mean((0, 2, 3))
    var = old_var * now.var((0, 2, 3), unbiased=False) / full.var((0, 2, 3), unbiased=False)
    assert torch.allclose(small[3].running_mean, mean, rtol=1e-10, atol=1e-12)
    assert torch.allclose(small[3].running_var, var, rtol=1e-10)


def test_a_last_batch_of_one_image_does_not_stop_recalibration():
    """A batch norm over one value has no variance; torch refuses it. Calibration sets often end on such a batch."""
    model, graph, context, small = cut_with_context("mlp", {"1": list(range(9))})
    *rest, last = context.images
    lonely = RepairContext(model, graph, context.architecture, (*rest, last[:1]))
    RecalibrateBatchNorm().apply_(small, lonely)
    assert all(tensor.isfinite().all() for tensor in small.state_dict().values())


def test_healing_needs_images():
    model, example = ZOO["plain"]()
    graph = trace(model, example)
    with pytest.raises(SurgeryError, match=r"`repairs` needs `calibration` images; got none\. Pass some"):
        cut(model, graph, Architecture.of({"0.0": [0]}), repairs=[Refit()])


@pytest.mark.parametrize("layers", [1, 2, 31, 32, 33, 64, 65])
def test_the_last_layer_sees_all_the_others_repaired(layers):
    """It gives the outputs: repaired for what arrives before its neighbor is, it would undo the neighbor's repair."""
    samplers = [LayerSampler(str(number), None) for number in range(layers)]
    groups = _group_samplers(samplers, 32)
    assert [sampler for group in groups for sampler in group] == samplers
    assert [sampler.module for sampler in groups[-1]] == [str(layers - 1)]
    assert len(groups) <= 32


def test_layers_behind_a_removed_block_are_repaired():
    """Preactivation: the second block reads the trunk to which the first no longer adds; so does the classifier."""
    model, example = ZOO["preact_residual"]()
    graph = trace(model, example)
    context = RepairContext(model, graph, Architecture.of({}, ["1"]), images())
    small = apply_architecture(model, graph, context.architecture).eval()
    assert find_layers_to_refit(small, context, {}) == ["2.conv1", "5.fc"]
    before = output_distance(model, small, context.images)
    Refit().apply_(small, context)
    assert output_distance(model, small, context.images) < 0.5 * before
