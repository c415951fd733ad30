"""Repairs: each compared with its equation, and without effect where there is nothing to repair."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cuts import apart, outputs, random_architecture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph import ChannelGraph, trace
from secateur.prune import (
    RecalibrateBatchNorm,
    Refit,
    RepairContext,
    apply_architecture,
    cut,
    output_distance,
    split_calibration,
)
from secateur.prune.repair import LayerSampler, _group_samplers, batch_statistics, find_layers_to_refit, solve_ridge

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


# What keeps a least-squares problem from having a good solution.


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squared_error(weights: Tensor, rows: Tensor, wanted: Tensor) -> float:
    return float((rows @ weights - wanted).square().sum())


SPOILED = ("nothing", "copies", "dead", "all dead", "constant", "small copies", "one input")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    samples=st.integers(1, 40),
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 4),
    exponents=st.lists(st.sampled_from([-9, -4, 0, 4, 9]), min_size=12, max_size=12),
    output_exponent=st.sampled_from([-9, 0, 9]),
    spoiled=st.sampled_from(SPOILED),
    ridge=st.sampled_from([0.0, 1e-12, 1e-3, 1.0]),
    seed=st.integers(0, 5),
)
def test_the_solution_is_finite_repeatable_and_never_worse_than_the_start(
    samples, inputs, outputs, exponents, output_exponent, spoiled, ridge, seed
):
    """Inputs of 1e-9 to 1e9 beside each other, copies, dead and constant ones, and fewer samples than inputs."""
    rows = drawn(samples, inputs, seed=seed).double()
    if spoiled == "copies":
        rows[:, inputs // 2 :] = rows[:, :1]
    elif spoiled == "dead":
        rows[:, inputs // 2 :] = 0
    elif spoiled == "all dead":
        rows[:] = 0
    elif spoiled == "constant":
        rows[:, inputs // 2 :] = 3.0
    elif spoiled == "small copies":
        rows[:, inputs // 2 :] = rows[:, :1] + 1e-9 * rows[:, inputs // 2 :]
    elif spoiled == "one input":
        rows[:, 1:] = 0
    rows = rows * 10.0 ** torch.tensor(exponents[:inputs], dtype=torch.float64)
    wanted = drawn(samples, outputs, seed=seed + 1).double() * 10.0**output_exponent
    start = drawn(inputs, outputs, seed=seed + 2).double()
    gram, cross = rows.T @ rows, rows.T @ wanted
    copies = gram.clone(), cross.clone(), start.clone()
    found = solve_ridge(gram, cross, start, ridge)
    if found is None:
        return
    assert found.isfinite().all()
    before = squared_error(start, rows, wanted)
    # Within the rounding of the products.
    rounding = 1e-9 * float((rows.square().sum(0)[:, None] * (found.square() + start.square())).sum())
    assert squared_error(found, rows, wanted) <= before * (1 + 1e-9) + rounding + 1e-12 * float(wanted.square().sum())
    assert torch.equal(found, solve_ridge(gram, cross, start, ridge))
    for kept, given_ in zip(copies, (gram, cross, start), strict=True):
        assert torch.equal(kept, given_)


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_the_solution_is_found_for_regular_problems_and_keeps_what_has_no_energy(ridge):
    rows, wanted = drawn(60, 8).double(), drawn(60, 3, seed=1).double()
    rows[:, 5] = 0
    rows[:, 6] = rows[:, 7]
    start = drawn(8, 3, seed=2).double()
    found = solve_ridge(rows.T @ rows, rows.T @ wanted, start, ridge)
    assert torch.equal(found[5], start[5]) if ridge == 0 else torch.allclose(found[5], start[5])
    best = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
    assert squared_error(found, rows, wanted) == pytest.approx(squared_error(best, rows, wanted), rel=1e-4)


def test_inputs_of_very_different_scales_are_all_fitted_without_a_ridge():
    scales = 10.0 ** torch.tensor([-9.0, -5, 0, 4, 9], dtype=torch.float64)
    rows = drawn(50, 5).double() * scales
    weights = drawn(5, 2, seed=1).double() / scales[:, None]
    found = solve_ridge(rows.T @ rows, rows.T @ (rows @ weights), torch.zeros(5, 2, dtype=torch.float64), 0.0)
    assert torch.allclose(found * scales[:, None], weights * scales[:, None], rtol=1e-5)


def between(last: nn.Module, middle: nn.Module | None = None) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        last.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
        return nn.Sequential(nn.Conv2d(3, 8, 3), middle or nn.BatchNorm2d(8), nn.ReLU(), last).eval()


def dead_norm(channels: int = 8, dead: int = 8) -> nn.BatchNorm2d:
    """As weight decay leaves them in trained networks: ReLU never opens."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.weight[:dead] = 1e-9
        norm.bias[:dead] = -1e-3
    return norm


