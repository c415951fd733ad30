"""Scores of single weights compared with their definitions."""

import math

import pytest
import torch
from small_runs import same, small_net, state
from torch import nn

from secateur.distill import label_loss
from secateur.errors import SparsityError
from secateur.prune import (
    apply_masks,
    keep_largest,
    magnitude_scores,
    movement_scores,
    prunable_weights,
    random_scores,
    snip_scores,
    taylor_scores,
    uniform_counts,
)

WEIGHT = [2.0, -1.0, 0.5]
BATCHES = [
    (torch.tensor([[1.0, 2.0, -1.0], [0.0, 1.0, 3.0]], dtype=torch.float64), torch.tensor([[1.0], [2.0]]).double()),
    (torch.tensor([[2.0, -1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0], [-1.0]]).double()),
]


def linear() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([WEIGHT]))
    return model


def gradient(weight: list[float], batch: int) -> list[float]:
    """Of the mean squared error, by hand: 2/n sum of (w x - y) x."""
    inputs, targets = (x.tolist() for x in BATCHES[batch])
    errors = [
        sum(w * x for w, x in zip(weight, row, strict=True)) - y for row, (y,) in zip(inputs, targets, strict=True)
    ]
    return [sum(2 / 2 * error * row[k] for error, row in zip(errors, inputs, strict=True)) for k in range(3)]


mse = nn.functional.mse_loss


def test_magnitude_is_the_absolute_value() -> None:
    assert magnitude_scores(prunable_weights(linear()))["0.weight"].tolist() == [[2.0, 1.0, 0.5]]


def test_taylor_is_the_mean_square_of_weight_times_gradient() -> None:
    model = linear()
    products = [[w * g for w, g in zip(WEIGHT, gradient(WEIGHT, b), strict=True)] for b in (0, 1)]
    expected = [(a**2 + b**2) / 2 for a, b in zip(*products, strict=True)]
    assert taylor_scores(model, prunable_weights(model), BATCHES, mse)["0.weight"][0].tolist() == pytest.approx(
        expected, rel=1e-12
    )


def test_snip_is_the_share_of_the_mean_gradients_connection() -> None:
    model = linear()
    gradients = [(a + b) / 2 for a, b in zip(gradient(WEIGHT, 0), gradient(WEIGHT, 1), strict=True)]
    products = [abs(w * g) for w, g in zip(WEIGHT, gradients, strict=True)]
    scores = snip_scores(model, prunable_weights(model), BATCHES, mse)["0.weight"]
    assert scores[0].tolist() == pytest.approx([p / sum(products) for p in products], rel=1e-12)


def test_movement_accumulates_along_steps_of_sgd() -> None:
    model, rate, weight, expected = linear(), 0.05, list(WEIGHT), [0.0] * 3
    for b in (0, 1):
        found = gradient(weight, b)
        expected = [e - w * g for e, w, g in zip(expected, weight, found, strict=True)]
        weight = [w - rate * g for w, g in zip(weight, found, strict=True)]
    scores = movement_scores(model, prunable_weights(model), BATCHES, mse, learning_rate=rate)["0.weight"]
    assert scores[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_movement_is_positive_for_weights_that_grow() -> None:
    # Targets 3 x_0: the first weight grows from 2, the second goes from -1 toward 0.
    inputs = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = linear()
    scores = movement_scores(model, prunable_weights(model), [(inputs, 3 * inputs[:, :1])] * 3, mse, learning_rate=0.1)[
        "0.weight"
    ][0]
    assert scores[0] > 0 > scores[1]


def test_random_scores_are_the_seeds_alone() -> None:
    weights = prunable_weights(small_net())
    before = torch.random.get_rng_state()
    first, same_seed, other = (random_scores(weights, seed=seed)["0.weight"] for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, same_seed)
    assert not torch.equal(first, other)
    assert 0 <= first.min() < 0.1 < 0.9 < first.max() < 1


@pytest.mark.parametrize("name", ["magnitude", "random", "taylor", "snip", "movement"])
def test_what_is_pruned_stays_pruned_and_the_model_is_not_changed(name: str) -> None:
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    batches = [(images, torch.arange(8) % 3)]
    model = small_net()
    small = apply_masks(
        model, keep_largest(magnitude_scores(prunable_weights(model)), uniform_counts(prunable_weights(model), 0.5))
    ).train()
    before, weights = state(small), prunable_weights(small)
    scores = {
        "magnitude": lambda: magnitude_scores(weights),
        "random": lambda: random_scores(weights, seed=4),
        "taylor": lambda: taylor_scores(small, weights, batches, label_loss),
        "snip": lambda: snip_scores(small, weights, batches, label_loss),
        "movement": lambda: movement_scores(small, weights, batches, label_loss, learning_rate=0.1),
    }[name]()
    assert same(state(small), before)
    assert all(p.grad is None for p in small.parameters())
    assert small.training
    for tensor, kept in keep_largest(scores, uniform_counts(weights, 0.25)).items():
        assert not (kept & (weights[tensor] == 0)).any()


def test_scores_without_batches_or_with_nan_are_refused() -> None:
    model = linear()
    for score in (taylor_scores, snip_scores):
        with pytest.raises(SparsityError, match="`batches` must hold at least one batch; got none"):
            score(model, prunable_weights(model), [], mse)
    with pytest.raises(SparsityError, match=r"`loss` must have finite gradients; got others in '0\.weight'"):
        taylor_scores(model, prunable_weights(model), BATCHES, lambda output, target: output.sum() * math.nan)


def test_a_weight_that_the_loss_does_not_reach_scores_zero() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    half = Half().double()
    scores = snip_scores(half, prunable_weights(half), BATCHES, mse)
    assert torch.equal(scores["spare.weight"], torch.zeros(1, 3, dtype=torch.float64))
    assert scores["used.weight"].sum().item() == pytest.approx(1.0)
