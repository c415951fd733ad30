"""Two widths in one pass, compared with forward passes written by hand with torch's own pooling."""

import copy
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuts import apart, zoo_net
from recurrent_nets import RECURRENT
from torch import Tensor, nn

from secateur.graph import ChannelGraph, trace, untie
from secateur.nas import Interpolate, Mixture, Subnet, Supernet, WidthExpansion, ZeroPad

EXPANSIONS = [Interpolate(), ZeroPad()]
each_expansion = pytest.mark.parametrize("expansion", EXPANSIONS, ids=["interpolate", "fade"])


class Blend:
    """Eq. (4) for the channels of an axis, by its name; `behind` a norm only if the expansion asks for it."""

    def __init__(self, graph: ChannelGraph, mixture: Mixture, groups: dict[str, int] | None = None):
        self.names, self.mixture, self.groups = list(graph.sizes), mixture, groups or {}

    def __call__(self, z: Tensor, axis: str) -> Tensor:
        number = self.names.index(axis)
        small, large = self.mixture.weights[number]
        narrow, groups = self.mixture.narrow[number], self.groups.get(axis, 1)
        return large * z + small * seen(z, narrow, self.mixture.expansion, groups)

    def behind(self, z: Tensor, *axes: tuple[str, int]) -> Tensor:
        """Channels of several axes side by side: names and widths."""
        if not self.mixture.expansion.behind_norms:
            return z
        parts = z.split([width for _, width in axes], dim=1)
        return torch.cat([self(part, name) for part, (name, _) in zip(parts, axes, strict=True)], 1)


def double(name: str) -> tuple[nn.Module, Tensor, ChannelGraph]:
    """A net of the zoo in float64."""
    model, example, graph = zoo_net(name)
    return in_double(model, example, graph)


def in_double(model: nn.Module, example: Tensor, graph: ChannelGraph) -> tuple[nn.Module, Tensor, ChannelGraph]:
    graph = replace(graph, example=tuple(tensor.double() for tensor in graph.example))
    return copy.deepcopy(model).double(), example.double(), graph


