"""Networks people use, untrained but loud: traced, cut at random, exact, and not frozen more than they must be."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cuts import apart, one_channel, outputs, random_architecture
from torch import Tensor, nn
from zoo import _loud

from secateur.cost import Cost, CostModel, counted_macs, counted_params
from secateur.graph import ChannelGraph, trace
from secateur.models import cifar_resnet20
from secateur.surgery import apply_architecture, cut, mask_removed, parameter_share

pytestmark = pytest.mark.window


def torchvision(name: str, **settings: object) -> nn.Module:
    from torchvision.models import get_model

    return get_model(name, weights=None, num_classes=10, **settings)


def timm(name: str, **settings: object) -> nn.Module:
    from timm import create_model

    return create_model(name, num_classes=10, **settings)


def small_vgg() -> nn.Module:
    """VGG-11 with a narrow classifier: its 120 M parameters prove nothing that 1 M do not."""
    from torchvision.models.vgg import VGG, cfgs, make_layers

    model = VGG(make_layers([max(1, c // 4) if isinstance(c, int) else c for c in cfgs["A"]], batch_norm=True), 10)
    model.classifier = nn.Sequential(nn.Linear(128 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))
    return model


NETS: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "cifar_resnet20": (cifar_resnet20, 32, 0.999),
    "resnet18": (partial(torchvision, "resnet18"), 64, 0.999),
    "vgg11_bn": (small_vgg, 32, 0.999),
    "densenet121": (partial(torchvision, "densenet121"), 32, 0.999),
    "mobilenet_v2": (partial(torchvision, "mobilenet_v2"), 32, 0.999),
    "mobilenet_v3_small": (partial(torchvision, "mobilenet_v3_small"), 32, 0.999),
    "efficientnet_b0": (partial(torchvision, "efficientnet_b0"), 32, 0.999),
    "resnext50_32x4d": (partial(torchvision, "resnext50_32x4d"), 32, 0.999),
    "shufflenet_v2_x0_5": (partial(torchvision, "shufflenet_v2_x0_5"), 32, 0.99),
    "regnet_y_400mf": (partial(torchvision, "regnet_y_400mf"), 32, 0.999),
    "squeezenet1_1": (partial(torchvision, "squeezenet1_1"), 64, 0.99),
    "timm_resnet18": (partial(timm, "resnet18"), 32, 0.999),
    "timm_mobilenetv3": (partial(timm, "mobilenetv3_small_050"), 32, 0.998),
    "timm_repvgg": (partial(timm, "repvgg_a0"), 32, 0.999),
    "timm_ghostnet": (partial(timm, "ghostnet_050"), 32, 0.999),
    "timm_cspnet": (partial(timm, "cspresnet50"), 64, 0.99),
    "timm_res2net": (partial(timm, "res2net50_14w_8s"), 32, 0.999),
    "timm_levit": (partial(timm, "levit_128s"), 224, 0.95),
}
"""Builder, image size, and the least share of parameters with a dimension that can be cut."""

PARTLY: dict[str, tuple[Callable[[], nn.Module], int, float]] = {
    "convnextv2": (partial(timm, "convnextv2_atto"), 64, 0.0),
    "edgenext": (partial(timm, "edgenext_xx_small"), 64, 0.6),
    "efficientvit": (partial(timm, "efficientvit_b0"), 64, 0.6),
    "mobilevit": (partial(timm, "mobilevit_xxs"), 64, 0.7),
    "nfnet": (partial(timm, "eca_nfnet_l0"), 64, 0.15),
    "poolformer": (partial(timm, "poolformer_s12"), 64, 0.75),
    "pvt": (partial(timm, "pvt_v2_b0"), 64, 0.4),
    "swin": (partial(timm, "swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1)), 224, 0.3),
    "vit": (partial(timm, "vit_tiny_patch16_224", depth=2, img_size=64), 64, 0.5),
    "xcit": (partial(timm, "xcit_nano_12_p16_224", depth=2, img_size=64), 64, 0.5),
}
"""Nets with layer norms, attention or standardised weights: part of them stays, the rest must still be right."""


def loud(build: Callable[[], nn.Module], size: int) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _loud(build(), 1), torch.randn(1, 3, size, size)


def check(model: nn.Module, example: Tensor, graph: ChannelGraph, seed: int) -> None:
    architecture = random_architecture(graph, seed)
    made = cut(model, graph, architecture)
    assert made.verification.frozen == ()
    assert made.architecture == architecture
    assert CostModel(graph).cost(architecture) == Cost(counted_macs(made.model, example), counted_params(made.model))
    other = torch.randn(example.shape, generator=torch.Generator().manual_seed(seed)).double()
    masked = mask_removed(model, graph, architecture).double()
    assert apart(outputs(masked, other), outputs(made.model.double(), other)) < 1e-9


@pytest.mark.parametrize("name", NETS)
def test_convolutional_networks_are_cut_exactly_and_wholly(name):
    build, size, share = NETS[name]
    model, example = loud(build, size)
    graph = trace(model, example)
    assert parameter_share(graph) >= share
    check(model, example, graph, seed=0)
    narrow = apply_architecture(model, graph, one_channel(graph))
    assert counted_params(narrow) == CostModel(graph).cost(one_channel(graph)).params
    assert all(tensor.isfinite().all() for tensor in outputs(narrow, example))


@pytest.mark.parametrize("name", PARTLY)
def test_other_networks_are_cut_exactly_where_they_can_be(name):
    build, size, share = PARTLY[name]
    model, example = loud(build, size)
    graph = trace(model, example)
    assert parameter_share(graph) >= share
    assert all(axis.frozen_because for axis in graph.axes if axis not in graph.prunable)
    check(model, example, graph, seed=0)
