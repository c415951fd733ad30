"""The formula with blocks removed, against the really cut model counted by running it."""

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.cost import Cost, CostModel, counted_macs, counted_params
from secateur.errors import SurgeryError
from secateur.graph import ChannelGraph, trace
from secateur.models import cifar_resnet20
from secateur.surgery import cut

pytestmark = pytest.mark.window


def random_architecture(graph: ChannelGraph, seed: int) -> Architecture:
    """Any multiples of the divisors, and each block with even odds."""
    draw = np.random.default_rng(seed)
    widths = {a.name: draw.integers(1, a.size // a.divisor + 1) * a.divisor for a in graph.prunable}
    kept = {a.name: draw.choice(a.size, widths[a.name], replace=False) for a in graph.prunable}
    return Architecture.of(kept, [block.name for block in graph.removable if draw.random() < 0.5])


def check(model: nn.Module, example: torch.Tensor, seeds: range, blocks: int) -> None:
    graph = trace(model.eval(), example)
    assert len(graph.removable) == blocks
    for seed in seeds:
        made = cut(model, graph, random_architecture(graph, seed))
        counted = Cost(counted_macs(made.model, example), counted_params(made.model))
        assert CostModel(made.graph).cost(made.architecture) == counted
        assert 0 < len(made.architecture.removed_blocks) < blocks


def test_cifar_resnet():
    check(cifar_resnet20(), torch.zeros(1, 3, 32, 32), range(3), 7)


def test_mobilenet():
    check(torchvision.models.mobilenet_v2(weights=None), torch.rand(1, 3, 64, 64), range(2), 10)


def test_transformer():
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, depth=4)
    check(model, torch.rand(1, 3, 64, 64), range(2), 8)


def test_convnext():
    check(timm.create_model("convnext_atto", pretrained=False), torch.rand(1, 3, 64, 64), range(2), 12)


def residual() -> CostModel:
    return CostModel(trace(*ZOO["residual"]()))


def test_many_at_once_equal_one_at_a_time():
    costs = residual()
    assert costs.blocks == ("1", "3")
    widths = np.stack([costs.sizes, costs.sizes // 2, costs.sizes // 3, costs.sizes])
    blocks = np.array([[1, 1], [0, 1], [1, 0], [0, 0]])
    macs, params = costs.of_widths(widths, blocks)
    assert Cost(macs[0], params[0]) == costs.original
    for row in range(4):
        kept = {name: range(width) for name, width in zip(costs.axes, widths[row], strict=True)}
        removed = [name for name, there in zip(costs.blocks, blocks[row], strict=True) if not there]
        assert costs.cost(Architecture.of(kept, removed)) == Cost(macs[row], params[row])
    assert (np.diff(macs[[0, 3]]) < 0).all()


def test_one_row_of_blocks_serves_all_widths():
    costs = residual()
    widths = np.stack([costs.sizes, costs.sizes // 2])
    for one, each in zip(
        costs.of_widths(widths, np.array([[0, 1]])), costs.of_widths(widths, np.array([[0, 1]] * 2)), strict=True
    ):
        assert (one == each).all()


def test_blocks_may_be_removed_for_good():
    costs = residual()
    fewer = costs.without(["3"])
    assert fewer.original == costs.original
    assert fewer.cost(Architecture()) == costs.cost(Architecture.of({}, ["3"])) != costs.original
    assert fewer.cost(Architecture.of({}, ["1"])) == costs.cost(Architecture.of({}, ["1", "3"]))
    assert costs.cost(Architecture()) == costs.original
    widths = costs.sizes[None] // 2
    assert fewer.of_widths(widths) == costs.of_widths(widths, np.array([[1, 0]]))


def test_tensor_version_agrees_and_a_block_is_worth_what_it_costs():
    costs = residual()
    widths = torch.tensor(costs.sizes // 2, dtype=torch.float64)
    there = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for of, index in ((costs.macs_of, 0), (costs.params_of, 1)):
        whole = costs.of_widths(costs.sizes[None] // 2)[index]
        assert of(widths, there).item() == of(widths).item() == whole[0]
        (slope,) = torch.autograd.grad(of(widths, there), there)
        for column in range(2):
            blocks = np.ones((1, 2), dtype=np.int64)
            blocks[0, column] = 0
            assert slope[column].item() == whole[0] - costs.of_widths(costs.sizes[None] // 2, blocks)[index][0]
    assert costs.without(["1"]).macs_of(widths) == costs.macs_of(widths, torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("blocks", [np.ones((1, 3), int), np.ones(2, int), np.ones((1, 2))])
def test_wrong_blocks_are_refused(blocks):
    costs = residual()
    with pytest.raises(ValueError, match=r"`blocks` must be whole numbers of shape \(n, 2\), one column per removable"):
        costs.of_widths(costs.sizes[None], blocks)


def test_unknown_blocks_are_refused():
    with pytest.raises(SurgeryError, match="`removed_blocks` must name removable blocks of this graph; got '2'"):
        residual().cost(Architecture.of({}, ["2"]))
    kept = trace(*ZOO["residual"]()).with_kept_blocks({"1": "because"})
    with pytest.raises(SurgeryError, match=r"got '1'\. The graph has 1, such as 3"):
        CostModel(kept).without(["1"])
