"""Latency from a table: equal to a sum that is written out, exact for what it was fitted to, and differentiable."""

import numpy as np
import pytest
import torch
import zoo
from torch import nn

from secateur.architecture import Architecture
from secateur.cost import CostModel, LatencyModel, TimeGrid, count_macs, layer_extents, timeable_operations
from secateur.graph import trace
from secateur.prune import apply_architecture


class Net(nn.Module):
    """Two convolutions, a residual block, a classifier, and a product of two activations."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 32, 1)
        self.back = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        x = x + self.back(self.inner(x).relu())
        flat = x.flatten(2)
        return self.head(x.mean((2, 3)) + (flat @ flat.transpose(1, 2) @ flat).mean(2))


EXAMPLE = torch.zeros(1, 3, 4, 4)


def made() -> tuple[nn.Module, object]:
    torch.manual_seed(0)
    model = Net().eval()
    return model, trace(model, EXAMPLE)


def proportional(graph, seconds_per_mac: float = 1e-9) -> dict[str, TimeGrid]:
    """Times that are a constant per layer plus so much per weight."""
    found = {}
    for name in timeable_operations(graph):
        out, read = (extent.at(graph.sizes) for extent in layer_extents(graph, name))
        outs, reads = np.unique([16, out]), np.unique([16, read])
        found[name] = TimeGrid(outs, reads, 1e-6 + seconds_per_mac * outs[:, None] * reads[None, :])
    return found


def test_layers_with_one_operation_and_a_weight_can_be_timed():
    _, graph = made()
    assert list(timeable_operations(graph)) == ["first", "inner", "back", "head"]


def test_seconds_are_the_sum_that_the_docstring_says():
    model, graph = made()
    latency = LatencyModel.of(graph, proportional(graph))
    latency = LatencyModel(**{**latency.__dict__, "coefficients": (1.5, 2e-9, 3e-9, 4e-6), "factor": 0.5})
    widths = np.array([[16, 16]]) if len(latency.axes) == 2 else latency.sizes[None]
    column = {name: number for number, name in enumerate(latency.axes)}
    widths[0, column["inner"]] = 24
    architecture = Architecture.of({"inner": range(24)})
    small = apply_architecture(model, graph, architecture)
    layers = sum(1e-6 + 1e-9 * out * read for out, read in ((16, 3), (24, 16), (16, 24), (5, 16)))
    timed = sum(4 * 4 * out * read * k for out, read, k in ((16, 3, 9), (24, 16, 1), (16, 24, 1))) + 5 * 16
    others = count_macs(small, EXAMPLE) - timed
    assert others == 2 * 16 * 16 * 16
    elements = 16 * 16 + 24 * 16 + 16 * 16 + 5
    assert latency.of_widths(widths) == pytest.approx([0.5 * (1.5 * layers + 2e-9 * others + 3e-9 * elements + 4e-6)])


def test_a_removed_block_takes_its_layers_along():
    _, graph = made()
    latency = LatencyModel.of(graph, proportional(graph))
    assert latency.blocks
    there, gone = latency.of_widths(np.repeat(latency.sizes[None], 2, 0), np.array([[1], [0]]))
    assert there - gone == pytest.approx(2 * (1e-6 + 1e-9 * 16 * 32))
    shallow = latency.terms(latency.sizes[None], np.array([[0]]))[0]
    assert shallow[2] == 16 * 16 + 5


@pytest.mark.parametrize("name", zoo.ZOO)
def test_conventions_are_those_of_the_cost_model(name: str):
    animal = zoo.ZOO[name]()
    graph = trace(animal.model, animal.example)
    latency, costs = LatencyModel.of(graph, {}), CostModel(graph)
    assert (latency.axes, latency.blocks) == (costs.axes, costs.blocks)
    # With no layer timed alone, what is left is all MACs.
    widths = np.maximum(costs.sizes[None] // np.array([[1], [2]]), 1)
    assert latency.terms(widths)[:, 1].tolist() == costs.of_widths(widths)[0].tolist()
    assert latency.of_widths(np.zeros((0, len(costs.axes)), dtype=np.int64)).shape == (0,)


def test_coefficients_are_found_again():
    _, graph = made()
    plain = LatencyModel.of(graph, proportional(graph))
    truth = LatencyModel(**{**plain.__dict__, "coefficients": (1.0, 0.0, 2e-8, 3e-6)})
    generator = np.random.default_rng(1)
    widths = generator.integers(1, plain.sizes + 1, (12, len(plain.axes)))
    fitted = plain.fitted(widths, truth.of_widths(widths))
    assert fitted.of_widths(widths) == pytest.approx(truth.of_widths(widths), rel=1e-6)
    assert min(fitted.coefficients) >= 0


def test_one_measurement_fits_too_and_scaling_multiplies():
    _, graph = made()
    plain = LatencyModel.of(graph, proportional(graph))
    fitted = plain.fitted(plain.sizes[None], np.array([7e-3]))
    assert fitted.of_widths(plain.sizes[None]) == pytest.approx([7e-3], rel=0.02)
    assert fitted.scaled(2).scaled(1.5).of_widths(plain.sizes[None]) == pytest.approx(
        3 * fitted.of_widths(plain.sizes[None])
    )


def test_relaxed_latency_agrees_at_aligned_widths_and_has_a_gradient():
    _, graph = made()
    latency = LatencyModel.of(graph, proportional(graph))
    latency = LatencyModel(**{**latency.__dict__, "coefficients": (1.0, 1e-9, 1e-9, 1e-6)})
    sizes = torch.tensor(latency.sizes, dtype=torch.float64, requires_grad=True)
    blocks = torch.ones(len(latency.blocks), dtype=torch.float64, requires_grad=True)
    seconds = latency.of_tensor(sizes, blocks)
    assert seconds.item() == pytest.approx(latency.of_widths(latency.sizes[None])[0])
    assert latency.of_tensor(sizes).item() == pytest.approx(seconds.item())
    slopes = torch.autograd.grad(seconds, (sizes, blocks))
    assert all(bool((slope >= 0).all()) and float(slope.max()) > 0 for slope in slopes)
    gone = latency.of_widths(latency.sizes[None], np.zeros((1, len(latency.blocks)), dtype=np.int64))[0]
    assert slopes[1].item() == pytest.approx(seconds.item() - gone)
    inside = torch.tensor(latency.sizes * 0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(latency.of_tensor, (inside, blocks))


@pytest.mark.parametrize("wrong", [np.ones((2, 9), dtype=np.int64), np.ones(2), np.ones((1, 2)) * 0.5])
def test_widths_are_checked(wrong: np.ndarray):
    _, graph = made()
    with pytest.raises(ValueError, match="`widths` must be whole numbers of shape"):
        LatencyModel.of(graph, {}).of_widths(wrong)
