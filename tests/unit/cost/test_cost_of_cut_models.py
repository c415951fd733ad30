"""The formula against the really cut model, counted by running it: nets of every kind and real ones."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.cost import Cost, CostModel, counted_macs, counted_params
from secateur.graph import ChannelGraph, trace
from secateur.models import cifar_resnet20
from secateur.search import SearchSpace
from secateur.surgery import apply_architecture

pytestmark = pytest.mark.window


def random_architecture(graph: ChannelGraph, seed: int) -> Architecture:
    generator = np.random.default_rng(seed)
    widths = [generator.choice(levels) for levels in SearchSpace().levels(graph)]
    return Architecture.of(
        {
            axis.name: generator.choice(axis.size, width, replace=False)
            for axis, width in zip(graph.prunable, widths, strict=True)
        }
    )


def check(model: nn.Module, example: torch.Tensor, seeds: range) -> None:
    graph = trace(model, example)
    costs = CostModel(graph)
    assert costs.original == Cost(counted_macs(model, example), counted_params(model))
    for seed in seeds:
        architecture = random_architecture(graph, seed)
        cut = apply_architecture(model, graph, architecture)
        assert costs.cost(architecture) == Cost(counted_macs(cut, example), counted_params(cut))


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    model, example = ZOO[name]()
    check(model, example, range(3))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "shufflenet_v2_x0_5", "resnext50_32x4d"])
def test_torchvision(name):
    with torch.random.fork_rng(devices=[]):
        model = torchvision.models.get_model(name, weights=None).eval()
    check(model, torch.zeros(1, 3, 32, 32), range(1))


def test_cifar_resnet():
    check(cifar_resnet20().eval(), torch.zeros(1, 3, 32, 32), range(2))
