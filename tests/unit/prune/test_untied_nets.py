"""Published networks with branches narrower than their streams: exact, and with the predicted cost."""

from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from secateur.architecture import Architecture
from secateur.cost import Cost, CostModel, count_macs, count_params
from secateur.graph import ChannelGraph, trace, untie
from secateur.models import cifar_resnet20, cifar_resnet56
from secateur.prune import ExpandChannels, cut

NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet20": (cifar_resnet20, 32, 9),
    "resnet56": (cifar_resnet56, 16, 27),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 32, 11),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 32, 10),
    "preact": (lambda: timm.create_model("resnetv2_50", num_classes=10), 32, 16 + 4),
    "densenet": (lambda: torchvision.models.densenet121(num_classes=10), 32, 0),
}
"""How to build it, the side of its images, and how many modules are added to a stream."""


def some_of(graph: ChannelGraph, seed: int) -> Architecture:
    """Between half and all of every axis; of branches, of what their streams keep."""
    draw, kept = np.random.default_rng(seed), dict[str, np.ndarray]()
    for axis in sorted(graph.prunable, key=lambda axis: axis.residual_axis is not None):
        stream = kept[axis.residual_axis] if axis.residual_axis else np.arange(axis.size)
        count = draw.integers(max(1, len(stream) // 2), len(stream) + 1)
        kept[axis.name] = draw.choice(stream, count, replace=False)
    return Architecture.of(kept)


@pytest.mark.parametrize("name", NETS)
def test_real_networks_are_cut_exactly(name: str):
    build, side, outlets = NETS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = build().eval(), torch.randn(1, 3, side, side)
    graph = untie(model, trace(model, example))
    assert len({axis.residual_output for axis in graph.prunable if axis.residual_axis}) == outlets
    architecture = some_of(graph, seed=len(name))
    made = cut(model, graph, architecture)
    assert made.architecture == architecture
    assert made.verification.frozen == ()
    assert any(isinstance(module, ExpandChannels) for module in made.model.modules()) == (outlets > 0)
    assert CostModel(graph).cost(architecture) == Cost(count_macs(made.model, example), count_params(made.model))