LAST = {
    "conv": lambda: nn.Conv2d(8, 4, 3, bias=False),
    "conv with bias": lambda: nn.Conv2d(8, 4, 3),
    "linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=False)),
}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("dead", [1, 3, 7, 8])
def test_dead_inputs_do_not_stop_a_repair(last, dead):
    model = between(LAST[last](), dead_norm(dead=dead))
    pictures = images(16)
    graph = trace(model, pictures[0])
    made = cut(model, graph, Architecture.of({"0": [0, 1, 2]}), calibration=pictures, repairs=REPAIRS)
    (refit, _) = made.repairs
    assert all(tensor.isfinite().all() for tensor in made.model.state_dict().values())
    if dead >= 3 and last != "conv with bias":
        name = {"linear": "3.2"}.get(last, "3")
        assert refit.skipped == ((name, "all of its inputs are zero on the calibration images"),)
        assert torch.equal(
            made.model.get_submodule(name).weight,
            apply_architecture(model, graph, made.architecture).get_submodule(name).weight,
        )
    else:
        assert refit.skipped == ()


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("size", [3, 8])
def test_few_images_and_maps_of_one_pixel_are_repaired_or_left(count, size):
    """At size 3 the first convolution gives one pixel."""
    model = between(nn.Conv2d(8, 4, 1))
    pictures = (drawn(count, 3, size, size),)
    graph = trace(model, pictures[0])
    made = cut(model, graph, Architecture.of({"0": [0, 1, 2]}), calibration=pictures, repairs=REPAIRS)
    assert [result.held_out for result in made.repairs] == [count >= 8] * 2
    assert all(tensor.isfinite().all() for tensor in made.model.state_dict().values())
    assert made.repairs[-1].after <= made.repairs[0].before or not made.repairs[-1].kept


