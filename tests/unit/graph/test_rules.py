"""What single operations do to channels: each in the smallest net that has it, traced, cut and compared."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cuts import apart, one_channel, outputs, random_architecture
from torch import Tensor, nn

from secateur.architecture import Architecture
from secateur.cost import Cost, CostModel, counted_macs, counted_params
from secateur.graph import ChannelGraph, Role, trace
from secateur.surgery import cut, mask_removed

pytestmark = pytest.mark.window


class Between(nn.Module):
    """conv (12 channels) -> some operation -> conv -> mean -> linear."""

    def __init__(self, operation: Callable[[Tensor], Tensor], arriving: int = 12):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.operation = operation
        self.second = nn.Conv2d(arriving, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.operation(self.norm(self.first(x)))
        return self.head(F.relu(self.second(x)).mean((2, 3)))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def traced(model: nn.Module) -> ChannelGraph:
    """Trace, and prove on three random cuts that nothing had to be frozen afterwards and the cost is right."""
    graph = trace(model.eval(), IMAGES)
    for seed in range(2):
        architecture = random_architecture(graph, seed)
        made = cut(model, graph, architecture)
        assert made.verification.frozen == ()
        assert apart(outputs(mask_removed(model, graph, architecture), IMAGES), outputs(made.model, IMAGES)) < 1e-5
        assert CostModel(graph).cost(architecture) == Cost(counted_macs(made.model, IMAGES), counted_params(made.model))
    return graph


def reason_of(graph: ChannelGraph, name: str) -> str | None:
    return graph.by_name[name].frozen_because


class GroupsByHand(nn.Module):
    """Written as EvoNorm is: the channels in a group are computed from their number and that of the groups."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        rows = x.reshape(b, self.groups, c // self.groups, h, w)
        spread = rows.var((2, 3, 4), unbiased=False, keepdim=True).add(1e-3).sqrt()
        return x / spread.expand(rows.shape).reshape(x.shape)


FREE: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "pixel_shuffle": (nn.PixelShuffle(2), 3),
    "pixel_unshuffle": (nn.PixelUnshuffle(2), 48),
    "unfold": (lambda x: F.unfold(x, 2).unflatten(2, (7, 7)), 48),
    "padded_unfold": (lambda x: F.unfold(x, 3, padding=1).view(x.shape[0], -1, 8, 8), 108),
    "roll_space": (lambda x: x.roll((1, 2), (2, 3)), 12),
    "flip_space": (lambda x: x.flip(3), 12),
    "flip_channels": (lambda x: x.flip(1), 12),
    "norm_over_space": (lambda x: x / (1 + x.norm(dim=(2, 3), keepdim=True)), 12),
    "normalize_over_space": (lambda x: F.normalize(x, dim=3), 12),
    "vector_norm_over_space": (lambda x: x / (1 + torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)), 12),
    "variance_over_space": (lambda x: x / (1 + x.var((2, 3), unbiased=False, keepdim=True)), 12),
    "standard_deviation": (lambda x: x * x.std((2, 3), keepdim=True), 12),
    "maximum_over_space": (lambda x: x * x.amax((2, 3), keepdim=True), 12),
    "max_over_one_dim": (lambda x: x.max(3, keepdim=True).values + x, 12),
    "softmax_over_space": (lambda x: x.softmax(3), 12),
    "doubled": (lambda x: torch.cat([x, -x], 1), 24),
    "repeated": (lambda x: x.repeat(1, 2, 1, 1), 24),
    "layer_norm_over_space": (lambda x: F.layer_norm(x, (8, 8)), 12),
    "interleaved": (lambda x: x.repeat_interleave(2, 1), 24),
    "stacked": (lambda x: torch.stack([x, x.square()], 2).flatten(1, 2), 24),
    "channel_shuffle": (nn.ChannelShuffle(3), 12),
    "groups_by_hand": (GroupsByHand(6), 12),
    "zeros_of_its_shape": (lambda x: torch.cat([x, torch.zeros(x.shape)], 1) + torch.ones(1, 2 * x.shape[1], 1, 1), 24),
    "broadcast_to_its_shape": (lambda x: x + torch.ones(1, 1, 8, 8).expand(x.shape).clone(), 12),
    "new_zeros": (lambda x: x + x.new_zeros(()), 12),
    "zeros_beside": (lambda x: x.new_ones(1, 1, 8, 8) * x, 12),
    "reflection_pad": (nn.ReflectionPad2d(1), 12),
    "in_place": (lambda x: x.mul_(2.0).add_(1.0), 12),
    "upsampled": (lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), 12),
    "instance_norm": (nn.InstanceNorm2d(12), 12),
    "einsum_over_space": (lambda x: torch.einsum("bchw,bchv->bcwv", x, x), 12),
}
"""Operations after which any channel of the first convolution may go."""


