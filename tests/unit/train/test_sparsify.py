"""Pruning while training: masks at the scheduled steps, the same after a kill, and an honest best epoch."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LABELS_ONLY, Blobs, Fragile, Killed, fit_small, same, small_config, small_net, state
from torch import nn

from secateur.distill import Objective
from secateur.errors import SparsityError, TrainingError
from secateur.prune import (
    Cubic,
    ERKAllocation,
    Iterative,
    MovementScore,
    NOfM,
    OneShot,
    RandomScore,
    SnipScore,
    Sparsify,
    TaylorScore,
    UniformAllocation,
    WeightPruning,
    apply_masks,
    get_masks,
    keep_globally,
    magnitude_scores,
    mask_density,
    prunable_weights,
    set_masks_,
)
from secateur.train import Silent, Trained

GRADUAL = Sparsify(0.25, WeightPruning(schedule=partial(Cubic, end=0.6), every=2))
BATCH = tuple(Blobs(32).batches(16, device=torch.device("cpu")))


def run(
    source: Blobs, sparsify: Sparsify | None = GRADUAL, student: nn.Module | None = None, **settings: Any
) -> Trained:
    defaults: dict[str, Any] = {"train": small_config(4), "objective": LABELS_ONLY, "callbacks": Silent()}
    return fit_small(student or small_net(dropout=0.2), source, sparsify=sparsify, **(defaults | settings))


def test_masks_follow_the_schedule_as_in_a_loop_by_hand() -> None:
    schedule = small_config(4, learning_rate=0.1)
    trained = run(Blobs(48), student=small_net(), train=schedule)
    steps, curve = 12, Cubic(0.25, end=0.6)
    student = apply_masks(small_net().train(), keep_globally(magnitude_scores(prunable_weights(small_net())), 1.0))
    optimizer = schedule.optimizer.build(student, 0.1)
    batches = [
        batch
        for epoch in range(4)
        for batch in Blobs(48).batches(16, device=torch.device("cpu"), seed=0, epoch=epoch, drop_last=True)
    ]
    asked = []
    for step, (images, labels) in enumerate(batches):
        if step % 2 == 0 or step == steps - 1:
            asked.append(curve.density_at(step / (steps - 1)))
            set_masks_(student, keep_globally(magnitude_scores(prunable_weights(student)), asked[-1]))
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(step, steps=steps)
        optimizer.zero_grad()
        nn.functional.cross_entropy(student(images), labels).backward()
        optimizer.step()
    assert asked[0] == 1.0 > asked[1] > asked[-1] == 0.25
    torch.testing.assert_close(state(trained.model), state(student), rtol=1e-5, atol=1e-6)
    assert mask_density(get_masks(trained.model)) == 0.25
    # Epochs end at steps 3, 6, 9 and 12; the masks before their last steps are of steps 2, 4, 8 and 11.
    wanted = [curve.density_at(step / 11) for step in (2, 4, 8, 11)]
    assert [record.density for record in trained.history] == wanted


@pytest.mark.parametrize(
    ("sparsify", "killed_in", "settings"),
    [
        (GRADUAL, 1, {"validation": Blobs(32, seed=1)}),
        (GRADUAL, 2, {"train": small_config(4, ema_decay=0.9)}),
        (Sparsify(0.25, WeightPruning(RandomScore(3), ERKAllocation(), partial(Iterative, rounds=3), every=1)), 3, {}),
        (Sparsify(0.25, WeightPruning(TaylorScore(), every=3), BATCH), 2, {"validation": Blobs(32, seed=1)}),
        (GRADUAL, 2, {"objective": Objective(kd_weight=0.5, label_weight=0.5), "teacher": small_net(7)}),
    ],
)
def test_a_run_killed_between_two_densities_goes_on_bit_for_bit(
    tmp_path: Path, sparsify: Sparsify, killed_in: int, settings: dict[str, Any]
) -> None:
    whole = run(Blobs(48), sparsify, **settings)
    with pytest.raises(Killed):
        run(Fragile(48, killed_in), sparsify, folder=tmp_path, **settings)
    source = Blobs(48)
    resumed = run(source, sparsify, folder=tmp_path, **settings)
    assert [call["epoch"] for call in source.calls] == list(range(killed_in, 4))
    assert same(state(resumed.model), state(whole.model))
    assert mask_density(get_masks(resumed.model)) == pytest.approx(0.25, abs=0.002)
    assert [record.density for record in resumed.history] == [record.density for record in whole.history]


def test_the_best_epoch_has_the_final_density() -> None:
    # A student that is good already, and a rate that only does harm: the first epochs, which are dense, are better.
    validation = Blobs(64, seed=1)
    good = run(Blobs(96), None, student=small_net(), train=small_config(8), validation=validation).model
    settings: dict[str, Any] = {"train": small_config(4, learning_rate=30.0), "validation": validation}
    assert run(Blobs(48), None, student=good, **settings).best_epoch == 0
    trained = run(
        Blobs(48), Sparsify(0.25, WeightPruning(schedule=partial(Cubic, end=0.5), every=1)), student=good, **settings
    )
    assert [record.density == 0.25 for record in trained.history] == [False, False, False, True, True]
    assert trained.best_epoch in (3, 4)
    assert mask_density(get_masks(trained.model)) == 0.25


def test_nothing_of_the_callers_changes_and_the_rest_of_the_network_stays_dense() -> None:
    student = small_net()
    before = state(student)
    plan = Sparsify(0.3, WeightPruning(allocation=UniformAllocation(), schedule=OneShot, exclude=("6",)))
    trained = run(Blobs(48), plan, student=student)
    assert same(state(student), before)
    assert set(get_masks(trained.model)) == {"0.weight"}
    assert mask_density(get_masks(trained.model)) == int(0.3 * 216) / 216
    # An earlier mask stays where the plan makes none.
    again = run(Blobs(48), Sparsify(0.5, WeightPruning(schedule=OneShot, exclude=("0",))), student=trained.model)
    masks = get_masks(again.model)
    assert torch.equal(masks["0.weight"], get_masks(trained.model)["0.weight"])
    assert int(masks["6.weight"].sum()) == 12


def test_a_run_without_epochs_prunes_at_once() -> None:
    trained = run(Blobs(48), train=small_config(0))
    expected = keep_globally(magnitude_scores(prunable_weights(small_net())), 0.25)
    assert same(get_masks(trained.model), expected)


@pytest.mark.parametrize("score", [SnipScore(), MovementScore(0.1), TaylorScore()])
def test_scores_by_gradients_are_those_of_the_functions(score: Any) -> None:
    from secateur import prune

    model, loss = small_net(), nn.functional.cross_entropy
    weights = prunable_weights(model)
    by_hand = {
        SnipScore: lambda: prune.snip_scores(model, weights, BATCH, loss),
        TaylorScore: lambda: prune.taylor_scores(model, weights, BATCH, loss),
        MovementScore: lambda: prune.movement_scores(model, weights, BATCH, loss, learning_rate=0.1),
    }[type(score)]()
    assert same(WeightPruning(score).masks(model, 0.4, BATCH), keep_globally(by_hand, 0.4))
    with pytest.raises(SparsityError, match="`batches` must hold at least one batch"):
        WeightPruning(score).masks(model, 0.4)


def test_a_pattern_of_n_of_m_is_all_or_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    pruning = WeightPruning(allocation=NOfM(2, 4), schedule=OneShot)
    assert mask_density(pruning.masks(model, 0.5)) == 0.5
    assert mask_density(pruning.masks(model, 0.7)) == 1.0
    with pytest.raises(SparsityError, match=r"`density` must be at least 0\.5 for 2 of 4; got 0\.4"):
        pruning.masks(model, 0.4)


def test_another_plan_is_another_run(tmp_path: Path) -> None:
    run(Blobs(48), folder=tmp_path)
    with pytest.raises(TrainingError, match=r"sparsify was Sparsify\(density=0\.25.* now Sparsify\(density=0\.5"):
        run(Blobs(48), Sparsify(0.5, GRADUAL.pruning), folder=tmp_path)


@pytest.mark.parametrize("density", [0.0, 1.0, -0.1, float("nan")])
def test_densities_out_of_range_are_refused(density: float) -> None:
    with pytest.raises(SparsityError, match=r"`density` must be the fraction of weights kept, in \(0, 1\)"):
        Sparsify(density)


def test_an_update_every_zero_steps_is_refused() -> None:
    with pytest.raises(SparsityError, match="`every` must be at least 1; got 0"):
        WeightPruning(every=0)
