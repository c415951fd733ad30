"""Axes stand where they are computed, also the branches that were made axes of their own."""

import torch
from torch import nn

from secateur.graph import trace, untie
from secateur.models import load_model
from secateur.report import axis_sizes_in_order


class Residual(nn.Module):
    """A stem, a branch of two layers, and a layer behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 6, 1)  # registered before it is run
        self.stem, self.first = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.second, self.head = nn.Conv2d(4, 8, 1), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.second(self.first(x).relu())
        return self.head(self.last(x.relu()).mean((2, 3)))


def test_branches_stand_where_they_are_computed() -> None:
    model = Residual()
    graph = trace(model, torch.zeros(1, 3, 4, 4))
    assert list(axis_sizes_in_order(graph)) == ["stem", "first", "last"]
    untied = untie(model, graph)
    assert list(untied.sizes)[-1] == "second/branch"
    assert list(axis_sizes_in_order(untied)) == ["stem", "first", "second/branch", "last"]
    assert axis_sizes_in_order(untied) == untied.sizes


def test_tied_axes_keep_the_order_of_the_graph() -> None:
    model, _ = load_model("cifar_resnet20")
    graph = trace(model, torch.zeros(1, 3, 32, 32))
    assert list(axis_sizes_in_order(graph)) == list(graph.sizes)
    untied = untie(model, graph)
    names = list(axis_sizes_in_order(untied))
    assert len(names) == len(set(names)) == len(untied.sizes)
    for block in ("layer1.0", "layer2.1", "layer3.2"):
        place = names.index(f"{block}.conv1")
        assert names[place + 1].startswith(f"{block}.conv2")
