"""`untie`: branches compared with structures that were written by hand, and what is not a branch."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from cuts import apart, outputs
from hand_graphs import randomized
from torch import Tensor, nn
from zoo import ZOO
from zoo_convolutional import Head, conv_bn

from secateur.architecture import Architecture
from secateur.cost import Cost, CostModel, count_macs, count_params
from secateur.graph import ChannelGraph, Extent, trace, untie
from secateur.models import cifar_resnet20
from secateur.prune import apply_architecture, cut, mask_removed


def untied(name: str) -> tuple[ChannelGraph, ChannelGraph]:
    model, example = ZOO[name]()
    graph = trace(model, example)
    return graph, untie(model, graph)


def of(name: str) -> Extent:
    return Extent(0, ((name, 1),))


def places(graph: ChannelGraph, axis: str) -> set[tuple[str, int]]:
    return {(site.tensor, site.dim) for site in graph.by_name[axis].sites}


def norm(module: str) -> set[tuple[str, int]]:
    return {(f"{module}.{name}", 0) for name in ("weight", "bias", "running_mean", "running_var")}


def test_a_branch_has_what_makes_its_channels_and_the_stream_has_the_rest():
    _, graph = untied("residual")
    assert places(graph, "1.conv2/branch") == {("1.conv2.weight", 0), *norm("1.bn2")}
    assert places(graph, "2.shortcut.0/branch") == {("2.shortcut.0.weight", 0), *norm("2.shortcut.1")}
    first = {("0.0.weight", 0), *norm("0.1"), ("1.conv1.weight", 1), ("2.conv1.weight", 1), ("2.shortcut.0.weight", 1)}
    assert places(graph, "0.0") == first
    assert places(graph, "2.conv2") == {("3.conv1.weight", 1), ("4.fc.weight", 1)}
    found = {
        axis.name: (axis.residual_axis, axis.residual_output, axis.size)
        for axis in graph.axes
        if axis.residual_axis is not None
    }
    assert found == {
        "1.conv2/branch": ("0.0", "1.bn2", 8),
        "2.conv2/branch": ("2.conv2", "2.bn2", 14),
        "2.shortcut.0/branch": ("2.conv2", "2.shortcut.1", 14),
        "3.conv2/branch": ("2.conv2", "3.bn2", 14),
    }
    assert all(axis.frozen_because is None for axis in graph.axes if axis.residual_axis)


def test_extents_and_activations_follow():
    tied, graph = untied("residual")
    extents = {operation.module: operation.extents for operation in graph.operations}
    assert extents["1.conv2"] == (of("1.conv2/branch"), of("1.conv1"))
    assert extents["3.conv1"] == (of("3.conv1"), of("2.conv2"))
    assert extents["2.shortcut.0"] == (of("2.shortcut.0/branch"), of("0.0"))
    assert graph.tensors["3.conv2.weight"][:2] == (of("3.conv2/branch"), of("3.conv1"))
    assert graph.tensors["3.bn2.running_var"] == (of("3.conv2/branch"),)
    assert graph.tensors["4.fc.weight"][1] == of("2.conv2")
    names = [axis.name for axis in graph.axes]
    shown = {name: {names[n] for n in np.unique(found.axis)} for name, found in graph.activations.items()}
    # What the last module gives is as wide as the stream again.
    assert shown["1.conv2"] == {"1.conv2/branch"}
    assert shown["1.bn2"] == shown["1"] == {"0.0"}
    assert shown["2.shortcut.0"] == {"2.shortcut.0/branch"}
    assert shown["2.shortcut.1"] == shown["2.shortcut"] == {"2.conv2"}
    assert graph.axes[: len(tied.axes)] != tied.axes
    assert names[: len(tied.axes)] == [axis.name for axis in tied.axes]


def test_a_stream_whose_channels_begin_at_several_places_gives_a_branch_several_axes():
    model = cifar_resnet20().eval()
    graph = untie(model, trace(model, torch.zeros(1, 3, 32, 32)))
    of_last = {
        axis.name: (axis.residual_axis, axis.size) for axis in graph.axes if axis.residual_output == "layer3.2.bn2"
    }
    assert of_last == {
        "layer3.2.conv2/branch": ("conv1", 16),
        "layer3.2.conv2/branch#2": ("layer2.0.conv2", 8),
        "layer3.2.conv2/branch#3": ("layer2.0.conv2#2", 8),
        "layer3.2.conv2/branch#4": ("layer3.0.conv2", 16),
        "layer3.2.conv2/branch#5": ("layer3.0.conv2#2", 16),
    }


@pytest.mark.parametrize("name", ["dense", "plain", "shuffle_v2", "inception", "mlp"])
def test_a_model_without_branches_has_the_same_graph(name: str):
    tied, graph = untied(name)
    assert graph is tied


def test_nothing_of_the_caller_changes():
    model, example = ZOO["residual"]()
    model.train()
    graph = trace(model, example)
    before = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    state, axes = torch.random.get_rng_state(), graph.axes
    first, second = untie(model, graph), untie(model, graph)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    after = {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert after == before
    assert graph.axes is axes
    assert [axis.name for axis in first.axes] == [axis.name for axis in second.axes]
    assert first.operations == second.operations


def test_untying_twice_is_untying_once():
    model, example = ZOO["residual"]()
    graph = untie(model, trace(model, example))
    assert untie(model, graph) is graph


def test_a_branch_that_must_stay_whole_keeps_its_stream_whole():
    _, graph = untied("residual")
    frozen = graph.with_frozen({"3.conv2/branch": "because"})
    reasons = {axis.name: axis.frozen_because for axis in frozen.axes if axis.frozen_because}
    assert reasons.pop("3.conv2/branch") == reasons.pop("2.conv2") == "because"
    assert "2.conv2/branch" in {axis.name for axis in frozen.prunable}
    assert frozen.tensors["4.fc.weight"][1] == Extent(14)
    assert frozen.tensors["3.bn2.weight"] == (Extent(14),)
    only = graph.with_frozen({"2.conv2": "because"})
    assert "3.conv2/branch" in {axis.name for axis in only.prunable}


class Around(nn.Module):
    """A stem, two blocks that are added to it, a head."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.first, self.second = first, second
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x)
        return self.head(torch.relu(x + self.second(x)))


