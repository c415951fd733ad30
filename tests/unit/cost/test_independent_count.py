"""The MACs of the formula against a counter that shares nothing with the package, over every net there is."""

import pytest
import timm
import torch
import torchvision
from cuts import random_architecture, zoo_net
from macs_by_hand import macs_by_hand
from operation_nets import MODULES, OPS, Between, example_of
from torch import nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.cost import CostModel
from secateur.graph import ChannelGraph, trace
from secateur.prune import apply_architecture


def check(model: nn.Module, example: torch.Tensor, graph: ChannelGraph, seed: int = 0) -> None:
    """Whole, cut at random, and with two channels of every axis; with one, `einsum` scales in place of multiplying."""
    costs = CostModel(graph)
    assert graph.uncounted == ()
    assert costs.original.macs == macs_by_hand(model, example[:1])
    two = Architecture.of({axis.name: range(min(2, axis.size)) for axis in graph.prunable})
    for architecture in (random_architecture(graph, seed), two):
        small = apply_architecture(model, graph, architecture).eval()
        assert costs.cost(architecture).macs == macs_by_hand(small, example[:1])


@pytest.fixture(autouse=True)
def _whole_attention():
    """The fast path of attention is one operation of which no part is seen."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", ZOO)
def test_every_net_of_the_zoo(name: str):
    check(*zoo_net(name))


WITH_PARAMETERS = {
    "Bilinear", "Embedding", "EmbeddingBag", "MultiheadAttention", "TransformerEncoderLayer", "Conv3d", "LSTM",
    "ConvTranspose2d", "GRU", "RNN", "LSTMCell", "PReLU", "RMSNorm", "DeformConv2d", "SqueezeExcitation",
    "FeaturePyramidNetwork", "FrozenBatchNorm2d", "MLP",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WITH_PARAMETERS))
def test_operations_with_parameters(name: str):
    case = {**MODULES, **OPS}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Between(case).eval()
    check(model, example_of(case), trace(model, example_of(case)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "mobilenet_v3_small", "efficientnet_b0", "googlenet", "inception_v3", "shufflenet_v2_x0_5"),
        *("densenet121", "squeezenet1_1", "convnext_tiny", "swin_t", "vit_b_16", "regnet_y_400mf", "mnasnet0_5"),
        *("maxvit_t", "alexnet"),
    ],
)
def test_networks_of_torchvision(name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        more = {"init_weights": False, "aux_logits": True} if name in {"googlenet", "inception_v3"} else {}
        model = torchvision.models.get_model(name, weights=None, **more).eval()
    example = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    check(model, example, trace(model, example))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilevit_xxs", "pvt_v2_b0", "coat_lite_tiny", "mixer_s32_224", "gmlp_s16_224", "edgenext_xx_small"]
)
def test_networks_of_timm(name: str):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
    example = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    check(model, example, trace(model, example))