@pytest.mark.parametrize("batch", [1, 3])
def test_batches_of_single_images_and_norms_over_one_value_are_measured(batch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden = (nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU())
        model = nn.Sequential(*hidden, nn.Linear(8, 6), nn.BatchNorm1d(6)).eval()
    pictures = drawn(61, 3, 2, 2).split(batch)
    graph = trace(model, pictures[0])
    made = cut(model, graph, Architecture.of({"1": range(4)}), calibration=pictures, repairs=REPAIRS)
    assert all(tensor.isfinite().all() for tensor in made.model.state_dict().values())
    assert made.repairs[0].after < made.repairs[0].before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_images_that_are_not_finite_do_not_spoil_the_others(value):
    """One image in a batch of another camera: its samples are left out, and the rest is fitted."""
    model = between(nn.Conv2d(8, 4, 1), nn.Identity())
    good = images(48)
    spoiled = [batch.clone() for batch in good]
    spoiled[0][3] = value
    graph = trace(model, good[0])
    architecture = Architecture.of({"0": [0, 1, 2]})
    found: list[Tensor] = []
    for pictures in (good, tuple(spoiled)):
        small = apply_architecture(model, graph, architecture).eval()
        skipped = Refit().apply_(small, RepairContext(model, graph, architecture, pictures))
        assert skipped == {}
        found.append(small[3].weight.detach())
    assert found[1].isfinite().all()
    if value != 1e30:
        assert torch.allclose(found[0], found[1], rtol=0.3, atol=0.1)
    all_bad = (torch.full_like(good[0], float("nan")),)
    small = apply_architecture(model, graph, architecture).eval()
    skipped = Refit().apply_(small, RepairContext(model, graph, architecture, all_bad))
    assert list(skipped) == ["3"]
    norms = between(nn.Conv2d(8, 4, 1))
    graph = trace(norms, good[0])
    small = apply_architecture(norms, graph, architecture).eval()
    skipped = RecalibrateBatchNorm().apply_(small, RepairContext(norms, graph, architecture, all_bad))
    assert skipped == {"1": "its statistics are not finite on the calibration images"}
    assert all(tensor.isfinite().all() for tensor in small.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_half_precision_is_repaired(dtype, scale):
    model = between(nn.Conv2d(8, 4, 3)).to(dtype)
    pictures = tuple((scale * batch).to(dtype) for batch in images(32))
    graph = trace(model, pictures[0])
    made = cut(model, graph, Architecture.of({"0": [0, 1, 2, 5]}), calibration=pictures, repairs=REPAIRS)
    refit, _ = made.repairs
    assert refit.kept
    assert refit.after < refit.before
    assert refit.skipped == ()
    assert all(
        (tensor.isfinite().all() and tensor.dtype is not torch.float32) or tensor.dtype == torch.int64
        for tensor in made.model.state_dict().values()
    )


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_the_scale_of_activations_does_not_matter(scale):
    model = between(nn.Conv2d(8, 4, 3, bias=False), nn.Identity())
    after: list[float] = []
    for factor in (1.0, scale):
        with torch.no_grad():
            model[0].weight.mul_(factor)
            model[0].bias.mul_(factor)
            model[3].weight.div_(factor)
        graph = trace(model, images()[0])
        made = cut(model, graph, Architecture.of({"0": [0, 1, 2]}), calibration=images(), repairs=[Refit()])
        after.append(made.repairs[0].after)
        assert made.repairs[0].after < 0.9 * made.repairs[0].before
    assert after[0] == pytest.approx(after[1], rel=1e-3)


def test_a_channel_that_is_constant_in_one_model_keeps_its_variance():
    model = between(nn.Sequential(nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4)), nn.Identity())
    with torch.no_grad():
        model[3][0].weight[0, 1:] = 0  # The first output reads only the channel that is cut.
    pictures = images()
    graph = trace(model, pictures[0])
    architecture = Architecture.of({"0": [1, 2, 3, 4]})
    small = apply_architecture(model, graph, architecture).eval()
    before = small[3][1].running_var.clone()
    RecalibrateBatchNorm().apply_(small, RepairContext(model, graph, architecture, pictures))
    assert small[3][1].running_var[0] == before[0]
    assert (small[3][1].running_var[1:] != before[1:]).all()


def test_statistics_of_the_original_that_are_known_are_not_measured_again(monkeypatch: pytest.MonkeyPatch):
    model, example = ZOO["residual"]()
    graph = trace(model, example)
    pictures = [torch.randn(16, *example.shape[1:], generator=torch.Generator().manual_seed(0))]
    architecture = Architecture.of({axis.name: range(0, axis.size, 2) for axis in graph.prunable})
    found: list[nn.Module] = []
    for known in (None, batch_statistics(model, pictures)):
        made = cut(
            model,
            graph,
            architecture,
            calibration=pictures,
            repairs=[RecalibrateBatchNorm(known=known)],
            held_out=pictures,
        )
        assert made.repairs[0].repair == "RecalibrateBatchNorm(eps=1e-08)"
        found.append(made.model)
        monkeypatch.setattr("secateur.prune.repair.batch_statistics", _only_of(found[0]))
    assert all(torch.equal(one, found[1].state_dict()[name]) for name, one in found[0].state_dict().items())


def _only_of(small: nn.Module) -> Callable[..., Any]:
    def measured(model: nn.Module, images: Sequence[Tensor]) -> Any:
        assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in small.parameters())
        return batch_statistics(model, images)

    return measured


# Calibration batches of any form, and what they are judged by.


