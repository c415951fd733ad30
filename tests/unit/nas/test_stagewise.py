"""The stage-wise pass: every stage in one run equals the same stage of the cut model, run alone."""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import timm
import torch
from cuts import apart, zoo_net
from swp_runs import BatchNorm, alone, finest
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo import ZOO

from secateur.errors import DataError, SurgeryError
from secateur.graph import ChannelGraph, Stage, find_stages, trace, untie
from secateur.models import cifar_resnet20
from secateur.nas import (
    Subnet,
    Supernet,
    measure_batch_norms,
    measure_stage_batch_norms,
    run_stages,
    stage_features,
    stage_losses,
    stage_variances,
)
from secateur.prune import original_names

TOLERANCE = 1e-12
"""Relative, float64: the same terms are summed in another order."""
PUBLISHED = (
    "resnet18", "mobilenetv2_050", "efficientnet_b0", "densenet121", "convnext_atto", "vit_tiny_patch16_224",
)  # fmt: skip
each_case = pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])


@dataclass(frozen=True, eq=False)
class Case:
    """A supernet in float64 with its stages, and images."""

    supernet: Supernet
    stages: tuple[Stage, ...]
    images: Tensor

    @property
    def graph(self) -> ChannelGraph:
        return self.supernet.graph

    def subnet(self, seed: int) -> Subnet:
        """Random widths and blocks of all stages."""
        draw = np.random.default_rng(seed)
        widths = {
            name: int(draw.integers(1, axis.size // axis.divisor + 1)) * axis.divisor
            for stage in self.stages
            for name in stage.axes
            for axis in [self.graph.by_name[name]]
        }
        for axis in self.graph.prunable:
            if axis.residual_axis in widths and axis.name in widths:
                widths[axis.name] = min(widths[axis.name], widths[axis.residual_axis])
        blocks = [name for stage in self.stages for name in stage.blocks if draw.random() < 0.4]
        return self.supernet.subnet(widths, blocks)


def made(model: nn.Module, graph: ChannelGraph, images: Tensor, untied: bool, finely: bool) -> Case:
    model, images = copy.deepcopy(model).double(), images.double()
    graph = replace(graph, example=tuple(tensor.double() for tensor in graph.example))
    graph = untie(model, graph) if untied else graph
    draw = np.random.default_rng(7)
    order = {axis.name: draw.permutation(axis.size) for axis in graph.prunable}
    cuts = finest(model, graph) if finely else None
    return Case(Supernet(model, graph, order), find_stages(model, graph, cuts), images)


@cache
def zoo_case(name: str, untied: bool = False) -> Case:
    model, images, graph = zoo_net(name)
    return made(model, graph, images, untied, finely=True)


@cache
def published_case(name: str, untied: bool = False) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **({"img_size": 32} if name.startswith("vit") else {})).eval()
        images = torch.randn(2, 3, 32, 32)
    return made(model, trace(model, images), images, untied, finely=False)


@cache
def resnet_case(untied: bool = False) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, images = cifar_resnet20().eval(), torch.randn(6, 3, 16, 16)
    return made(model, trace(model, images), images, untied, finely=False)


def tensors_of(value: object) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor)]


def assert_each_stage_is_that_stage_alone(case: Case, seed: int) -> None:
    supernet, stages, images = case.supernet.eval(), case.stages, case.images
    subnet = case.subnet(seed)
    small = supernet.extract(subnet).eval()
    with torch.no_grad():
        output, handed_on = stage_features(supernet, stages, images)
        assert apart(tensors_of(supernet.model(images)), tensors_of(output)) <= TOLERANCE
        got = run_stages(supernet, subnet, stages, images, handed_on)
        assert len(got) == len(stages) == len(handed_on) + 1
        for number, stage in enumerate(stages):
            wanted = alone(small, stages, number, images, handed_on)
            assert apart(tensors_of(wanted), tensors_of(got[number])) <= TOLERANCE, stage
        for number in range(len(handed_on)):
            whole = alone(supernet.model, stages, number, images, handed_on)
            assert apart([whole], [handed_on[number]]) <= TOLERANCE


