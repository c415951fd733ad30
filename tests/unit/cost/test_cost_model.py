import sys

import numpy as np
import pytest
import torch
from hand_graphs import HAND_GRAPHS, Concat, Flat, Plain, concat, depthwise, flat, plain, residual
from torch import nn

from secateur.architecture import Architecture
from secateur.cost import Cost, CostModel, count_macs, count_params, format_count
from secateur.errors import BudgetError, SurgeryError
from secateur.graph import ChannelAxis, ChannelGraph, Extent, Operation, trace

pytestmark = pytest.mark.window


@pytest.mark.parametrize("make", HAND_GRAPHS.values(), ids=HAND_GRAPHS)
def test_whole_model_costs_what_is_counted_by_running_it(make):
    model, graph = make()
    original = CostModel(graph).original
    assert original.params == count_params(model)
    assert original.macs == count_macs(model, torch.zeros(graph.example_shape))


@pytest.mark.parametrize(("first", "second"), [(1, 1), (3, 7), (8, 11)])
def test_narrow_model_costs_what_a_model_built_narrow_counts(first, second):
    _, graph = plain()
    built = Plain(first, second)
    cost = CostModel(graph).cost(Architecture.of({"conv1": range(first), "conv2": range(second)}))
    assert cost == Cost(count_macs(built, torch.zeros(1, 3, 8, 8)), count_params(built))


def test_flatten_multiplies_the_width():
    model = CostModel(flat()[1])
    assert model.cost(Architecture.of({"conv": [0, 5]})).params == 2 * 9 + 2 + 7 * 2 * 16 + 7


def test_one_extent_of_several_axes_adds_up():
    cost = CostModel(concat()[1]).cost(Architecture.of({"a": [1], "b": [0, 3], "c": [2, 4]}))
    assert cost.macs == 36 * (1 * 3 * 9 + 2 * 3 + 2 * 3 * 9) + 2 * 4
    assert cost.params == (27 + 1) + (6 + 2) + (2 * 3 * 9 + 2) + (2 * 4 + 4)


def test_depthwise_is_linear_in_its_width():
    cost = CostModel(depthwise()[1]).cost(Architecture.of({"expand": range(5)}))
    assert cost.macs == 36 * (5 * 3 + 5 * 9 + 4 * 5) + 12


@pytest.mark.parametrize("make", HAND_GRAPHS.values(), ids=HAND_GRAPHS)
def test_many_widths_at_once_equal_one_at_a_time(make):
    graph = make()[1]
    model = CostModel(graph)
    widths = np.random.default_rng(0).integers(1, model.sizes + 1, size=(50, len(model.axes)))
    macs, params = model.of_widths(widths)
    assert macs.dtype == params.dtype == np.int64
    for row, m, p in zip(widths, macs, params, strict=True):
        values = dict(zip(model.axes, map(int, row), strict=True))
        assert m == sum(op.factor * np.prod([e.at(values) for e in op.extents]) for op in graph.operations)
        assert p == sum(int(np.prod([e.at(values) for e in graph.tensors[n]])) for n in graph.parameters)


def test_large_batches_of_widths_are_evaluated_in_pieces():
    model = CostModel(residual()[1])
    widths = np.tile(np.array([[8, 6], [4, 3]]), (5000, 1))
    macs, _ = model.of_widths(widths)
    assert macs.shape == (10_000,)
    assert (macs[::2] == model.original.macs).all()
    assert (macs[1::2] == macs[1]).all()


def test_no_widths_no_costs():
    macs, params = CostModel(plain()[1]).of_widths(np.zeros((0, 2), dtype=np.int64))
    assert macs.shape == params.shape == (0,)


def test_fractional_factors_are_exact():
    third = Operation("m", "convolution", 1 / 3, (Extent(0, (("a", 1),)), Extent(0, (("a", 1),))))
    graph = ChannelGraph((ChannelAxis("a", 3_000_000, ()),), (third,) * 3, {}, (), (), {}, ())
    macs, _ = CostModel(graph).of_widths(np.array([[3_000_000], [999_999]]))
    assert macs.tolist() == [3_000_000**2, 999_999**2]


def test_counts_beyond_floats_stay_exact():
    square = Operation("m", "convolution", 1.0, (Extent(1, (("a", 1),)), Extent(0, (("a", 1),))))
    graph = ChannelGraph((ChannelAxis("a", 2**31, ()),), (square,), {}, (), (), {}, ())
    assert CostModel(graph).of_widths(np.array([[2**31 - 1]]))[0][0] == 2**31 * (2**31 - 1)


