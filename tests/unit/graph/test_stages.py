"""Stages: single live tensors against a test with gradients, what belongs to a stage, and costs that add up."""

import copy
from functools import cache

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from cuts import zoo_net
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo import ZOO
from zoo_convolutional import conv_bn

from secateur.architecture import Architecture
from secateur.cost import CostModel, flop_counter
from secateur.errors import ChoiceError
from secateur.graph import ChannelGraph, Stage, stages_of, trace, untie
from secateur.models import cifar_resnet20

each_net = pytest.mark.parametrize("name", ZOO)
PUBLISHED = {
    # Ends of stages, and how many axes and blocks are free, at 64 x 64 pixels.
    "resnet18": (("layer1", 2, 2), ("layer2", 2, 1), ("layer3", 2, 1), ("", 3, 1)),
    "mobilenetv2_050": (
        ("blocks.0", 1, 0),
        ("blocks.1", 2, 1),
        ("blocks.2", 3, 2),
        ("blocks.4", 8, 5),
        ("blocks", 5, 2),
        ("", 1, 0),
    ),
    "efficientnet_b0": (
        ("blocks.0", 2, 0),
        ("blocks.1", 4, 1),
        ("blocks.2", 4, 1),
        ("blocks.4", 13, 4),
        ("blocks", 11, 3),
        ("", 1, 0),
    ),
    "densenet121": (("features.transition1.conv", 13, 0), ("features.transition2.conv", 24, 0), ("", 81, 0)),
    "convnext_atto": (("stages.0", 2, 2), ("stages.1", 2, 2), ("stages.2", 6, 6), ("", 3, 2)),
    # Its last resolution has more than half of the MACs; the block that ends the first part of it goes with the cut.
    "regnetx_002": (("s1", 3, 0), ("s2", 2, 0), ("s3", 4, 3), ("s4.b3", 3, 1), ("", 4, 4)),
    "vit_tiny_patch16_224": (("blocks.2", 6, 6), ("blocks.5", 6, 6), ("blocks.8", 6, 6), ("", 6, 6)),
}


@cache
def published(name: str) -> tuple[nn.Module, ChannelGraph]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, **({"img_size": 64} if name.startswith("vit") else {})).eval()
    return model, trace(model, torch.zeros(1, 3, 64, 64))


@cache
def resnet20() -> tuple[nn.Module, ChannelGraph]:
    model = cifar_resnet20().eval()
    return model, trace(model, torch.zeros(1, 3, 32, 32))


# --- single live tensors ----------------------------------------------------------------------------------------------