@each_case
@pytest.mark.parametrize("name", ZOO)
def test_each_stage_is_that_stage_of_the_cut_model(name, untied):
    for seed in range(2):
        assert_each_stage_is_that_stage_alone(zoo_case(name, untied), seed)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_stage_is_that_stage_of_a_cut_published_model(name):
    case = published_case(name)
    assert len(case.stages) > 1
    assert_each_stage_is_that_stage_alone(case, 3)


@each_case
def test_each_stage_is_that_stage_of_a_cut_resnet(untied):
    assert_each_stage_is_that_stage_alone(resnet_case(untied), 4)


def test_features_are_protected_from_layers_that_write_in_place():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 1)]
    model, images = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    graph = trace(model, images)
    supernet = Supernet(model, graph)
    stages = find_stages(model, graph, ["1"])
    with torch.no_grad():
        output, (handed_on,) = stage_features(supernet, stages, images)
        assert float(handed_on.min()) < 0
        before = handed_on.clone()
        first, last = run_stages(supernet, supernet.full, stages, images, [handed_on])
        assert torch.equal(handed_on, before)
    torch.testing.assert_close(first, before)
    torch.testing.assert_close(last, output)


# --- gradients --------------------------------------------------------------------------------------------------------


def weighed(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar in which every element of every output has its own weight."""
    return sum((y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum() for y in outputs)


@each_case
def test_no_gradient_crosses_a_cut(untied):
    case = resnet_case(untied)
    supernet, subnet = case.supernet.eval(), case.subnet(1)
    output, handed_on = stage_features(supernet, case.stages, case.images)
    assert output.requires_grad
    assert not any(each.requires_grad for each in handed_on)
    outputs = run_stages(supernet, subnet, case.stages, case.images, handed_on)
    named = dict(supernet.model.named_parameters())
    wanted = {
        0: {name for name in named if name.startswith(("conv1", "bn1", "layer1"))},
        1: {name for name in named if name.startswith("layer2")},
        2: {name for name in named if name.startswith(("layer3", "linear", "fc"))},
    }
    assert set().union(*wanted.values()) == set(named)
    gone = supernet.graph.removed_modules(subnet.removed_blocks)
    for number, each in enumerate(outputs):
        gradients = torch.autograd.grad(weighed([each]), list(named.values()), allow_unused=True, retain_graph=True)
        got = {name for name, gradient in zip(named, gradients, strict=True) if gradient is not None}
        assert got == {name for name in wanted[number] if not gone(name.rpartition(".")[0])}


@each_case
def test_gradients_of_one_pass_equal_those_of_single_stages(untied):
    """They land in the whole tensors, like those of a stage that the supernet runs alone."""
    case = resnet_case(untied)
    supernet, subnet = case.supernet.eval(), case.subnet(2)
    with torch.no_grad():
        _, handed_on = stage_features(supernet, case.stages, case.images)
    together = gradients_of(
        supernet, lambda: weighed(run_stages(supernet, subnet, case.stages, case.images, handed_on))
    )
    one_by_one = [
        gradients_of(supernet, lambda n=n: weighed([stage_of_supernet(case, subnet, n, handed_on)]))
        for n in range(len(case.stages))
    ]
    for number, got in enumerate(together):
        wanted = sum(each[number] for each in one_by_one)
        assert float((got - wanted).abs().max()) <= TOLERANCE * max(1.0, float(wanted.abs().max()))


def gradients_of(supernet: Supernet, loss: Callable[[], Tensor]) -> list[Tensor]:
    parameters = list(supernet.model.parameters())
    found = torch.autograd.grad(loss(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def stage_of_supernet(case: Case, subnet: Subnet, number: int, handed_on: Sequence[Tensor]) -> Tensor:
    """Run one stage of a subnet: hooks on the supernet's model replace its input and record its output."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        if number > 0:
            module = case.supernet.model.get_submodule(case.stages[number - 1].cut)
            stack.callback(module.register_forward_hook(lambda *_: handed_on[number - 1].clone()).remove)
        if case.stages[number].cut:
            module = case.supernet.model.get_submodule(case.stages[number].cut)
            stack.callback(module.register_forward_hook(lambda _m, _i, out: found.append(out)).remove)
        output = case.supernet(subnet, case.images)
    return found[0] if found else output


@pytest.mark.parametrize("training", [True, False])
def test_stages_run_under_autocast(training):
    case = resnet_case()
    supernet = copy.deepcopy(case.supernet).float().train(training)
    images, subnet = case.images.float(), case.subnet(1)
    with torch.no_grad():
        output, handed_on = stage_features(supernet, case.stages, images)
        exact = stage_losses(run_stages(supernet, subnet, case.stages, images, handed_on), (*handed_on, output))
    with torch.autocast("cpu", torch.bfloat16):
        output, handed_on = stage_features(supernet, case.stages, images)
        outputs = run_stages(supernet, subnet, case.stages, images, handed_on)
        losses = stage_losses(outputs, (*handed_on, output))
    assert outputs[-1].dtype == torch.bfloat16
    assert losses.dtype == torch.float32
    losses.sum().backward()
    # Eight bits of mantissa, through up to 7 layers.
    torch.testing.assert_close(losses, exact, rtol=0.1, atol=0.02)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in supernet.parameters())
    assert sum(p.grad is not None for p in supernet.parameters()) > 20