def test_tensor_version_agrees_and_its_gradient_is_the_slope():
    model = CostModel(concat()[1])
    widths = torch.tensor([[4.0, 5.0, 6.0], [1.0, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    macs, params = model.of_widths(widths.detach().numpy().astype(np.int64))
    assert model.macs_of(widths).tolist() == macs.tolist()
    assert model.params_of(widths).tolist() == params.tolist()
    model.macs_of(widths)[1].backward()
    # d macs / d width a = 36 positions * (3 inputs * 9 kernel positions + 9 kernel positions * 3 outputs of c)
    assert widths.grad[1, 0].item() == 36 * (27 + 9 * 3)
    assert widths.grad[0].abs().sum() == 0


def test_tensor_version_gradient_at_zero_width_is_finite():
    widths = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    CostModel(concat()[1]).macs_of(widths).backward()
    assert torch.isfinite(widths.grad).all()


def test_tensor_version_takes_any_leading_shape_and_dtype():
    model = CostModel(concat()[1])
    values = model.macs_of(torch.ones(2, 4, 3, dtype=torch.float32))
    assert values.shape == (2, 4)
    assert values.dtype == torch.float32


@pytest.mark.parametrize("widths", [np.ones((2, 3), int), np.ones(2, int), np.ones((1, 2))])
def test_wrong_widths_are_refused(widths):
    with pytest.raises(ValueError, match=r"`widths` must be whole numbers of shape \(n, 2\)"):
        CostModel(plain()[1]).of_widths(widths)


def test_unknown_axis_is_refused():
    with pytest.raises(SurgeryError, match="must name prunable axes of this graph; got 'nowhere'"):
        CostModel(plain()[1]).cost(Architecture.of({"nowhere": [0]}))


def test_frozen_axes_may_be_named_if_they_are_whole():
    graph = plain()[1].with_frozen({"conv1": "a test says so"})
    model = CostModel(graph)
    assert model.axes == ("conv2",)
    assert model.cost(Architecture.of({"conv1": range(8), "conv2": [0]})) == model.cost(Architecture.of({"conv2": [0]}))
    with pytest.raises(SurgeryError, match="must name prunable axes of this graph; got 'conv1'"):
        model.cost(Architecture.of({"conv1": range(7)}))


def test_channel_beyond_the_axis_is_refused():
    with pytest.raises(SurgeryError, match="must keep channels 0 to 7 of axis 'conv1'; got 8"):
        CostModel(plain()[1]).cost(Architecture.of({"conv1": [0, 8]}))


def test_counting_leaves_the_model_and_the_random_state_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    assert count_macs(model, torch.randn(7, 3, 5, 5, generator=torch.Generator().manual_seed(0))) == 4 * 3 * 25
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_attention_is_counted_without_its_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    enabled = torch.backends.mha.get_fastpath_enabled()
    # 5 tokens: q, k, v and output projections, scores and their use, two linears
    assert count_macs(layer, torch.zeros(1, 5, 8)) == 5 * 8 * 8 * 4 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def test_several_inputs_are_counted():
    class Two(nn.Module):
        def forward(self, x, y):
            return x @ y.T

    assert count_macs(Two(), (torch.zeros(4, 3), torch.zeros(4, 3))) == 3


def test_shared_parameters_count_once():
    first = nn.Linear(3, 3, bias=False)
    assert count_params(nn.Sequential(first, first)) == 9


def test_cost_round_trips_through_json():
    for cost in (Cost(12, 3), Cost(12, 3, size_bytes=100), Cost(12, 3, size_bytes=100, latency_s=0.5)):
        assert Cost.from_json(cost.to_json()) == cost
    assert Cost(12, 3).to_json() == {"macs": 12, "params": 3}


@pytest.mark.parametrize(
    "data",
    [{"macs": 1}, {"macs": 1, "params": 2.5}, {"macs": 1, "params": True}, {"macs": -1, "params": 1},
     {"macs": 1, "params": 1, "flops": 2}, {"macs": 1, "params": 1, "size_bytes": 1.5},
     {"macs": 1, "params": 1, "latency_s": float("inf")}, {"macs": 1, "params": 1, "latency_s": "soon"}],
)  # fmt: skip
def test_damaged_cost_is_refused(data):
    with pytest.raises(BudgetError, match="`cost` must hold the whole numbers macs, params"):
        Cost.from_json(data)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1 k"), (12_345, "12.3 k"), (999_600, "1 M"), (125_747_840, "126 M"),
     (4.09e9, "4.09 G"), (2e12, "2 T"), (3.0, "3")],
)  # fmt: skip
def test_counts_are_shown_with_three_digits(value, text):
    assert format_count(value) == text


def test_hand_graph_nets_run():
    assert Concat()(torch.zeros(2, 3, 6, 6)).shape == (2, 4)
    assert Flat()(torch.zeros(2, 1, 4, 4)).shape == (2, 7)


def test_a_parameter_that_is_handed_to_a_module_is_no_obstacle():
    """As class tokens are: the counter of torch looks for the gradient function of what a module is given."""

    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.fc = nn.Parameter(torch.ones(1, 1, 4)), nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(self.token.expand(len(x), -1, -1)) + self.fc(x)

    model = Given()
    assert count_macs(model, torch.ones(2, 5, 4)) == 12 + 60
    assert model.token.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("make", HAND_GRAPHS.values(), ids=HAND_GRAPHS)
def test_extents_one_by_one_are_those_of_the_matrix_product(make, monkeypatch):
    """Deep networks take the first way."""
    graph = make()[1]
    sizes = np.array([axis.size for axis in graph.prunable])
    widths = np.random.default_rng(0).integers(1, sizes + 1, (50, len(sizes)))
    by_product = CostModel(graph).of_widths(widths)
    monkeypatch.setattr(sys.modules["secateur.cost.macs"], "_SPARSE", 0)
    for ours, theirs in zip(CostModel(graph).of_widths(widths), by_product, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_cost_of_one_architecture_takes_steps_in_proportion_to_the_depth():
    """No product of all axes with all extents: each extent has one axis."""
    graph = trace(nn.Sequential(*(nn.Conv2d(2, 2, 1) for _ in range(100))), torch.zeros(1, 2, 1, 1))
    polynomial = CostModel(graph)._macs
    assert polynomial._terms is not None
    assert sum(axes.size for axes, _ in polynomial._terms) == len(polynomial.bases)
