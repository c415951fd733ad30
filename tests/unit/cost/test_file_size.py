"""The size of the weights file, against the file."""

import numpy as np
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.architecture import Architecture
from secateur.cost import CostModel, FileSize
from secateur.export import Recipe, save_artifact
from secateur.graph import trace, untie
from secateur.models import load_model
from secateur.prune import apply_architecture, cut


def written(folder, model: nn.Module) -> int:
    save_artifact(
        folder,
        model,
        Recipe(source={"kind": "factory", "name": "x"}, architecture=Architecture(), edits=(), input_shape=(3, 8, 8)),
    )
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize("name", zoo.ZOO)
def test_size_is_that_of_the_file(name: str, tmp_path):
    animal = zoo.ZOO[name]()
    graph = trace(animal.model, animal.example)
    size, costs = FileSize.of(animal.model, graph), CostModel(graph)
    assert (size.axes, size.blocks) == (costs.axes, costs.blocks)
    for number, fraction in enumerate((1, 0.5, 0.1)):
        step = [axis.divisor for axis in graph.prunable]
        widths = [max(int(axis.size * fraction) // d * d, d) for axis, d in zip(graph.prunable, step, strict=True)]
        kept = {axis.name: range(width) for axis, width in zip(graph.prunable, widths, strict=True)}
        gone = [block.name for block in graph.removable] if number == 2 else []
        small = apply_architecture(animal.model, graph, Architecture.of(kept, gone))
        rows = np.array([[int(block not in gone) for block in size.blocks]], dtype=np.int64)
        found = size.of_widths(np.array([widths], dtype=np.int64).reshape(1, -1), rows)
        assert found.tolist() == [written(tmp_path / str(number), small)]


@settings(deadline=None, max_examples=8)
@given(st.data())
def test_size_of_a_residual_net_at_any_widths(tmp_path_factory, data):
    model, _ = load_model("cifar_resnet20", seed=0)
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    kept = {axis.name: range(data.draw(st.integers(1, axis.size))) for axis in graph.prunable}
    gone = data.draw(st.sets(st.sampled_from([block.name for block in graph.removable])))
    costs = CostModel(graph, (FileSize.of(model, graph),))
    architecture = Architecture.of(kept, gone)
    small = apply_architecture(model, graph, architecture)
    assert costs.cost(architecture).size_bytes == written(tmp_path_factory.mktemp("a"), small)


def test_buffers_half_precision_and_tied_weights_count(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.Flatten(), nn.Linear(7 * 36, 5), nn.Linear(5, 5)
    ).eval()
    model.add_module("tied", nn.Linear(5, 5))
    model[5].weight = model[4].weight
    model[1].register_buffer("mask", torch.zeros(4, dtype=torch.bool), persistent=False)
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    model = model.half()
    size = FileSize.of(model, graph)
    widths = np.array([[axis.size for axis in graph.prunable]])
    assert size.of_widths(widths).tolist() == [written(tmp_path / "a", model)]


def test_untied_branches_never_cost_more_than_is_said(tmp_path):
    model, _ = load_model("cifar_resnet20", seed=0)
    example = torch.zeros(1, 3, 8, 8)
    graph = untie(model, trace(model, example))
    size, column = FileSize.of(model, graph), {axis.name: n for n, axis in enumerate(graph.prunable)}
    kept = {axis.name: range(axis.size // 2, axis.size) for axis in graph.prunable}
    for axis in graph.prunable:
        if axis.residual_axis in column:
            kept[axis.name] = range(axis.size // 2, axis.size, 2)
    small = cut(model, graph, Architecture.of(kept)).model
    widths = np.array([[len(kept[axis.name]) for axis in graph.prunable]])
    bound, real = size.of_widths(widths)[0], written(tmp_path / "a", small)
    assert real <= bound <= 1.05 * real


def test_relaxed_size_is_near_and_its_slope_that_of_the_data():
    model, _ = load_model("cifar_resnet20", seed=0)
    graph = trace(model, torch.zeros(1, 3, 8, 8))
    size, costs = FileSize.of(model, graph), CostModel(graph)
    widths = torch.tensor(costs.sizes, dtype=torch.float64, requires_grad=True)
    relaxed = size.of_tensor(widths)
    exact = size.of_widths(costs.sizes[None])[0]
    assert relaxed.item() == pytest.approx(exact, rel=0.01)
    (slope,) = torch.autograd.grad(relaxed, widths)
    fewer = costs.sizes[None] - np.eye(len(costs.sizes), dtype=np.int64)
    params = 4 * (costs.original.params - costs.of_widths(fewer)[1])
    assert (slope.numpy() >= params).all()  # Running statistics go with the parameters.


def test_no_rows_give_none():
    model, _ = load_model("cifar_resnet20", seed=0)
    size = FileSize.of(model, trace(model, torch.zeros(1, 3, 8, 8)))
    assert size.of_widths(np.zeros((0, len(size.axes)), dtype=np.int64)).shape == (0,)
