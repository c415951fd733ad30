"""What could be cut, before anything is: attention by heads or dimensions, and the space that bounds the axes."""

import pytest
import torch
from torch import Tensor, nn

from secateur.graph import HeadUnit, Selection
from secateur.pipeline import CutConfig, inspect_model
from secateur.search import AxisRule, SearchSpace


class Attention(nn.Module):
    """Three heads of four dimensions; the scale is written out, so that fewer dimensions leave it as it is."""

    def __init__(self):
        super().__init__()
        self.heads, self.dimensions = 3, 4
        self.embed = nn.Conv2d(3, 12, 4, stride=4)
        self.qkv = nn.Linear(12, 36)
        self.out = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.dimensions)).permute(2, 0, 3, 1, 4)
        attended = (0.5 * q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head(self.out(attended.transpose(1, 2).flatten(2)).mean(1))


IMAGES = torch.zeros(1, 3, 8, 8)


def sizes(heads: HeadUnit) -> dict[str, int]:
    return dict(inspect_model(Attention(), IMAGES, cut=CutConfig(heads=heads)).graph.sizes)


def test_attention_is_cut_by_dimensions_or_by_heads():
    by_dimension, by_head = sizes(HeadUnit.DIMENSION), sizes(HeadUnit.HEAD)
    assert by_dimension == {"embed": 12, "qkv": 4, "out": 12}
    assert by_head == {"embed": 12, "qkv": 3, "out": 12}


def test_smallest_cost_is_that_of_the_chosen_space():
    rule = SearchSpace(rules=(AxisRule("qkv", min_width=3),))
    loose = inspect_model(
        Attention(), IMAGES, cut=CutConfig(selection=Selection(include=("qkv",)), space=SearchSpace())
    )
    bound = inspect_model(Attention(), IMAGES, cut=CutConfig(selection=Selection(include=("qkv",)), space=rule))
    # At each of 4 positions, a dimension of 3 heads costs 3 x 12 MACs in qkv, 12 in out, and 2 x 4 in the attention.
    a_dimension = 4 * 3 * (3 * 12 + 12 + 2 * 4)
    assert loose.original.macs - loose.smallest.macs == 3 * a_dimension
    assert bound.original.macs - bound.smallest.macs == 1 * a_dimension
    assert bound.space is rule
    # No block of this model can be removed.
    assert bound.shallowest == bound.smallest
    assert loose.prunable_macs_share == pytest.approx(4 * a_dimension / loose.original.macs)
