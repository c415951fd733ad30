import math
from typing import Any

import pytest
import torch
from small_runs import small_net
from torch import nn

from secateur.errors import TrainingError
from secateur.train import SGD, AdamW, TrainConfig


def test_warmup_then_cosine_at_hand_computed_points() -> None:
    schedule = TrainConfig(4, learning_rate=0.8, warmup_fraction=0.2)
    rates = [schedule.learning_rate_at(step, steps=20) for step in range(20)]
    # W = 4: a quarter more each step, then the cosine begins at its top.
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8])
    assert rates[12] == pytest.approx(0.4)  # half way: (12 - 4) / 16
    assert rates[8] == pytest.approx(0.8 * (1 + math.sqrt(0.5)) / 2)  # a quarter of the way
    assert rates[19] == pytest.approx(0.8 * (1 + math.cos(math.pi * 15 / 16)) / 2)
    assert schedule.learning_rate_at(20, steps=20) == pytest.approx(0.0)


def test_without_warmup_it_is_torchs_cosine_annealing() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    schedule = TrainConfig(5, learning_rate=0.1, warmup_fraction=0.0)
    for step in range(50):
        # torch multiplies step by step, so rounding adds up.
        assert schedule.learning_rate_at(step, steps=50) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        annealing.step()


def test_all_warmup_is_a_straight_line() -> None:
    schedule = TrainConfig(1, learning_rate=1.0, warmup_fraction=1.0)
    assert [schedule.learning_rate_at(step, steps=4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("images", "steps"), [(0, 0), (5, 1), (16, 1), (31, 1), (32, 2), (100, 6)])
def test_steps_per_epoch_are_whole_batches_or_one(images: int, steps: int) -> None:
    assert TrainConfig(1, batch_size=16).steps_per_epoch(images) == steps


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_vectors_have_their_own_weight_decay_and_frozen_parameters_none(kind: type) -> None:
    model = small_net()
    model[6].bias.requires_grad_(requires_grad=False)
    groups = kind(weight_decay=0.3, vector_weight_decay=0.1).build(model, 0.5).param_groups
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.3, 0.5), (0.1, 0.5)]
    assert [id(p) for p in groups[0]["params"]] == [id(model[0].weight), id(model[6].weight)]
    assert [id(p) for p in groups[1]["params"]] == [id(model[1].weight), id(model[1].bias)]


def test_optimizers_are_torchs_with_the_given_numbers() -> None:
    sgd = SGD(momentum=0.8, nesterov=False).build(small_net(), 0.1)
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.8, False)
    adamw = AdamW(betas=(0.8, 0.9), epsilon=1e-6).build(small_net(), 0.1)
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.defaults["betas"], adamw.defaults["eps"]) == ((0.8, 0.9), 1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, r"`epochs` must be a whole number of at least 0; got -1"),
        ({"epochs": 1.5}, r"`epochs` must be a whole number of at least 0; got 1\.5"),
        ({"batch_size": 0}, r"`batch_size` must be a whole number of at least 1; got 0"),
        ({"seed": -3}, r"`seed` must be a whole number of at least 0; got -3"),
        ({"learning_rate": 0.0}, r"`learning_rate` must be positive and finite; got 0\.0"),
        ({"learning_rate": math.nan}, r"`learning_rate` must be positive and finite; got nan"),
        ({"warmup_fraction": 1.5}, r"`warmup_fraction` must be in \[0, 1\]; got 1\.5"),
        ({"ema_decay": 1.0}, r"`ema_decay` must be in \[0, 1\); got 1\.0"),
    ],
)
def test_schedule_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        TrainConfig(**({"epochs": 1} | settings))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SGD, {"momentum": 1.0}, r"`momentum` must be in \[0, 1\); got 1\.0"),
        (SGD, {"momentum": 0.0}, r"`momentum` must be positive with nesterov; got 0\.0"),
        (SGD, {"weight_decay": -1.0}, r"`weight_decay` must be finite and not negative; got -1\.0"),
        (SGD, {"vector_weight_decay": math.inf}, r"`vector_weight_decay` must be finite and not negative; got inf"),
        (AdamW, {"betas": (0.9, 1.0)}, r"`betas` must be in \[0, 1\); got 1\.0"),
        (AdamW, {"epsilon": 0.0}, r"`epsilon` must be positive and finite; got 0\.0"),
        (AdamW, {"weight_decay": -1.0}, r"`weight_decay` must be finite and not negative; got -1\.0"),
        (AdamW, {"vector_weight_decay": -1.0}, r"`vector_weight_decay` must be finite and not negative; got -1\.0"),
    ],
)
def test_optimizers_refuse(kind: type, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        kind(**settings)
