"""Residual blocks: which are found, in all the ways to write them, and which are not removable."""

from functools import cache

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from zoo import ZOO

from secateur.graph import ChannelGraph, Replacement, StandIn, trace
from secateur.models import cifar_resnet20

THROUGH, SILENT = StandIn.PASS_THROUGH, StandIn.SILENCE


def traced(model: nn.Module, side: int = 32) -> ChannelGraph:
    return trace(model.eval(), torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)))


def names(model: nn.Module, side: int = 32) -> list[str]:
    return [block.name for block in traced(model, side).blocks]


@cache
def in_zoo(name: str) -> ChannelGraph:
    return trace(*ZOO[name]())


@pytest.mark.parametrize(
    ("name", "blocks"),
    {
        "residual": ["1", "3"],
        "preact_residual": ["1", "2"],
        "option_a_residual": ["1", "3"],
        "inverted_residual_se": ["1", "2"],
        "layer_scale": ["1", "2"],
        "nested": ["parts.body"],
        "branching": ["body"],
        "attention": ["block.attention", "block.mlp"],
        "grouped_query_attention": ["block.attention", "block.mlp"],
    }.items(),
)
def test_blocks_of_the_zoo(name, blocks):
    assert [block.name for block in in_zoo(name).blocks] == blocks


def test_zoo_nets_without_residual_branches_have_no_blocks():
    """Chains, dense and split nets, projections in both summands, sums of parallel branches."""
    without = {name for name in ZOO if not in_zoo(name).blocks}
    assert {"plain", "dense", "multi_branch_add", "shuffle_v2", "shared_weights", "tied_parameter"} <= without
    assert len(without) == len(ZOO) - 9


def test_cifar_resnet20_has_all_but_the_two_option_a_shortcuts():
    found = names(cifar_resnet20())
    assert found == [f"layer{stage}.{n}" for stage in (1, 2, 3) for n in range(3) if stage == 1 or n]


def test_resnet18_has_the_blocks_without_projection():
    found = names(torchvision.models.resnet18(weights=None))
    assert found == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]


def test_mobilenet_v2_has_its_ten_inverted_residuals():
    model = torchvision.models.mobilenet_v2(weights=None)
    wanted = [f"features.{n}" for n, part in enumerate(model.features) if getattr(part, "use_res_connect", False)]
    assert names(model) == wanted
    assert len(wanted) == 10


def test_convnext_has_every_block():
    model = timm.create_model("convnext_atto", pretrained=False)
    graph = traced(model, 64)
    assert len(graph.blocks) == sum(type(m).__name__ == "ConvNeXtBlock" for m in model.modules()) == 12
    assert all(block.replacements == (Replacement(block.name, THROUGH),) for block in graph.blocks)


def test_a_transformer_has_two_blocks_per_layer():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=3)
    assert names(model) == [f"blocks.{n}.{part}" for n in range(3) for part in ("attn", "mlp")]


def test_attention_that_returns_a_tuple_is_silenced_as_one():
    model = torchvision.models.vision_transformer.EncoderBlock(2, 8, 16, 0.0, 0.0)
    graph = trace(nn.Sequential(nn.Linear(3, 8), model, nn.Linear(8, 4)).eval(), torch.randn(1, 5, 3))
    first = graph.blocks_by_name["1.self_attention"]
    assert first.replacements == (Replacement("1.ln_1", THROUGH), Replacement("1.self_attention", SILENT, items=2))


@pytest.mark.parametrize("build", [torchvision.models.densenet121, torchvision.models.vgg11])
def test_nets_without_additions_have_none(build):
    assert names(build(weights=None)) == []


class Around(nn.Module):
    """A block between two convolutions that no residual branch may hold."""

    def __init__(self, middle: nn.Module):
        super().__init__()
        self.stem, self.middle, self.head = nn.Conv2d(3, 6, 1), middle, nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)))


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.up, self.down = nn.Conv2d(6, 9, 1), nn.Conv2d(9, 6, 1)


class InPlace(Parts):
    def forward(self, x):
        x += self.down(torch.relu(self.up(self.norm(x))))
        return x


class Rectified(Parts):
    """The ReLU behind the sum changes x, which is not the output of one: the module must stay, its layers go."""

    def forward(self, x):
        return torch.relu_(self.down(torch.relu(self.up(x))) + x)


class InPlaceBefore(Parts):
    """The shortcut is what the in-place ReLU left in x."""

    def forward(self, x):
        torch.relu_(x)
        return self.down(torch.relu(self.up(x))).add_(x)


class UsedTwice(Parts):
    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        return (x + y) * torch.sigmoid(y)


class Scaled(Parts):
    """Not x itself, but twice x, is passed on."""

    def forward(self, x):
        return 2 * x + self.down(torch.relu(self.up(x)))


class Subtracted(Parts):
    def forward(self, x):
        return torch.add(self.down(torch.relu(self.up(x))), x, alpha=-1)


class Shifted(Parts):
    """Behind the last layer something is added that is not zero."""

    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.ones(1, 6, 1, 1))

    def forward(self, x):
        y = self.down(torch.relu(self.up(x))) + self.offset
        return torch.relu(x + y)


class Folded(Parts):
    """What runs between the layers takes the inner shape only: no stand-in may hand on another one."""

    def forward(self, x):
        y = self.up(x)
        y = y.view(x.shape[0], 3, 3, *x.shape[2:]).transpose(1, 2).reshape(y.shape)
        return torch.relu(x + self.down(y))


