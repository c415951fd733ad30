import copy

import numpy as np
import pytest
import torch
from cuts import apart, outputs, zoo_net
from torch import nn

from secateur.errors import SurgeryError
from secateur.graph import untie
from secateur.nas import Supernet, invert_order, order_by_score, reorder_channels


def test_channels_are_ordered_by_score_and_of_equal_ones_by_index():
    order = order_by_score({"a": np.array([0.5, 2.0, 0.5, 3.0]), "b": np.zeros(3)})
    assert order["a"].tolist() == [3, 1, 0, 2]
    assert order["b"].tolist() == [0, 1, 2]


def test_the_inverse_order_restores_every_channel():
    order = {"a": np.array([2, 0, 3, 1])}
    channels = np.array([10, 11, 12, 13])
    assert channels[order["a"]][invert_order(order)["a"]].tolist() == channels.tolist()


def test_channels_move_together_in_all_tensors():
    model, _, graph = zoo_net("plain")
    order = {"0.0": np.roll(np.arange(12), 5)}
    moved = reorder_channels(model, graph, order)
    rows = torch.from_numpy(order["0.0"])
    assert torch.equal(moved.get_parameter("0.0.weight"), model.get_parameter("0.0.weight")[rows])
    assert torch.equal(moved.get_buffer("0.1.running_var"), model.get_buffer("0.1.running_var")[rows])
    assert torch.equal(moved.get_parameter("1.0.weight"), model.get_parameter("1.0.weight")[:, rows])
    assert torch.equal(moved.get_parameter("2.0.weight"), model.get_parameter("2.0.weight"))


def test_positions_behind_a_flatten_move_together():
    """Twelve channels of 2 x 2 pixels each."""
    model, _, graph = zoo_net("flatten_linear")
    order = np.random.default_rng(0).permutation(12)
    moved = reorder_channels(model, graph, {"2.0": order})
    want = model.get_parameter("5.weight").view(18, 12, 4)[:, torch.from_numpy(order)].reshape(18, 48)
    assert torch.equal(moved.get_parameter("5.weight"), want)


def test_the_given_model_is_not_changed():
    model, _, graph = zoo_net("residual")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moved = reorder_channels(model, graph, {axis.name: np.arange(axis.size)[::-1].copy() for axis in graph.prunable})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(a is b for a in moved.parameters() for b in model.parameters())


@pytest.mark.parametrize(
    "order",
    [
        {"0.0": np.arange(11)},
        {"0.0": np.arange(1, 13)},
        {"0.0": np.zeros(12, dtype=np.int64)},
        {"nowhere": np.arange(12)},
    ],
    ids=["too short", "out of range", "twice the same", "unknown axis"],
)
@pytest.mark.parametrize("make", [reorder_channels, Supernet])
def test_orders_that_are_no_permutations_are_refused(order, make):
    model, _, graph = zoo_net("plain")
    name = next(iter(order))
    message = rf"`order` must hold a permutation of the channels of each axis; got another one for '{name}'. Make it"
    with pytest.raises(SurgeryError, match=message):
        make(model, graph, order)


def test_branches_follow_the_order_of_their_stream():
    """An order given for the branch is ignored, because the stream and what is added to it have the same channels."""
    model, example, graph = zoo_net("residual")
    untied = untie(model, graph)
    stream = next(axis.name for axis in untied.prunable if any(a.residual_axis == axis.name for a in untied.prunable))
    branch = next(axis for axis in untied.prunable if axis.residual_axis == stream)
    reverse, other = np.arange(branch.size)[::-1].copy(), np.roll(np.arange(branch.size), 1)
    for order in ({stream: reverse}, {stream: reverse, branch.name: other}, {branch.name: other}):
        for make in (reorder_channels, lambda *given: Supernet(*given).model):
            assert apart(outputs(model, example), outputs(make(model, untied, order), example)) <= 1e-5


def test_tensors_shared_by_modules_stay_shared():
    model, example, graph = zoo_net("tied_parameter")
    order = {axis.name: np.roll(np.arange(axis.size), 3) for axis in graph.prunable}
    moved = reorder_channels(model, graph, order)
    assert moved.get_parameter("first.weight") is moved.get_parameter("second.weight")
    assert apart(outputs(model, example), outputs(moved, example)) <= 1e-5


def test_frozen_weights_stay_frozen():
    model, _, graph = zoo_net("plain")
    model = copy.deepcopy(model)
    model.get_parameter("0.0.weight").requires_grad = False
    moved: nn.Module = reorder_channels(model, graph, {"0.0": np.arange(12)[::-1].copy()})
    assert not moved.get_parameter("0.0.weight").requires_grad
    assert moved.get_parameter("1.0.weight").requires_grad