# --- losses -----------------------------------------------------------------------------------------------------------


def test_stage_losses_equal_their_formula():
    draw = torch.Generator().manual_seed(0)
    targets = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((4, 3, 5, 5), (4, 7))]
    targets[0] += 3.0
    outputs = [x + 0.1 * torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in targets]
    wanted = [
        sum((a - b) ** 2 for a, b in zip(y.flatten().tolist(), x.flatten().tolist(), strict=True))
        / x.numel()
        / np.var(x.numpy())
        for y, x in zip(outputs, targets, strict=True)
    ]
    got = stage_losses(outputs, targets)
    assert got.dtype == torch.float64
    # What is added to the variance is 1e-12 of the mean square, which is ten variances of the first target.
    np.testing.assert_allclose(got.numpy(), wanted, rtol=2e-11)


def test_variances_may_be_measured_once():
    case = resnet_case()
    with torch.no_grad():
        output, handed_on = stage_features(case.supernet, case.stages, case.images)
        outputs = run_stages(case.supernet, case.subnet(1), case.stages, case.images, handed_on)
    targets = (*handed_on, output)
    variances = stage_variances(targets)
    np.testing.assert_allclose(variances.numpy(), [np.var(x.numpy()) for x in targets], rtol=2e-11)
    assert torch.equal(stage_losses(outputs, targets, variances), stage_losses(outputs, targets))


def test_losses_are_0_for_the_full_net_and_1_for_the_mean():
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(stage_losses([x, x.mean().expand_as(x)], [x, x]), torch.tensor([0.0, 1.0]).double())


def test_losses_of_constant_targets_are_finite():
    for value in (0.0, 5.0):
        x = torch.full((2, 3), value)
        y = x.clone().requires_grad_()
        losses = stage_losses([y, y], [x, x + 0.0])
        losses.sum().backward()
        assert losses.tolist() == [0.0, 0.0]
        assert bool(y.grad.isfinite().all())


def test_targets_get_no_gradient():
    x, y = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    stage_losses([y], [x]).sum().backward()
    assert x.grad is None
    assert y.grad is not None


# --- batch norms ------------------------------------------------------------------------------------------------------


def batches() -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(n, 3, 16, 16, generator=draw, dtype=torch.float64) for n in (6, 4, 6)]


