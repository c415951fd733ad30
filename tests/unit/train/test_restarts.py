"""A training that diverges begins again with a tenth of the learning rate, and never ends worse than it began."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import LABELS_ONLY, Blobs, Killed, fit_small, same, small_config, small_net, state, steep_net

from secateur.distill import Objective
from secateur.errors import TrainingError
from secateur.prune import Sparsify, WeightPruning
from secateur.train import SGD, AdamW, CheckpointPolicy, Silent, Trained, evaluate
from secateur.train.callbacks import CsvLog, DivergenceWatch

EVERY_STEP = CheckpointPolicy(math.inf, 1)
VALIDATION = Blobs(48, seed=1)


def run(rate: float, *, restarts: int = 2, source: Blobs | None = None, epochs: int = 2, **more: Any) -> Trained:
    also = more.pop("also", {})
    train = small_config(epochs, learning_rate=rate, restarts=restarts, warmup_fraction=0.0, **also)
    defaults: dict[str, Any] = {"objective": LABELS_ONLY, "callbacks": Silent(), "validation": VALIDATION}
    return fit_small(more.pop("student", steep_net()), source or Blobs(96), train=train, **(defaults | more))


def without_times(trained: Trained) -> list[dict[str, Any]]:
    return [record.to_json() | {"seconds": 0.0, "images_per_s": None} for record in trained.history]


def assert_same(one: Trained, other: Trained) -> None:
    assert same(state(one.model), state(other.model))
    assert without_times(one) == without_times(other)
    assert (one.best_epoch, one.best_score, one.divergences) == (
        other.best_epoch,
        other.best_score,
        other.divergences,
    )


@pytest.mark.parametrize("more", [{}, {"validation": None}, {"also": {"ema_decay": 0.9}}, {"also": {"clip_norm": 9.0}}])
def test_the_second_try_is_a_training_with_a_tenth_of_the_rate(
    more: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "secateur"):
        found = run(300.0, **more)
    assert 1 <= len(found.divergences) <= 2
    assert not found.gave_up
    rate = 300.0
    for _ in found.divergences:
        rate /= 10
    assert_same(found, dataclass_with(run(rate, restarts=0, **more), found.divergences))
    assert caplog.messages == list(found.divergences)
    assert "It began again with the learning rate 30 instead of 300." in found.divergences[0]
    assert found.history[-1].learning_rate < rate


def dataclass_with(trained: Trained, divergences: tuple[str, ...]) -> Trained:
    from dataclasses import replace

    return replace(trained, divergences=divergences)


@pytest.mark.parametrize("optimizer", [SGD(), AdamW(), SGD(momentum=0.0, nesterov=False)])
def test_nothing_ends_worse_than_it_started(optimizer: Any) -> None:
    student = steep_net()
    before = evaluate(student, VALIDATION)
    found = run(1e9, student=student, also={"optimizer": optimizer})
    after = evaluate(found.model, VALIDATION)
    assert (after.value, -after.loss) >= (before.value, -before.loss)
    assert found.best_score == after.value
    assert len(found.divergences) == (3 if found.gave_up else len(found.divergences))


@pytest.mark.parametrize("validation", [None, VALIDATION])
def test_a_training_that_always_diverges_gives_the_student_back(validation: Blobs | None) -> None:
    class Spoilt(Blobs):
        """What no learning rate helps against."""

        def batches(self, batch_size: int, **settings: Any):
            for images, labels in super().batches(batch_size, **settings):
                yield images * math.nan, labels

    student = small_net()
    found = run(0.05, student=student, source=Spoilt(48), validation=validation)
    assert found.gave_up
    assert found.best_epoch == 0
    assert same(state(found.model), state(student))
    assert len(found.divergences) == 3
    assert found.divergences[-1].startswith("The training diverged again: the loss (total nan, label nan) must stay")
    with pytest.raises(TrainingError, match="must stay finite; that failed at epoch 1, step 1"):
        run(0.05, student=student, source=Spoilt(48), validation=validation, restarts=0)


def test_a_sparse_student_that_always_diverges_is_pruned_all_the_same() -> None:
    found = run(1e12, sparsify=Sparsify(0.5, WeightPruning()), validation=None, also={"clip_norm": None})
    assert found.gave_up
    masked = [m for m in found.model.modules() if hasattr(m, "parametrizations")]
    zeros = sum(int((m.weight == 0).sum()) for m in masked)
    assert zeros > 0.4 * sum(m.weight.numel() for m in masked)


def test_a_healthy_training_is_the_same_with_and_without_restarts(tmp_path: Path) -> None:
    for more in ({}, {"also": {"ema_decay": 0.9}}, {"folder": tmp_path / "run", "checkpoints": EVERY_STEP}):
        assert_same(run(0.1, restarts=2, **more), run(0.1, restarts=0, **{**more, "folder": None}))


class Late(Blobs):
    """Breaks off in the tries before, and dies in the last one: epoch and step from 0 count over all tries."""

    def __init__(self, n: int, die_at: int) -> None:
        super().__init__(n)
        self.left = die_at

    def batches(self, batch_size: int, **settings: Any):
        for batch in super().batches(batch_size, **settings):
            if settings.get("seed") is not None:
                if self.left == 0:
                    raise Killed
                self.left -= 1
            yield batch


@pytest.mark.parametrize("policy", [EVERY_STEP, CheckpointPolicy()])
@pytest.mark.parametrize("die_at", [0, 1, 2, 3, 5, 8, 11])
def test_a_training_killed_in_any_try_is_resumed_bit_for_bit(
    tmp_path: Path, die_at: int, policy: CheckpointPolicy
) -> None:
    whole = run(300.0)
    assert whole.divergences
    with pytest.raises(Killed):
        run(300.0, source=Late(96, die_at), folder=tmp_path, checkpoints=policy)
    assert_same(run(300.0, folder=tmp_path, checkpoints=policy), whole)


def test_logs_hold_the_last_try_alone(tmp_path: Path) -> None:
    found = run(300.0, callbacks=CsvLog(tmp_path / "log.csv", Silent()))
    rows = (tmp_path / "log.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[1]) for row in rows] == [record.epoch for record in found.history]


def test_checkpoints_after_a_restart_are_those_of_the_new_try(tmp_path: Path) -> None:
    found = run(300.0, folder=tmp_path)
    saved = json.loads((tmp_path / "epoch-000002" / "state.json").read_text())
    assert saved["numbers"]["divergences"] == list(found.divergences)


@pytest.mark.filterwarnings("ignore:`teacher` is right on")
def test_a_student_that_still_equals_its_teacher_is_not_taken_for_one_that_diverges() -> None:
    """Its first loss is near 0, and any step away from it is many times that."""
    teacher = small_net(5)
    found = run(0.5, student=small_net(5), teacher=teacher, objective=Objective(kd_weight=1.0, label_weight=0.0))
    assert found.divergences == ()


@given(st.lists(st.floats(0.0, 25.0), max_size=60), st.floats(0.01, 20.0))
def test_losses_near_those_of_the_beginning_are_healthy(losses: list[float], first: float) -> None:
    watch = DivergenceWatch()
    assert not any(watch.note(loss) for loss in [first, *losses])
    assert not watch.ends_above


@given(st.lists(st.floats(0.1, 20.0), min_size=1, max_size=30), st.floats(30.01, 1e6))
def test_three_high_losses_in_a_row_are_divergence(losses: list[float], times: float) -> None:
    watch = DivergenceWatch()
    for loss in losses:
        watch.note(loss)
    high = times * max(20.0, *losses)
    again = DivergenceWatch.from_json(json.loads(json.dumps(watch.to_json())))
    for each in (watch, again):
        assert [each.note(high), each.note(high), each.ends_above, each.note(high)] == [False, False, True, True]


def test_a_single_odd_batch_is_no_divergence() -> None:
    watch = DivergenceWatch()
    assert not any(watch.note(loss) for loss in [1.0, 1e3, 1e3, 1.0, 1e3, 1e3, 1.0])


def test_losses_that_end_high_are_divergence() -> None:
    class Last(Blobs):
        """The last batch of the run is a thousand times as bright."""

        def batches(self, batch_size: int, **settings: Any):
            for step, (images, labels) in enumerate(super().batches(batch_size, **settings)):
                yield images * (1e4 if (settings.get("epoch"), step) == (1, 5) else 1), labels

    found = run(0.05, source=Last(96), validation=None)
    assert found.gave_up
    assert "at the end of epoch 2" in found.divergences[0]
