"""Shadows share memory until they write; what code mentions; whether runs repeat."""

import itertools
import random
import time

import pytest
import torch
from torch import Tensor, nn

from secateur.graph._shadow import KEEPS_STATE, is_repeatable, mentioned_names, shadow_copy


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor, fail: bool = False) -> Tensor:
        with torch.no_grad():
            view = self.table[1:3]
            view.add_(1)
        if fail:
            raise ValueError("on purpose")
        return x + self.table


def test_a_shadow_shares_memory_until_it_writes():
    model = Writes()
    shadow = shadow_copy(model)
    assert shadow.table.data_ptr() == model.table.data_ptr()
    with torch.no_grad():
        assert shadow(torch.zeros(4)).tolist() == [1, 2, 2, 1]
        assert shadow(torch.zeros(4)).tolist() == [1, 3, 3, 1]
    assert model.table.tolist() == [1, 1, 1, 1]
    assert shadow.table.data_ptr() != model.table.data_ptr()
    assert model.table._version == 0


def test_a_forward_that_raises_leaves_the_original_too():
    model = Writes()
    with pytest.raises(ValueError, match="on purpose"):
        shadow_copy(model)(torch.zeros(4), fail=True)
    assert model.table.tolist() == [1, 1, 1, 1]


def test_flags_gradients_and_data_of_a_shadow_are_its_own():
    model = nn.Linear(3, 2)
    shadow = shadow_copy(model)
    shadow.requires_grad_(False)
    shadow.weight.data = torch.zeros(2, 3)
    shadow_copy(model)(torch.ones(1, 3)).sum().backward()
    assert model.weight.requires_grad
    assert model.weight.grad is None
    assert model.weight.any()


def test_shared_parameters_stay_shared():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    shadow = shadow_copy(model)
    assert shadow[0].weight is shadow[1].weight


def test_a_generator_of_a_module_is_copied():
    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.draw = torch.Generator().manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(x.shape, generator=self.draw)

    model = Draws()
    before = model.draw.get_state()
    assert is_repeatable(model, (torch.zeros(3),))
    assert torch.equal(before, model.draw.get_state())


NUMBERS, STATE = itertools.count(), {"n": 0}


def counts_up() -> int:
    global GLOBAL  # noqa: PLW0603 -- what is tested.
    GLOBAL = GLOBAL + 1
    return GLOBAL


GLOBAL = 0


class Adds(nn.Module):
    def __init__(self, number) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x + self.number()


@pytest.mark.parametrize(
    ("number", "repeats", "mentioned"),
    [
        (random.random, True, "random"),
        (lambda: 1 * random.random(), True, "random"),
        (lambda: torch.rand(()), True, "rand"),
        (lambda: 1 * time.time(), False, "time"),
        (counts_up, False, KEEPS_STATE),
        (lambda: next(NUMBERS), False, KEEPS_STATE),
        (lambda: STATE.update(n=STATE["n"] + 1) or STATE["n"], False, KEEPS_STATE),
    ],
)
def test_whether_runs_repeat_and_what_the_code_mentions(number, repeats, mentioned):
    model = Adds(number)
    assert is_repeatable(model, (torch.zeros(3, dtype=torch.float64),)) is repeats
    assert mentioned in mentioned_names(model)


def test_layers_of_torch_mention_nothing():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.MultiheadAttention(4, 2), nn.LSTM(4, 4)
    )
    assert mentioned_names(model) == frozenset()


def test_methods_properties_hooks_and_called_functions_count():
    def helper(m: nn.Module) -> bool:
        return m.training

    class Own(nn.Module):
        @property
        def kind(self) -> bool:
            return helper(self)

        def forward(self, x: Tensor) -> Tensor:
            return x if self.kind else -x

    assert "training" in mentioned_names(nn.Sequential(Own()))
    hooked = nn.Linear(2, 2)
    assert "training" not in mentioned_names(hooked)
    hooked.register_forward_hook(lambda module, args, out: out if module.training else None)
    assert "training" in mentioned_names(hooked)