class Projected(Parts):
    def __init__(self):
        super().__init__()
        self.side = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return self.side(x) + self.down(torch.relu(self.up(x)))


class Gated(Parts):
    """Half of x remains if the gate gives zero: the branch is not zero."""

    def forward(self, x):
        return torch.relu(x + x * torch.sigmoid(self.down(self.up(x))))


class Parallel(Parts):
    """Two branches of one stream, added one after the other."""

    def __init__(self):
        super().__init__()
        self.side = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(torch.relu(self.up(y))) + self.side(y)


class Twice(Parts):
    """The same layers run in two places."""

    def forward(self, x):
        x = x + self.down(self.up(x))
        return x + self.down(self.up(x))


class Conditioned(Parts):
    """The branch reads more than x."""

    def forward(self, x):
        context = x.mean((2, 3), keepdim=True)
        y = torch.relu(x + self.side(context)) if hasattr(self, "side") else self.norm(x)
        return y + self.down(self.up(y * context))


class Pair(nn.Module):
    """Returns its input's shape beside a tensor."""

    def __init__(self, second):
        super().__init__()
        self.conv, self.second = nn.Conv2d(6, 6, 1), second

    def forward(self, x):
        y = self.conv(x)
        return y, self.second(y)


class Paired(nn.Module):
    """What a module returns beside the tensor that is added may be needed, and a stand-in cannot give it."""

    def __init__(self, second, *, needed):
        super().__init__()
        self.pair, self.needed = Pair(second), needed

    def forward(self, x):
        y, other = self.pair(x)
        return torch.relu(x + y) + (other if self.needed else 0)


@pytest.mark.parametrize(
    ("middle", "blocks"),
    [
        (Paired(lambda y: None, needed=False), ["middle"]),
        (Paired(torch.tanh, needed=False), ["middle"]),
        (Paired(torch.tanh, needed=True), []),
        (Paired(lambda y: 3, needed=True), []),
    ],
)
def test_modules_that_return_more_than_a_tensor(middle, blocks):
    found = traced(Around(middle), 8).blocks
    assert [block.name for block in found] == blocks
    assert all(block.replacements == (Replacement("middle.pair", SILENT, items=2),) for block in found)


@pytest.mark.parametrize(
    ("middle", "replacements"),
    [
        (InPlace, {"middle": THROUGH}),
        (Rectified, {"middle.up": THROUGH, "middle.down": SILENT}),
        (InPlaceBefore, {"middle.up": THROUGH, "middle.down": SILENT}),
        (Conditioned, {"middle.up": THROUGH, "middle.down": SILENT}),
    ],
)
def test_how_a_branch_may_be_written(middle, replacements):
    (block,) = traced(Around(middle()), 8).blocks
    assert {r.module: r.stand_in for r in block.replacements} == replacements
    assert block.name == "middle"


@pytest.mark.parametrize("middle", [UsedTwice, Scaled, Subtracted, Shifted, Folded, Projected, Gated, Twice])
def test_what_is_not_a_removable_block(middle):
    assert traced(Around(middle()), 8).blocks == ()


def test_parallel_branches_are_blocks_of_their_own():
    blocks = traced(Around(Parallel()), 8).blocks
    assert [[r.module for r in block.replacements] for block in blocks] == [
        ["middle.up", "middle.down"],
        ["middle.side"],
    ]


def test_the_whole_net_is_not_a_block():
    class Denoiser(Parts):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Conv2d(3, 9, 1), nn.Conv2d(9, 3, 1)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    assert traced(Denoiser(), 8).blocks == ()


def test_operations_and_tensors_know_their_blocks():
    graph = in_zoo("attention")
    inside = {op.module: op.blocks for op in graph.operations if op.blocks}
    assert {module.split(".")[1] for module in inside} == {"attention", "mlp"}
    block = graph.blocks_by_name["block.mlp"]
    assert all(name.startswith(("block.mlp.", "block.norm2.")) for name in block.tensors)
    assert set(block.modules) >= {"block.norm2", "block.mlp"}
    assert all(op.blocks == () for op in graph.operations if not op.module.startswith("block."))


def test_blocks_within_blocks():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = InPlace(), nn.Conv2d(6, 6, 1)

        def forward(self, x):
            return x + self.last(self.inner(self.last.weight.new_zeros(()) + torch.tanh(x)))

    graph = traced(Around(Stage()), 8)
    assert [block.name for block in graph.blocks] == ["middle.inner", "middle"]
    by_module = {op.module: op.blocks for op in graph.operations}
    assert by_module["middle.inner.up"] == ("middle.inner", "middle")
    assert by_module["middle.last"] == ("middle",)


def test_a_block_that_must_stay_says_so():
    graph = in_zoo("residual")
    kept = graph.with_kept_blocks({"1": "because"}).with_kept_blocks({"1": "another reason"})
    assert kept.blocks_by_name["1"].kept_because == "because"
    assert [block.name for block in kept.removable] == ["3"]
    assert [block.name for block in graph.removable] == ["1", "3"]


def test_a_branch_whose_numbers_python_reads_stays():
    class Watched(Parts):
        def forward(self, x):
            y = self.down(torch.relu(self.up(x)))
            return x + y if float(y.sum()) < 1e9 else x

    assert traced(Around(Watched()), 8).blocks == ()