class Scale(nn.Module):
    """A factor for every channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class LastNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Scaled(nn.Module):
    """A linear layer over channels at the end, a permutation, and a factor that the parent holds."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear, self.gamma = conv(8, 5), nn.Linear(5, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.gamma[:, None, None] * out


def conv(inputs: int = 8, outputs: int = 8, **settings) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **settings)


ROWS = {
    "alone": conv,
    "batch_norm": lambda: nn.Sequential(conv(), nn.BatchNorm2d(8)),
    "layer_norm": lambda: nn.Sequential(conv(8, 5), nn.ReLU(), conv(5), LastNorm(8)),
    "group_norm": lambda: nn.Sequential(conv(8, 5), conv(5), nn.GroupNorm(4, 8)),
    "two_norms": lambda: nn.Sequential(conv(8, 5), conv(5), nn.BatchNorm2d(8, affine=False), Scale(8)),
    "depthwise": lambda: nn.Sequential(conv(8, 5), conv(5), conv(groups=8), nn.BatchNorm2d(8)),
    "groups": lambda: nn.Sequential(conv(8, 6), conv(6, 8, groups=2), nn.BatchNorm2d(8)),
    "activation_behind": lambda: nn.Sequential(conv(8, 5), conv(5), nn.BatchNorm2d(8), nn.GELU()),
    "norm_with_activation": lambda: timm.layers.ConvNormAct(8, 8, 3, apply_act=True),
    "factor_behind": Scaled,
    "identities": lambda: nn.Sequential(conv(), nn.Identity(), nn.BatchNorm2d(8), nn.Dropout()),
}


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_many_kinds_are_cut_exactly(row: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = randomized(Around(ROWS[row](), ROWS[row]()))
    example = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    graph = untie(model, trace(model, example))
    branches = [axis for axis in graph.prunable if axis.residual_axis]
    assert {axis.residual_output.partition(".")[0] for axis in branches} == {"first", "second"}
    kept = {axis.name: range(axis.size - 1) for axis in graph.prunable}
    kept |= {axis.name: range(axis.size // 4, max(1, axis.size // 2)) for axis in branches[::2]}
    made = cut(model, graph, Architecture.of(kept))
    assert made.verification.frozen == ()
    masked = mask_removed(model, graph, made.architecture)
    assert apart(outputs(masked, example), outputs(made.model, example)) <= 1e-5
    assert CostModel(graph).cost(made.architecture) == Cost(count_macs(made.model, example), count_params(made.model))


class Twice(nn.Module):
    """Its convolution is used twice, by the sum and by what follows."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate = conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return out + torch.sigmoid(self.gate(out))


class Repeated(nn.Module):
    """The same convolution runs two times."""

    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))


class Direct(nn.Module):
    """A convolution with the parent's parameters."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 8, 1, 1))
        self.scale = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight) * self.scale


NO_ROWS = {
    "used_twice": Twice,
    "run_twice": Repeated,
    "sigmoid_behind": lambda: nn.Sequential(conv(), nn.Sigmoid()),
    "norm_without_parameters": lambda: nn.Sequential(conv(), nn.BatchNorm2d(8, affine=False)),
    "norm_in_the_producer": Direct,
    "tied_to_its_input": lambda: nn.Sequential(conv(8, 4), conv(4, 8, groups=4)),
}


@pytest.mark.parametrize("row", NO_ROWS)
def test_what_is_no_branch_stays_tied(row: str):
    model = randomized(Around(NO_ROWS[row](), conv()))
    graph = untie(model, trace(model, torch.zeros(1, 3, 6, 6)))
    assert [
        axis.residual_output for axis in graph.axes if axis.residual_axis and not axis.residual_output.endswith("gate")
    ] == ["second"]


def test_shared_weights_stay_tied():
    model = Around(conv(), conv())
    model.second.weight = model.first.weight
    graph = trace(randomized(model), torch.zeros(1, 3, 6, 6))
    assert untie(model, graph) is graph


class Mixer(nn.Module):
    """Tokens are mixed, then channels; there are more tokens than channels."""

    def __init__(self):
        super().__init__()
        self.stem = conv(3, 8)
        self.first, self.second = nn.Linear(36, 10), nn.Linear(10, 36)
        self.third, self.fourth = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2)
        x = x + self.second(torch.relu(self.first(x)))
        x = x.transpose(1, 2)
        x = x + self.fourth(torch.relu(self.third(x)))
        return self.head(x.mean(1))


def test_the_channels_of_a_branch_may_run_beside_others():
    model = randomized(Mixer())
    example = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    graph = untie(model, trace(model, example))
    (axis,) = (axis for axis in graph.prunable if axis.residual_axis)
    assert (axis.residual_output, axis.size, graph.activations["fourth"].dim) == ("fourth", 8, 1)
    architecture = Architecture.of({axis.name: [1, 2, 6], str(axis.residual_axis): [1, 2, 3, 6, 7], "third": [0, 5]})
    made = cut(model, graph, architecture)
    assert made.architecture == architecture
    assert made.model.fourth.dim == 2


class Pair(nn.Module):
    """Two convolutions are added and nothing else feeds their channels."""

    def __init__(self):
        super().__init__()
        self.left, self.right = conv(3, 6), conv(3, 6)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.left(x) + self.right(x))


def test_a_stream_of_branches_alone_has_a_width_of_its_own():
    model = randomized(Pair())
    example = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    graph = untie(model, trace(model, example))
    assert places(graph, "left") == {("head.fc.weight", 1)}
    architecture = Architecture.of({"left": [0, 1, 2, 3, 5], "left/branch": [3, 5], "right/branch": [0, 1, 3]})
    small = apply_architecture(model, graph, architecture)
    left, right = model.left(example), model.right(example)
    left[:, [0, 1, 2]], right[:, [2, 5]] = 0, 0
    both = (left + right)[:, [0, 1, 2, 3, 5]]
    want = F.linear(both.mean((2, 3)), model.head.fc.weight[:, [0, 1, 2, 3, 5]], model.head.fc.bias)
    torch.testing.assert_close(small(example), want)
