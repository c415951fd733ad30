"""What a search begins with."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from secateur.errors import ModelError
from secateur.nas import Pretrained, RandomInit


def _model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))


def test_a_warm_start_is_the_model_itself():
    model = _model()
    assert Pretrained().of(model, 3) is model


def test_redrawn_weights_are_new_repeatable_and_leave_the_model_and_the_random_state_alone():
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    first, again, other = (RandomInit().of(model, seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    weights = [each[0].weight for each in (model, first, other)]
    assert all(not torch.equal(a, b) for a, b in pairwise(weights))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_parameters_that_nobody_can_draw_are_refused():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

    with pytest.raises(ModelError, match=r"`init` must be able to reset all weights; 1 \(Scaled\).*init=Pretrained"):
        RandomInit().of(nn.Sequential(nn.Conv2d(3, 4, 3), Scaled()), 0)