@pytest.mark.parametrize("name", FREE)
def test_free(name):
    operation, arriving = FREE[name]
    graph = traced(Between(operation, arriving))
    assert reason_of(graph, "first") is None
    assert reason_of(graph, "second") is None


def test_sub_pixel_convolution_removes_four_channels_at_a_time():
    graph = traced(Between(nn.PixelShuffle(2), 3))
    assert graph.by_name["first"].size == 3
    site = next(s for s in graph.by_name["first"].sites if s.tensor == "first.weight")
    assert site.index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


class EfficientChannelAttention(nn.Module):
    """A gate from a convolution along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.slide = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.slide(x.mean((2, 3)).unsqueeze(1)).sigmoid().flatten(1)[..., None, None]


class StandardisedConvolution(nn.Conv2d):
    """Every filter has mean 0 and variance 1, however many inputs it has."""

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


OVER_KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "mean_without_dim": lambda x: x * x.mean(1).unsqueeze(1),
    "norm": lambda x: F.normalize(x, dim=1),
    "full_sum": lambda x: x / x.abs().sum(),
    "maximum": lambda x: x - x.amax(1, keepdim=True),
    "variance": lambda x: x / x.var(1, keepdim=True, unbiased=False).add(1e-3).sqrt(),
    "cumulative_sum": lambda x: x.cumsum(1),
    "group_norm": nn.GroupNorm(3, 12),
    "group_norm_by_hand": GroupsByHand(3),
    "efficient_channel_attention": EfficientChannelAttention(),
    "standardised_weight": StandardisedConvolution(12, 12, 3, padding=1),
    "groups_of_two": nn.GroupNorm(6, 12),
    "one_group": nn.GroupNorm(1, 12),
}
"""Operations that a cut model computes over the channels it kept, and so must the masked original."""


@pytest.mark.parametrize("name", OVER_KEPT)
def test_what_is_computed_over_channels_is_computed_over_the_kept_ones(name):
    graph = traced(Between(OVER_KEPT[name]))
    assert reason_of(graph, "first") is None
    assert len(graph.mixings) == 1


def test_layer_norm_of_a_cut_model_by_hand():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(3, 10)
            self.norm = nn.LayerNorm(10)
            self.head = nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.wide(x)))

    model, x, kept = Normed().eval(), torch.randn(4, 3), [0, 3, 4, 9]
    nn.init.normal_(model.norm.weight)
    nn.init.normal_(model.norm.bias)
    made = cut(model, trace(model, x), Architecture.of({"wide": kept}))
    assert made.verification.frozen == ()
    features = model.wide(x)[:, kept]
    centred = features - features.mean(1, keepdim=True)
    normed = centred / (centred.square().mean(1, keepdim=True) + model.norm.eps).sqrt()
    normed = normed * model.norm.weight[kept] + model.norm.bias[kept]
    expected = normed @ model.head.weight[:, kept].T + model.head.bias
    torch.testing.assert_close(made.model(x), expected)


def test_whole_groups_of_a_group_norm_go_where_there_are_many():
    graph = traced(Between(nn.GroupNorm(6, 12)))
    assert graph.by_name["first"].size == 6
    made = cut(Between(nn.GroupNorm(6, 12)).eval(), graph, Architecture.of({"first": [0, 5]}))
    assert made.model.operation.num_groups == 2
    assert made.model.operation.num_channels == 4


MIXED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "maximum_with_position": (lambda x: x - x.max(1, keepdim=True).values, "looks for the position"),
    "sort": (lambda x: x.sort(1).values, "has no channel rule"),
    "literal_layer_norm": (lambda x: F.layer_norm(x, (12, 8, 8)), "`layer_norm` .* takes the size 12"),
    "divided_by_their_number": (lambda x: x.sum(1, keepdim=True) / x.shape[1] + x, "takes the size x.shape"),
    "scaled_by_their_number": (lambda x: x * x.shape[1] ** -0.5, "takes the size x.shape"),
    "roll": (lambda x: x.roll(2, 1), "moves channels"),
    "step": (lambda x: x[:, ::2].repeat(1, 2, 1, 1), "by a step"),
    "single": (lambda x: x[:, 11:] + x, "takes the size 11|picks single"),
    "fixed_index": (lambda x: x[:, [0, 5, 3]].repeat(1, 4, 1, 1), "by a fixed index"),
    "constant": (lambda x: x + torch.arange(12.0).view(1, 12, 1, 1), "does not follow the channels"),
    "strided": (lambda x: x.contiguous().as_strided((1, 12, 8, 8), (768, 64, 1, 8)), "`as_strided` .* no channel rule"),
    "written_into": (lambda x: torch.zeros(x.shape).copy_(x).index_fill_(1, torch.tensor([1]), 0.0), "no channel rule"),
    "unequal_chunks": (lambda x: torch.cat(x.chunk(5, 1), 1), "unequal pieces"),
}


@pytest.mark.parametrize("name", MIXED)
def test_channels_that_are_mixed_stay_whole_with_a_reason(name):
    operation, reason = MIXED[name]
    graph = traced(Between(operation))
    frozen = [
        a for a in graph.axes if a.frozen_because and any(s.tensor == "first.weight" and s.dim == 0 for s in a.sites)
    ]
    assert frozen
    assert sum(a.size for a in frozen) == 12
    assert all(re.search(reason, str(axis.frozen_because)) for axis in frozen), [a.frozen_because for a in frozen]
    assert reason_of(graph, "second") is None


class Projection(nn.Module):
    """A matrix held by the model, applied by one of many spellings."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.matrix = nn.Parameter(torch.randn(8, 10))
        self.product = product
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.product(F.relu(self.first(x)), self.matrix).relu().mean((2, 3)))


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum": lambda x, m: torch.einsum("bchw,cd->bdhw", x, m),
    "right": lambda x, m: (x.permute(0, 2, 3, 1) @ m).permute(0, 3, 1, 2),
    "left": lambda x, m: (m.t() @ x.flatten(2)).unflatten(2, (8, 8)),
    "linear": lambda x, m: F.linear(x.permute(0, 2, 3, 1), m.t()).permute(0, 3, 1, 2),
    "convolution": lambda x, m: F.conv2d(x, m.t()[:, :, None, None]),
    "tensordot": lambda x, m: torch.tensordot(x, m, ([1], [0])).permute(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_a_matrix_of_the_model(name):
    graph = traced(Projection(PRODUCTS[name]))
    roles = {(s.tensor, s.dim): s.role for axis in graph.prunable for s in axis.sites}
    assert {axis.size for axis in graph.prunable} == {8, 10}
    assert roles["first.weight", 0] is Role.OUTPUT
    assert roles["matrix", 0] is Role.INPUT
    assert roles["matrix", 1] is Role.OUTPUT
    assert roles["head.weight", 1] is Role.INPUT


@pytest.mark.parametrize(
    "convolution", [nn.ConvTranspose2d(12, 12, 3, groups=12), nn.ConvTranspose2d(12, 12, 2, 2, groups=12, bias=False)]
)
def test_depthwise_transposed_convolution(convolution):
    graph = traced(Between(convolution))
    assert graph.by_name["first"].size == 12
    assert {("operation.weight", 0), ("second.weight", 1)} <= {(s.tensor, s.dim) for s in graph.by_name["first"].sites}


def test_statistics_of_the_batch_do_not_mix_channels():
    graph = traced(Between(nn.BatchNorm2d(12, track_running_stats=False)))
    assert reason_of(graph, "first") is None


def test_grouped_transposed_convolution_stays_whole():
    graph = traced(Between(nn.ConvTranspose2d(12, 12, 2, 2, groups=3)))
    assert "grouped transposed" in str(reason_of(graph, "first"))


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_ranks(dims):
    kinds = {1: (nn.Conv1d, nn.BatchNorm1d, nn.ConvTranspose1d), 3: (nn.Conv3d, nn.BatchNorm3d, nn.ConvTranspose3d)}
    conv, norm, transposed = kinds[dims]
    model = nn.Sequential(
        conv(2, 6, 3), norm(6), conv(6, 6, 3, groups=6), nn.ReLU(), transposed(6, 4, 2), nn.Flatten(), nn.LazyLinear(3)
    )
    x = torch.randn(2, 2, *[7] * dims)
    model(x)
    graph = trace(model.eval(), x)
    made = cut(model, graph, one_channel(graph, 1))
    assert {a.name: a.size for a in graph.prunable} == {"0": 6, "4": 4}
    assert apart(outputs(mask_removed(model, graph, made.architecture), x), outputs(made.model, x)) < 1e-5
    assert CostModel(graph).cost(made.architecture).macs == counted_macs(made.model, x)


def test_windows_folded_into_the_batch_are_counted():
    class Windowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            windows = x.unflatten(2, (2, 4)).unflatten(4, (2, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
            return self.head(self.body(windows).relu().mean((2, 3)).unflatten(0, (-1, 4)).sum(1))

    model = Windowed().eval()
    graph = traced(model)
    assert graph.sizes == {"body": 6}
    assert CostModel(graph).original.macs == 4 * 4 * 9 * 3 * 6 + 6 * 4


def test_products_without_any_channels_are_counted_too():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x.mean(1)
            mixed = torch.baddbmm(x, x, x) + torch.mm(x[0], x[0]) + torch.addmm(x[0], x[0], x[0])
            return self.head(mixed)

    model = Mixer().eval()
    assert CostModel(trace(model, IMAGES)).original == Cost(counted_macs(model, IMAGES), counted_params(model))