def drawn(graph: ChannelGraph, expansion: WidthExpansion, seed: int = 0) -> tuple[Subnet, Mixture]:
    """Two random widths and random weights of every axis."""
    draw = np.random.default_rng(seed)
    pairs = [np.sort(draw.integers(1, axis.size // axis.divisor + 1, 2)) * axis.divisor for axis in graph.prunable]
    weights = torch.from_numpy(draw.dirichlet((1, 1), len(pairs)))
    narrow, wide = zip(*(map(int, pair) for pair in pairs), strict=True)
    return Subnet(wide), Mixture(narrow, weights, (), expansion)


def seen(z: Tensor, few: int, expansion: WidthExpansion, groups: int = 1) -> Tensor:
    """The first channels of every group at the width of all of them, dimension 1; torch's own operations alone."""
    batch, channels, *pixels = z.shape
    rows = z.reshape(batch, groups, channels // groups, -1)
    if isinstance(expansion, ZeroPad):
        found = torch.cat([rows[:, :, :few], torch.zeros_like(rows[:, :, few:])], 2)
    else:
        found = F.adaptive_avg_pool3d(rows[:, :, :few], (groups, channels // groups, rows.shape[3])).squeeze(1)
        pooled = [F.adaptive_avg_pool2d(rows[:, g, :few], (channels // groups, rows.shape[3])) for g in range(groups)]
        found = torch.stack(pooled, 1)
    return found.reshape(batch, channels, *pixels)


def plain(net: nn.Module, x: Tensor, blend: Blend) -> Tensor:
    for number in range(3):
        conv, norm, _ = net[number]
        x = F.relu(blend(norm(conv(x)), f"{number}.0"))
    return net[3](x)


def residual(net: nn.Module, x: Tensor, blend: Blend) -> Tensor:
    x = F.relu(blend(net[0][1](net[0][0](x)), "0.0"))
    for number, stream in ((1, "0.0"), (2, "2.conv2"), (3, "2.conv2")):
        block = net[number]
        y = F.relu(blend(block.bn1(block.conv1(x)), f"{number}.conv1"))
        y = blend(block.bn2(block.conv2(y)), stream)
        x = F.relu(y + (blend(block.shortcut(x), stream) if number == 2 else x))
    return net[4](x)


def preact_residual(net: nn.Module, x: Tensor, blend: Blend) -> Tensor:
    """The stream goes two ways from the first convolution: into a norm, and past it."""
    x = blend(net[0](x), "0")
    stream = ("0", x.shape[1])
    for number in (1, 2):
        block = net[number]
        y = block.conv1(F.relu(blend.behind(block.norm1(x), stream)))
        x = x + blend(block.conv2(F.relu(blend(block.norm2(y), f"{number}.conv1"))), "0")
    return net[5](F.relu(blend.behind(net[3](x), stream)))


def dense(net: nn.Module, x: Tensor, blend: Blend) -> Tensor:
    x = blend(net[0](x), "0")
    axes = [("0", x.shape[1])]
    for number in (1, 2, 3):
        layer = net[number]
        new = blend(layer.conv(F.relu(blend.behind(layer.norm(x), *axes))), f"{number}.conv")
        axes.append((f"{number}.conv", new.shape[1]))
        x = torch.cat([x, new], 1)
    return net[8](F.avg_pool2d(blend(net[6](F.relu(blend.behind(net[4](x), *axes))), "6"), 2))


def few_groups(net: nn.Module, x: Tensor, blend: Blend) -> Tensor:
    for number in range(4):
        x = F.relu(blend(net[number][1](net[number][0](x)), f"{number}.0"))
    return net[4](x)


def flatten_linear(net: nn.Module, x: Tensor, blend: Blend) -> Tensor:
    for number in (0, 2):
        x = F.max_pool2d(F.relu(blend(net[number][1](net[number][0](x)), f"{number}.0")), 2)
    return net[8](F.relu(blend(net[5](x.flatten(1)), "5")))


def shared_weights(net: nn.Module, x: Tensor, blend: Blend) -> Tensor:
    x = F.relu(blend(net.stem[1](net.stem[0](x)), "stem.0"))
    for norm in net.norms:
        x = F.relu(blend(norm(net.shared(x)), "stem.0"))
    return net.head(x)


def tied_parameter(net: nn.Module, x: Tensor, blend: Blend) -> Tensor:
    x = F.relu(blend(net.stem[1](net.stem[0](x)), "stem.0"))
    return net.head(F.relu(blend(net.second(F.relu(blend(net.first(x), "stem.0"))), "stem.0")))


def depthwise_separable(net: nn.Module, x: Tensor, blend: Blend) -> Tensor:
    """A depthwise convolution makes no channels; a norm behind it reads them again."""
    for number in range(5):
        x = net[number][1](net[number][0](x))
        x = F.relu(blend(x, f"{number}.0") if number in (0, 2, 4) else blend.behind(x, (f"{number - 1}.0", x.shape[1])))
    return net[5](x)


HAND_WRITTEN = {
    function.__name__: function
    for function in (
        plain, residual, preact_residual, dense, few_groups, flatten_linear, shared_weights, tied_parameter,
        depthwise_separable,
    )
}  # fmt: skip


@pytest.mark.parametrize("matrix", [True, False], ids=["matrix", "gather"])
@each_expansion
@pytest.mark.parametrize("name", HAND_WRITTEN)
def test_a_mixture_equals_the_hand_written_pass(name, expansion, matrix, monkeypatch):
    monkeypatch.setattr(sys.modules["secateur.nas.mixture"], "_MATRIX_UP_TO", 256 if matrix else 0)
    model, x, graph = double(name)
    supernet = Supernet(model, graph)
    groups = {"1.0": 3, "2.0": 3} if name == "few_groups" else {}
    for seed in range(4):
        subnet, mixture = drawn(graph, expansion, seed)
        with torch.no_grad():
            got = supernet(subnet, x, mixture=mixture)
            want = HAND_WRITTEN[name](supernet.extract(subnet), x, Blend(graph, mixture, groups))
        assert apart([want], [got]) <= 1e-12


@each_expansion
@pytest.mark.parametrize("matrix", [True, False], ids=["matrix", "gather"])
@pytest.mark.parametrize("name", ["plain", "flatten_linear", "dense"])
def test_gradients_of_the_weights(name, expansion, matrix, monkeypatch):
    """gradcheck in float64: searches follow these gradients."""
    monkeypatch.setattr(sys.modules["secateur.nas.mixture"], "_MATRIX_UP_TO", 256 if matrix else 0)
    model, x, graph = double(name)
    supernet = Supernet(model, graph)
    subnet, mixture = drawn(graph, expansion, 1)
    weights = mixture.weights.clone().requires_grad_()
    logits = lambda w: supernet(subnet, x[:1], mixture=replace(mixture, weights=w)).tanh()  # noqa: E731
    assert torch.autograd.gradcheck(logits, (weights,))


def test_gradients_of_the_model_are_those_of_the_hand_written_pass():
    model, x, graph = double("residual")
    supernet = Supernet(model, graph)
    subnet, mixture = drawn(graph, Interpolate(), 3)
    small = supernet.extract(subnet)
    residual(small, x, Blend(graph, mixture)).square().sum().backward()
    supernet(subnet, x, mixture=mixture).square().sum().backward()
    rows, columns = subnet.widths[1], subnet.widths[0]
    got = supernet.model.get_parameter("1.conv1.weight").grad
    torch.testing.assert_close(got[:rows, :columns], small.get_parameter("1.conv1.weight").grad, rtol=1e-10, atol=1e-10)
    assert not got[rows:].any()
    assert not got[:, columns:].any()


@each_expansion
@pytest.mark.parametrize("name", ["plain", "residual", "dense", "few_groups", "inverted_residual_se", "attention"])
def test_equal_widths_mix_nothing(name, expansion):
    model, x, graph = double(name)
    supernet = Supernet(model, graph)
    subnet, mixture = drawn(graph, expansion, 5)
    same = replace(mixture, narrow=subnet.widths)
    with torch.no_grad():
        assert torch.equal(supernet(subnet, x, mixture=same), supernet(subnet, x))


@pytest.mark.parametrize(
    "name",
    [
        "plain", "residual", "preact_residual", "dense", "few_groups", "flatten_linear", "shared_weights", "mlp",
        "depthwise_separable", "depth_multiplier", "inverted_residual_se", "shuffle_v2", "option_a_residual",
    ],
)  # fmt: skip
def test_zero_padding_with_all_weight_on_the_narrow_width_is_the_narrow_net(name):
    """A channel that is zero-padded equals a cut channel: no norm turns it into its bias."""
    model, x, graph = double(name)
    supernet = Supernet(model, graph)
    subnet, mixture = drawn(graph, ZeroPad(), 2)
    narrow = replace(mixture, weights=torch.tensor([[1.0, 0.0]]).double().repeat(len(subnet.widths), 1))
    with torch.no_grad():
        got, want = supernet(subnet, x, mixture=narrow), supernet(Subnet(mixture.narrow), x)
    assert apart([want], [got]) <= 1e-12


@each_expansion
@pytest.mark.parametrize(
    "name",
    ["plain", "residual", "preact_residual", "dense", "many_groups", "depthwise_separable", "depth_multiplier"],
)
def test_every_axis_matters_to_the_loss_in_training(name, expansion):
    """A search learns from these gradients, so a norm behind the expansion must not undo it."""
    model, _, graph = double(name)
    x = torch.randn(16, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    supernet = Supernet(model, graph).train()
    weights = torch.full((len(graph.sizes), 2), 0.5, dtype=torch.float64).requires_grad_()
    narrow = tuple(max(1, axis.size // 2 // axis.divisor) * axis.divisor for axis in graph.prunable)
    logits = supernet(supernet.full, x, mixture=Mixture(narrow, weights, (), expansion))
    F.cross_entropy(logits, torch.arange(16) % 5).backward()
    toward = (weights.grad[:, 1] - weights.grad[:, 0]).abs()
    assert toward.min() > 1e-6, dict(zip(graph.sizes, toward.tolist(), strict=True))


def test_all_weight_on_the_wide_width_is_the_subnet():
    model, x, graph = double("residual")
    supernet = Supernet(model, graph)
    subnet, mixture = drawn(graph, Interpolate(), 2)
    wide = replace(mixture, weights=torch.tensor([[0.0, 1.0]]).double().repeat(len(subnet.widths), 1))
    with torch.no_grad():
        assert apart([supernet(subnet, x)], [supernet(subnet, x, mixture=wide)]) <= 1e-12


@each_expansion
def test_narrow_branches_are_mixed_before_they_are_widened(expansion):
    """Untied: each branch has widths of its own, and is added into the first channels of the stream."""
    model, x, graph = double("residual")
    graph = untie(model, graph)
    supernet = Supernet(model, graph)
    sizes = list(graph.sizes)
    wide = dict(graph.sizes) | {"0.0": 7, "1.conv1": 9}
    branch = next(axis.name for axis in graph.prunable if axis.residual_output == "1.bn2")
    wide[branch] = 5
    narrow = wide | {branch: 2, "0.0": 4, "1.conv1": 6}
    weights = torch.from_numpy(np.random.default_rng(0).dirichlet((1, 1), len(sizes)))
    mixture = Mixture(tuple(narrow[n] for n in sizes), weights, (), expansion)
    blend = Blend(graph, mixture)
    with torch.no_grad():
        got = supernet(supernet.subnet(wide), x, mixture=mixture)
        net = supernet.model
        stem = F.batch_norm(
            F.conv2d(x, net[0][0].weight[:7], padding=1), net[0][1].running_mean[:7], net[0][1].running_var[:7],
            net[0][1].weight[:7], net[0][1].bias[:7],
        )  # fmt: skip
        stream = F.relu(blend(stem, "0.0"))
        block = net[1]
        inner = F.batch_norm(
            F.conv2d(stream, block.conv1.weight[:9, :7], padding=1), block.bn1.running_mean[:9],
            block.bn1.running_var[:9], block.bn1.weight[:9], block.bn1.bias[:9],
        )  # fmt: skip
        added = F.batch_norm(
            F.conv2d(F.relu(blend(inner, "1.conv1")), block.conv2.weight[:5, :9], padding=1),
            block.bn2.running_mean[:5], block.bn2.running_var[:5], block.bn2.weight[:5], block.bn2.bias[:5],
        )  # fmt: skip
        stream = F.relu(F.pad(blend(added, branch), (0, 0, 0, 0, 0, 2)) + stream)
        rest = supernet.extract(supernet.subnet({"0.0": 7, branch: 7}))
        want = rest[4](rest[3](rest[2](stream)))
    assert apart([want], [got]) <= 1e-12


def test_axes_that_no_output_shows_cannot_be_mixed():
    model, _, graph = zoo_net("functional")
    assert Supernet(model, graph).mixable == frozenset()
    model, _, graph = zoo_net("residual")
    assert Supernet(model, graph).mixable == frozenset(graph.sizes)


@pytest.mark.parametrize("name", ["crnn_lstm", "crnn_gru", "residual"])
def test_units_of_recurrent_layers_are_left_whole_because_their_states_cannot_be_mixed(name: str):
    model, inputs = RECURRENT[name]()
    graph = trace(model, inputs)
    supernet = Supernet(model, graph)
    assert supernet.mixable == frozenset({"stem.0", "body.0", "middle"} if name != "residual" else set())
    # A subnet may cut them all the same, as SWP does.
    subnet = supernet.subnet({axis: size // 2 for axis, size in graph.sizes.items()})
    with torch.no_grad():
        assert apart([supernet.extract(subnet)(*inputs)], [supernet.eval()(subnet, *inputs)]) <= 1e-6
        assert apart([model(*inputs)], [supernet(supernet.full, *inputs)]) <= 1e-6


def test_a_mixture_with_channels_last_in_three_dimensions():
    """Channels last of three dimensions, as in a transformer: Eq. (4) along the last one."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, x = Tokens().eval(), torch.randn(2, 5, 6)
    model, x, graph = in_double(net, x, trace(net, x))
    for expansion in EXPANSIONS:
        mixture = Mixture((3,), torch.tensor([[0.3, 0.7]], dtype=torch.float64), (), expansion)
        with torch.no_grad():
            got = Supernet(model, graph)(Subnet((8,)), x, mixture=mixture)
            z = F.linear(x, model.first.weight[:8], model.first.bias[:8]).movedim(2, 1)
            z = (0.7 * z + 0.3 * seen(z, 3, expansion)).movedim(1, 2)
            want = F.linear(torch.tanh(z), model.second.weight[:, :8], model.second.bias)
        assert apart([want], [got]) <= 1e-12
