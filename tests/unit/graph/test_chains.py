"""Chains of residual blocks that follow each other directly."""

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from zoo import ZOO

from secateur.graph import ChannelGraph, trace
from secateur.models import cifar_resnet20


def traced(model: nn.Module, side: int = 32) -> ChannelGraph:
    return trace(model.eval(), torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)))


class Branch(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(6, 9, 1), nn.Tanh(), nn.Conv2d(9, 6, 1))


class Around(nn.Module):
    """A stem, some branches on one stream, and a head."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.stem, self.parts, self.head = nn.Conv2d(3, 6, 1), nn.ModuleList(parts), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x), *self.parts))

    def middle(self, x: Tensor, *parts: nn.Module) -> Tensor:
        raise NotImplementedError


class OneAfterTheOther(Around):
    def middle(self, x, first, between, second):
        x = between(x + first(x))
        return x + second(x)


class InPlace(Around):
    def middle(self, x, first, second):
        x += first(x)
        x += second(x)
        return x


class Parallel(Around):
    """Both read the same; the second is added to the sum of the first."""

    def middle(self, x, first, second):
        return x + first(x) + second(x)


class Forked(Around):
    def middle(self, x, trunk, left, right):
        x = x + trunk(x)
        return torch.tanh(x + left(x)) * (x + right(x))


def chains(graph: ChannelGraph) -> list[list[str]]:
    return [[block.name for block in chain] for chain in graph.chains]


def test_chains_of_a_cifar_resnet_are_its_stages_without_the_blocks_that_halve():
    assert chains(traced(cifar_resnet20())) == [
        ["layer1.0", "layer1.1", "layer1.2"],
        ["layer2.1", "layer2.2"],
        ["layer3.1", "layer3.2"],
    ]


def test_attention_and_mlp_of_a_transformer_are_one_chain():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, depth=3)
    assert chains(traced(model)) == [[f"blocks.{n}.{part}" for n in range(3) for part in ("attn", "mlp")]]


def test_chains_of_mobilenet_v2_end_where_the_width_changes():
    found = chains(traced(torchvision.models.mobilenet_v2(weights=None)))
    assert found == [[f"features.{n}" for n in run] for run in ([3], [5, 6], [8, 9, 10], [12, 13], [15, 16])]


@pytest.mark.parametrize(("name", "found"), [("preact_residual", [["1", "2"]]), ("residual", [["1"], ["3"]])])
def test_chains_of_the_zoo(name, found):
    assert chains(trace(*ZOO[name]())) == found


@pytest.mark.parametrize(
    ("between", "follows"),
    [(nn.Identity(), True), (nn.Dropout(), True), (nn.ReLU(), False), (nn.BatchNorm2d(6), False)],
)
def test_a_block_follows_another_where_their_values_are_the_same(between, follows):
    first, second = traced(OneAfterTheOther(Branch(), between, Branch()), 8).blocks
    assert first.follows is None
    assert second.follows == (first.name if follows else None)


@pytest.mark.parametrize("net", [InPlace, Parallel])
def test_the_second_of_two_sums_follows_the_first(net):
    """Whatever the branches read, and wherever the sum is written."""
    first, second = traced(net(Branch(), Branch()), 8).blocks
    assert (first.follows, second.follows) == (None, first.name)


def test_of_two_blocks_that_follow_the_same_one_the_first_goes_on_with_its_chain():
    graph = traced(Forked(Branch(), Branch(), Branch()), 8)
    trunk, left, right = graph.blocks
    assert [block.follows for block in graph.blocks] == [None, trunk.name, trunk.name]
    assert graph.chains == ((trunk, left), (right,))


def test_a_block_that_must_stay_ends_a_chain():
    graph = traced(cifar_resnet20()).with_kept_blocks({"layer1.1": "because"})
    assert graph.blocks_by_name["layer1.2"].follows == "layer1.1"
    assert chains(graph)[:2] == [["layer1.0"], ["layer1.2"]]
