"""Steps in parts, and gradients that are clipped."""

import copy
from typing import Any

import pytest
import torch
from small_runs import CPU, LABELS_ONLY, Blobs, fit_small, same, small_config, small_net, state
from torch import nn
from torch.nn import functional as F

from secateur.distill import Objective
from secateur.errors import TrainingError
from secateur.train import SGD, Silent, Trained

PLAIN = SGD(momentum=0.0, nesterov=False, weight_decay=0.0)


def grouped() -> nn.Sequential:
    """Nothing in it is normalized over the batch."""
    model = small_net(seed=3)
    model[1] = nn.GroupNorm(2, 8)
    return model


def run(student: nn.Module, epochs: int = 2, n: int = 64, **schedule: Any) -> Trained:
    settings = {"learning_rate": 0.1, "warmup_fraction": 0.0, **schedule}
    return fit_small(
        student, Blobs(n), train=small_config(epochs, **settings), objective=Objective(0.5, 0.5),
        teacher=small_net(5), callbacks=Silent(),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:`teacher` is right on")
@pytest.mark.parametrize("parts", [2, 3, 16])
def test_a_batch_in_parts_is_the_batch(parts: int) -> None:
    """Parts of 8, of 6, 5 and 5, and of one image each."""
    whole, divided = run(grouped()), run(grouped(), accumulate=parts)
    moved = max(
        float((a - b).detach().abs().max())
        for a, b in zip(grouped().parameters(), whole.model.parameters(), strict=True)
    )
    assert moved > 0.05
    for one, other in zip(whole.model.parameters(), divided.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(whole.history, divided.history, strict=True):
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-6)
        assert other.parts == pytest.approx(dict(one.parts), rel=1e-6, abs=1e-6)


@pytest.mark.filterwarnings("ignore:`teacher` is right on")
def test_batch_norms_see_the_parts() -> None:
    whole, divided = run(small_net()), run(small_net(), accumulate=2)
    assert not torch.allclose(whole.model[1].running_mean, divided.model[1].running_mean, rtol=1e-3)
    # Statistics are updated once for every part.
    assert int(divided.model[1].num_batches_tracked) == 2 * int(whole.model[1].num_batches_tracked)


def one_step(clip: float | None, seed: int = 0) -> tuple[nn.Module, nn.Module, float]:
    """A net before and after one step of plain descent with the rate 0.1, and the norm of its gradient in float64."""
    net, source = grouped(), Blobs(16, seed)
    schedule = small_config(1, learning_rate=0.1, warmup_fraction=0.0, optimizer=PLAIN, clip_norm=clip)
    trained = fit_small(net, source, train=schedule, objective=LABELS_ONLY, callbacks=Silent())
    wide = copy.deepcopy(net).double()
    images, labels = next(source.batches(16, device=CPU, seed=0))
    F.cross_entropy(wide(images.double()), labels).backward()
    norm = torch.sqrt(sum((p.grad**2).sum() for p in wide.parameters()))
    for parameter in wide.parameters():
        parameter.data -= 0.1 * parameter.grad * min(1.0, (clip or 1e9) / float(norm))
    return wide, trained.model, float(norm)


@pytest.mark.parametrize("share", [0.1, 0.7, 3.0])
def test_the_gradient_is_scaled_down_to_the_norm(share: float) -> None:
    _, _, norm = one_step(None)
    wanted, got, _ = one_step(share * norm)
    for one, other in zip(wanted.parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(other.double(), one, rtol=1e-5, atol=1e-6)


def test_short_gradients_are_left_alone() -> None:
    _, free, norm = one_step(None)
    _, clipped, _ = one_step(2 * norm)
    assert same(state(free), state(clipped))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate": 0}, "`accumulate` must be a whole number of at least 1; got 0"),
        ({"accumulate": 17}, "`accumulate` must leave an image to every part of a batch; got 17 parts of 16 images"),
        ({"clip_norm": 0.0}, r"`clip_norm` must be positive and finite; got 0\.0"),
        ({"clip_norm": float("inf")}, "`clip_norm` must be positive and finite; got inf"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        small_config(1, **settings)


def test_a_small_source_must_fill_the_parts() -> None:
    with pytest.raises(TrainingError, match="got 3 images for 1 process"):
        run(grouped(), n=3, accumulate=4)