def lives_alone(model: nn.Module, example: Tensor, name: str) -> bool:
    """Whether the input reaches the output only through what a module returns: cut there, no gradient is left.

    Not the model's own output, and not that of a module which only passes on what it is given.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    calls: list[bool] = []
    versions: list[int] = []

    def before(_module, inputs):
        versions[:] = [t._version for t in inputs if isinstance(t, Tensor)]

    def hook(_module, inputs, output):
        single = isinstance(output, Tensor) and output.requires_grad
        # What works in place returns its input too, but as another version.
        calls.append(single and not any(output is t and t._version in versions for t in inputs))
        return output.detach() if single else output

    module = model.get_submodule(name)
    module.register_forward_pre_hook(before)
    module.register_forward_hook(hook)
    out = [t for t in tree_leaves(model(example.clone().requires_grad_() + 0)) if isinstance(t, Tensor)]
    return calls == [True] and not any(t.requires_grad for t in out) and follows(model, example, name)


def follows(model: nn.Module, example: Tensor, name: str) -> bool:
    """Whether anything is computed from what a module returns: other numbers there change the output otherwise."""
    module, ran = model.get_submodule(name), []
    with torch.no_grad():
        hook = module.register_forward_hook(lambda _m, _i, out: ran.append(out))
        outputs = [t for t in tree_leaves(model(example)) if isinstance(t, Tensor)]
    hook.remove()
    return not any(out is t for out in ran for t in outputs)


def accepted(model: nn.Module, graph: ChannelGraph, name: str) -> bool:
    try:
        return [stage.cut for stage in stages_of(model, graph, [name])] == [name, ""]
    except ChoiceError:
        return False


@each_net
def test_a_cut_is_where_no_gradient_passes_by(name):
    model, example, graph = zoo_net(name)
    modules = [module for module, _ in model.named_modules() if module]
    got = {module for module in modules if accepted(model, graph, module)}
    assert got == {module for module in modules if lives_alone(model, example[:1], module)}


class Forked(nn.Module):
    """Two tensors go past the trunk: one around the block, one by way of an index."""

    def __init__(self, way: str):
        super().__init__()
        self.way = way
        self.stem, self.trunk, self.head = conv_bn(3, 8), conv_bn(8, 8), nn.Linear(8, 4)

    def forward(self, images: Tensor):
        x = self.stem(images)
        y = self.trunk(x)
        if self.way == "around":
            y = y + x
        if self.way == "gate":
            y = y * x.mean((1, 2, 3), keepdim=True).sigmoid()
        if self.way == "order":
            y = y[:, :, x.mean((0, 1, 3)).argsort()]
        if self.way == "number":
            y = y * (2.0 if x.mean().item() > 0 else 3.0)
        logits = self.head(y.mean((2, 3)))
        return {"logits": logits, "early": x.mean()} if self.way == "output" else logits


@pytest.mark.parametrize("way", ["around", "gate", "order", "number", "output"])
def test_what_passes_by_forbids_a_cut(way):
    """Also where no gradient would tell: by an index, and by a number that python reads."""
    model = Forked(way).eval()
    graph = trace(model, torch.randn(1, 3, 8, 8))
    with pytest.raises(ChoiceError, match=r"'trunk' is passed by"):
        stages_of(model, graph, ["trunk"])
    straight = Forked("").eval()
    graph = trace(straight, torch.randn(1, 3, 8, 8))
    assert [stage.cut for stage in stages_of(straight, graph, ["stem", "trunk"])] == ["stem", "trunk", ""]


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_stages_of_published_models(name):
    model, graph = published(name)
    assert (
        tuple((stage.cut, len(stage.axes), len(stage.blocks)) for stage in stages_of(model, graph)) == PUBLISHED[name]
    )


def test_a_resnet_is_divided_by_resolution_and_its_streams_stay_whole():
    model, graph = resnet20()
    first, second, third = stages_of(model, graph)
    assert [stage.cut for stage in (first, second, third)] == ["layer1", "layer2", ""]
    assert first.axes == tuple(f"layer1.{n}.conv1" for n in range(3))
    assert first.blocks == tuple(f"layer1.{n}" for n in range(3))
    assert second.axes == tuple(f"layer2.{n}.conv1" for n in range(3))
    inner = {f"layer3.{n}.conv1" for n in range(3)}
    # Behind the last cut the stream's own channels are free too; those that come from before are not.
    assert inner < set(third.axes)
    assert {a.name for a in graph.prunable} - {*first.axes, *second.axes, *third.axes} == {
        axis.name for axis in graph.prunable if {"layer1.0.bn2.weight", "layer2.0.bn2.weight"} & tensors(axis)
    }


def tensors(axis) -> set[str]:
    return {site.tensor for site in axis.sites}


def test_untied_branches_are_free_and_their_streams_are_not():
    model, graph = resnet20()
    untied = untie(model, graph)
    tied_free = {name for stage in stages_of(model, graph) for name in stage.axes}
    stages = stages_of(model, untied)
    free = {name: stage.name for stage in stages for name in stage.axes}
    assert tied_free <= set(free)
    branches = {axis.name for axis in untied.prunable if axis.into}
    assert branches
    assert branches <= set(free)
    assert all(free[name] == f"stage{name[5]}" for name in branches if name.startswith("layer"))
    assert [stage.blocks for stage in stages] == [stage.blocks for stage in stages_of(model, graph)]


class Stack(nn.Sequential):
    """Equal layers at one resolution."""

    def __init__(self, layers: int):
        body = [nn.Sequential(conv_bn(8, 8), conv_bn(8, 8)) for _ in range(layers)]
        super().__init__(conv_bn(3, 8), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def test_one_resolution_is_divided_into_equal_parts():
    model = Stack(8).eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    stages = stages_of(model, graph)
    total = sum(stage.macs for stage in stages)
    assert [stage.cut for stage in stages] == ["2", "4", "6", ""]
    assert all(abs(stage.macs / total - 0.25) < 0.05 for stage in stages)


def test_a_layer_that_only_widens_belongs_to_what_follows():
    class Narrowing(nn.Sequential):
        def __init__(self):
            wide = nn.Sequential(conv_bn(8, 32), nn.Conv2d(32, 32, 3, 2, 1, groups=32), nn.Conv2d(32, 16, 1))
            tail = nn.Sequential(conv_bn(16, 16), conv_bn(16, 16), conv_bn(16, 16))
            super().__init__(conv_bn(3, 8), conv_bn(8, 8), wide, tail, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))
            self.append(nn.Linear(16, 4))

    model = Narrowing().eval()
    stages = stages_of(model, trace(model, torch.zeros(1, 3, 16, 16)))
    assert stages[0].cut == "1"
    assert "2.0.0" in stages[1].axes


def test_a_model_without_a_single_live_tensor_is_one_stage():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = conv_bn(3, 8), nn.Linear(11, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.stem(x), x], 1).mean((2, 3)))

    model = Around().eval()
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    (stage,) = stages_of(model, graph)
    assert stage == Stage(
        "stage1", "", tuple(graph.sizes), (), sum(int(o.factor * _width(o)) for o in graph.operations)
    )
    with pytest.raises(ChoiceError, match=r"'stem' is passed by.* This model has no such module\."):
        stages_of(model, graph, ["stem"])


def _width(operation) -> int:
    return int(np.prod([extent.base + sum({"stem.0": 8}[name] * k for name, k in extent.terms)
                        for extent in operation.extents]))  # fmt: skip


# --- what belongs to a stage ------------------------------------------------------------------------------------------


class Lent(nn.Module):
    """The weight of `table` is used by the model itself, after the cut; `bias` is shared by both halves."""

    def __init__(self):
        super().__init__()
        self.first, self.second = conv_bn(3, 8), conv_bn(6, 8)
        self.table = nn.Conv2d(8, 6, 1)
        self.bias = nn.Parameter(torch.randn(8, 1, 1))
        self.mid, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.first(x) + self.bias)
        weight = self.table.weight * 2
        x = F.conv2d(x, weight, self.table.bias)
        return self.head((self.second(x) + self.bias).mean((2, 3)))


def test_parameters_count_where_they_are_used():
    model = Lent().eval()
    graph = trace(model, torch.randn(1, 3, 8, 8))
    first, second = stages_of(model, graph, ["mid"])
    assert "table" in second.axes
    shared = next(axis.name for axis in graph.prunable if "bias" in tensors(axis))
    assert {"first.0.weight", "second.0.weight"} <= tensors(graph.by_name[shared])
    assert shared not in (*first.axes, *second.axes)  # it is in both


def test_a_block_that_would_take_the_cut_along_belongs_to_no_stage():
    model, graph = resnet20()
    inside, outside = stages_of(model, graph, ["layer2.1"])
    assert "layer2.1" in {block.name for block in graph.removable}
    assert "layer2.1" not in (*inside.blocks, *outside.blocks)
    assert "layer1.2" in inside.blocks
    assert "layer2.2" in outside.blocks
    around, _ = stages_of(model, graph, ["layer2"])
    assert {"layer2.1", "layer2.2"} <= set(around.blocks)


def test_blocks_may_call_a_module_twice():
    """As those of torchvision's ResNets call their activation; they take it along."""
    model = torchvision.models.resnet18(num_classes=4).eval()
    graph = trace(model, torch.zeros(1, 3, 64, 64))
    stages = stages_of(model, graph)
    assert [stage.cut for stage in stages] == ["layer1", "layer2", "layer3", ""]
    blocks = [stage.blocks for stage in stages]
    assert blocks == [("layer1.0", "layer1.1"), ("layer2.1",), ("layer3.1",), ("layer4.1",)]