def measured_alone(case: Case, subnet: Subnet, number: int, handed_on: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Statistics of the norms that ran in one stage of the cut model, by their names in the original."""
    small = case.supernet.extract(subnet).eval()
    begun = number == 0
    ran: dict[str, nn.Module] = {}
    names = original_names(small)
    for name, module in small.named_modules():
        if isinstance(module, BatchNorm):
            module.reset_running_stats()
            module.train()
            module.momentum = None
            module.register_forward_hook(lambda m, _i, _o, name=name: ran.update({names[name]: m}) if begun else None)

    def begin(*_):
        nonlocal begun
        begun = True

    if number > 0:
        module = small.get_submodule({o: n for n, o in names.items()}[case.stages[number - 1].cut])
        module.register_forward_hook(begin)
    with torch.no_grad():
        for images, features_of_full in zip(batches(), handed_on, strict=True):
            begun = number == 0
            alone(small, case.stages, number, images, features_of_full)
    return {f"{name}.{leaf}": tensor for name, norm in ran.items() for leaf, tensor in norm.named_buffers()}


@pytest.mark.parametrize("given", [True, False], ids=["full's own", "of each batch"])
@each_case
def test_statistics_equal_those_of_the_stages_run_alone(untied, given):
    case = resnet_case(untied)
    supernet = copy.deepcopy(case.supernet).train()
    subnets = [case.subnet(seed) for seed in (1, 2)]
    full = measure_batch_norms(supernet, supernet.full, batches()) if given else None
    got = measure_stage_batch_norms(supernet, subnets, case.stages, batches(), full)
    whole = copy.deepcopy(supernet.model).eval()
    if full is not None:
        whole.load_state_dict(full, strict=False)
    else:
        for module in whole.modules():
            module.training = isinstance(module, BatchNorm)
    handed_on: list[list[Tensor]] = []
    for stage in case.stages[:-1]:
        whole.get_submodule(stage.cut).register_forward_hook(lambda _m, _i, out: handed_on[-1].append(out.clone()))
    with torch.no_grad():
        for images in batches():
            handed_on.append([])
            whole(images)
    for subnet, statistics in zip(subnets, got, strict=True):
        wanted: dict[str, Tensor] = {}
        for number in range(len(case.stages)):
            wanted |= measured_alone(case, subnet, number, handed_on)
        assert statistics.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(statistics[name], tensor, rtol=1e-9, atol=1e-12)


def test_statistics_of_the_full_net_in_stages_are_its_own():
    case = resnet_case()
    full = measure_batch_norms(case.supernet, case.supernet.full, batches())
    (got,) = measure_stage_batch_norms(case.supernet, [case.supernet.full], case.stages, batches())
    assert got.keys() == full.keys()
    for name, tensor in full.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-13)


def test_measuring_statistics_does_not_change_the_supernet():
    case = resnet_case()
    supernet = copy.deepcopy(case.supernet).train()
    supernet.model.get_submodule("layer1").eval()
    before = copy.deepcopy(supernet.state_dict())
    modes = [module.training for module in supernet.modules()]
    full = measure_batch_norms(supernet, supernet.full, batches())
    measure_stage_batch_norms(supernet, [case.subnet(0)], case.stages, batches(), full)
    measure_stage_batch_norms(supernet, [case.subnet(0)], case.stages, batches())
    assert [module.training for module in supernet.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in supernet.state_dict().items())
    assert not any(module._forward_hooks for module in supernet.modules())
    with pytest.raises(DataError, match="`batches` must hold images"):
        measure_stage_batch_norms(supernet, [case.subnet(0)], case.stages, [])


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_boundary_axes_must_be_whole():
    case = resnet_case()
    free = {name for stage in case.stages for name in stage.axes}
    boundary = next(axis for axis in case.graph.prunable if axis.name not in free)
    with torch.no_grad():
        _, handed_on = stage_features(case.supernet, case.stages, case.images)
        narrow = case.supernet.subnet({boundary.name: 3})
        with pytest.raises(SurgeryError, match=r"`subnet` must be whole where stages meet; after 'layer1'"):
            run_stages(case.supernet, narrow, case.stages, case.images, handed_on)
    assert not any(module._forward_hooks for module in case.supernet.modules())


def test_modules_that_end_stages_cannot_be_removed():
    case = resnet_case()
    stages = find_stages(case.supernet.model, case.graph, ["layer2.1"])
    with torch.no_grad():
        _, handed_on = stage_features(case.supernet, stages, case.images)
        without = case.supernet.subnet({}, ["layer2.1"])
        with pytest.raises(SurgeryError, match=r"must leave the modules that end stages; got removed blocks layer2\.1"):
            run_stages(case.supernet, without, stages, case.images, handed_on)