class Siamese(nn.Module):
    """Two images go through one encoder, which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu()).relu()

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return self.out(input=(self.encode(one) - self.encode(two)).abs())


def siamese() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Siamese().eval()


@pytest.mark.parametrize("form", ["tuple", "mapping"])
def test_batches_of_several_inputs_are_repaired(form):
    model = siamese()
    pairs = [(drawn(12, 3, 8, 8, seed=i), drawn(12, 3, 8, 8, seed=i + 9)) for i in range(4)]
    batches = [{"two": two, "one": one} for one, two in pairs] if form == "mapping" else pairs
    graph = trace(model, batches[0])
    kept = Architecture.of({a.name: range(a.size // 2) for a in graph.prunable})
    made = cut(model, graph, kept, calibration=batches, repairs=REPAIRS)
    (result, _) = made.repairs
    assert result.kept
    assert result.skipped == ()
    assert result.after < 0.8 * result.before
    plain = cut(model, graph, kept, calibration=pairs, repairs=REPAIRS).repairs
    assert [(r.before, r.after) for r in plain] == [(r.before, r.after) for r in made.repairs]


def test_both_calls_of_a_shared_layer_are_fitted():
    """The rows of both images: exchanging the two inputs changes nothing but the order."""
    model = siamese()
    one, two = drawn(12, 3, 8, 8), drawn(12, 3, 8, 8, seed=1)
    graph = trace(model, (one, two))
    kept = Architecture.of({"a": range(8)})
    found: list[Tensor] = []
    for batch in ((one, two), (two, one)):
        small = apply_architecture(model, graph, kept).eval()
        Refit(rows_per_unknown=10_000).apply_(small, RepairContext(model, graph, kept, (batch,)))
        found.append(small.b.weight.detach())
    assert torch.allclose(found[0], found[1], rtol=1e-3, atol=1e-4)


def test_images_of_several_sizes_are_repaired():
    model = between(nn.Conv2d(8, 4, 3))
    batches = [drawn(8, 3, 8, 8), drawn(6, 3, 12, 9), drawn(7, 3, 5, 20), drawn(9, 3, 8, 8, seed=1)]
    graph = trace(model, batches[0])
    made = cut(model, graph, Architecture.of({"0": range(5)}), calibration=batches, repairs=REPAIRS)
    assert made.repairs[0].kept
    assert made.repairs[0].after < made.repairs[0].before


def test_pairs_of_images_and_labels_are_refused():
    model, graph = redundant()
    batches = [(images()[0], torch.zeros(16).long())]
    for argument in ("calibration", "held_out"):
        given_ = {"calibration": images(), argument: batches}
        with pytest.raises(SurgeryError, match=rf"`{argument}` must hold batches as .*without labels"):
            cut(model, graph, Architecture.of({"0": [0]}), repairs=[Refit()], **given_)


class Spoil:
    """A repair that fits the calibration images and nothing else: a bias that only they need."""

    def apply_(self, small: nn.Module, context: RepairContext) -> None:
        seen = {float(batch.sum()) for batch in context.images}
        small.register_forward_hook(lambda _m, args, out: out if float(args[0].sum()) in seen else 2 * out)


def test_a_repair_is_judged_by_images_that_it_was_not_fitted_to():
    model, graph = redundant()
    architecture, pictures = Architecture.of({"0": [0, 1, 2]}), images(64)
    held = split_calibration(pictures)
    assert sum(map(len, held.held_out)) == 16
    made = cut(model, graph, architecture, calibration=pictures, repairs=[Refit()])
    explicit = cut(model, graph, architecture, calibration=held.fit, repairs=[Refit()], held_out=held.held_out)
    assert made.repairs == explicit.repairs
    small = apply_architecture(model, graph, architecture)
    assert made.repairs[0].before == output_distance(model, small, held.held_out)
    spoiled = cut(model, graph, architecture, calibration=pictures, repairs=[Spoil()])
    assert not spoiled.repairs[0].kept
    assert spoiled.repairs[0].after > spoiled.repairs[0].before


@pytest.mark.parametrize("name", sorted(ZOO))
def test_one_pass_gives_what_a_pass_for_each_layer_gives(name: str):
    model, example = ZOO[name]()
    graph = trace(model, example)
    architecture = random_architecture(graph, seed=3)
    batch = torch.randn(24, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    one, other = (
        cut(model, graph, architecture, calibration=[batch], held_out=[batch], repairs=[repair])
        for repair in (Refit(max_passes=10_000), Refit(in_one_pass=True))
    )
    assert [result.skipped for result in one.repairs] == [result.skipped for result in other.repairs]
    for wanted, got in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


class Double:
    """A repair that does harm to a buffer that a `state_dict` leaves out."""

    def apply_(self, small: nn.Module, context: RepairContext) -> None:
        small.get_buffer("scale").mul_(2)


def test_undoing_also_restores_what_a_state_dict_leaves_out():
    class Scaled(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
            self.register_buffer("scale", torch.ones(4, 1, 1), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.scale

    pictures = images(64)
    model = Scaled().eval()
    graph = trace(model, pictures[0][:1] if isinstance(pictures, list | tuple) else pictures[:1])
    made = cut(model, graph, Architecture.of({"0": [0, 1, 2, 3]}), calibration=pictures, repairs=[Double()])
    assert not made.repairs[0].kept
    assert torch.equal(made.model.get_buffer("scale"), torch.ones(4, 1, 1))


def test_statistics_are_the_same_in_parts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Flatten(), nn.Linear(7 * 36, 5), nn.BatchNorm1d(5))
    images = [torch.randn(6, 3, 8, 8), torch.randn(4, 3, 8, 8)]
    whole = batch_statistics(model.eval(), images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.prune.repair._STATISTICS_VALUES", 6 * 36 * 2)
        parts = batch_statistics(model, images)
    assert whole.keys() == parts.keys() == {"1", "4"}
    for name, found in whole.items():
        for one, other in zip(found, parts[name], strict=True):
            assert torch.equal(one, other)
    features = torch.cat([model[0](batch) for batch in images]).double()
    torch.testing.assert_close(whole["1"][0], features.mean((0, 2, 3)))
    torch.testing.assert_close(whole["1"][1], features.var((0, 2, 3), unbiased=False))