# --- costs ------------------------------------------------------------------------------------------------------------


def some(graph: ChannelGraph, stages: tuple[Stage, ...], draw: np.random.Generator) -> tuple[Architecture, ...]:
    """Random widths and blocks of each stage."""
    found: list[Architecture] = []
    for stage in stages:
        axes = [graph.by_name[name] for name in stage.axes]
        kept = {axis.name: range(int(draw.integers(1, axis.size // axis.divisor + 1)) * axis.divisor) for axis in axes}
        for axis in axes:
            if axis.into in kept:
                kept[axis.name] = range(min(len(kept[axis.name]), len(kept[axis.into])))
        blocks = [block for block in stage.blocks if draw.random() < 0.4]
        found.append(Architecture.of(kept, blocks))
    return tuple(found)


def joined(parts: tuple[Architecture, ...]) -> Architecture:
    return Architecture.of(
        {name: kept for part in parts for name, kept in part.kept},
        [block for part in parts for block in part.removed_blocks],
    )


def assert_costs_add_up(graph: ChannelGraph, stages: tuple[Stage, ...], seed: int) -> None:
    costs, draw = CostModel(graph), np.random.default_rng(seed)
    for _ in range(5):
        parts = some(graph, stages, draw)
        together = costs.cost(joined(parts))
        for name in ("macs", "params"):
            whole = getattr(costs.original, name)
            apart = sum(getattr(costs.cost(part), name) - whole for part in parts)
            assert getattr(together, name) - whole == apart


@pytest.mark.parametrize("name", PUBLISHED)
def test_costs_of_published_models_add_up(name):
    model, graph = published(name)
    for each in (graph, untie(model, graph)):
        stages = stages_of(model, each)
        assert_costs_add_up(each, stages, 3)
        assert sum(stage.macs for stage in stages) == CostModel(each).original.macs


@each_net
def test_costs_of_the_finest_stages_add_up(name):
    model, _, graph = zoo_net(name)
    for each in (graph, untie(model, graph)):
        stages = stages_of(model, each, finest(model, each))
        assert_costs_add_up(each, stages, 5)
        assert sum(stage.macs for stage in stages) == CostModel(each).original.macs


def finest(model: nn.Module, graph: ChannelGraph) -> list[str]:
    """As many cuts as there can be."""
    cuts: list[str] = []
    for name, _ in model.named_modules():
        if accepted(model, graph, name):
            try:
                stages_of(model, graph, [*cuts, name])
            except ChoiceError:
                continue
            cuts.append(name)
    return cuts


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit_tiny_patch16_224"])
def test_macs_of_a_stage_are_what_runs_between_its_cuts(name):
    model, graph = published(name)
    stages, counted = stages_of(model, graph), []
    model = copy.deepcopy(model)
    with torch.no_grad(), flop_counter() as counter:
        for stage in stages[:-1]:
            module = model.get_submodule(stage.cut)
            module.register_forward_hook(lambda *_: counted.append(counter.get_total_flops() // 2))
        model(torch.zeros(1, 3, 64, 64))
        counted.append(counter.get_total_flops() // 2)
    assert [stage.macs for stage in stages] == np.diff([0, *counted]).tolist()


# --- cuts that a user names -------------------------------------------------------------------------------------------


def test_cuts_that_cannot_be_are_refused_with_a_way_out():
    model, graph = resnet20()
    with pytest.raises(ChoiceError, match=r"`cuts` must name modules of the model; got 'layr1'\. Did you mean layer1"):
        stages_of(model, graph, ["layr1"])
    with pytest.raises(ChoiceError, match=r"'layer2.1.conv1' is passed by.* Near it are layer2\.0 and layer2\.1\."):
        stages_of(model, graph, ["layer2.1.conv1"])
    with pytest.raises(ChoiceError, match=r"order of execution.*'layer1' after 'layer2'\. In order: layer1, layer2\."):
        stages_of(model, graph, ["layer2", "layer1"])
    with pytest.raises(ChoiceError, match=r"each once; got 'layer1\.2' after 'layer1'"):
        stages_of(model, graph, ["layer1", "layer1.2"])
    shared, _, shared_graph = zoo_net("shared_weights")
    with pytest.raises(ChoiceError, match=r"'shared' runs \d times"):
        stages_of(shared, shared_graph, ["shared"])


def test_the_model_is_left_alone():
    model, graph = published("resnet18")
    model = copy.deepcopy(model).train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    stages_of(model, graph)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
