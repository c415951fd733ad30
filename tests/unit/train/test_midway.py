"""Checkpoints within an epoch: a run that goes on from one ends as if it had never been interrupted."""

import contextlib
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_runs import LABELS_ONLY, Blobs, Fragile, Killed, fit_small, same, small_config, small_net, state
from tas_runs import Recorder
from torch import nn

from secateur.distill import AlignedFeatures, Objective, Tap
from secateur.errors import TrainingError
from secateur.prune import Sparsify, WeightPruning
from secateur.train import SGD, AdamW, CheckpointPolicy, Silent, Stopped, Trained, stoppable

EVERY_STEP = CheckpointPolicy(math.inf, 1)
STEPS = 3
"""Of each of two epochs."""


def run(source: Blobs, student: nn.Module | None = None, **more: Any) -> Trained:
    defaults: dict[str, Any] = {
        "train": small_config(2),
        "objective": LABELS_ONLY,
        "callbacks": Silent(),
        "checkpoints": EVERY_STEP,
    }
    return fit_small(student or small_net(dropout=0.3), source, **(defaults | more))


def without_times(trained: Trained) -> list[dict[str, Any]]:
    return [record.to_json() | {"seconds": 0.0, "images_per_s": None} for record in trained.history]


def assert_same(one: Trained, other: Trained) -> None:
    assert same(state(one.model), state(other.model))
    assert without_times(one) == without_times(other)
    assert (one.best_epoch, one.best_score) == (other.best_epoch, other.best_score)


TAUGHT: dict[str, Any] = {"teacher": small_net(5), "objective": Objective()}
RUNS: list[dict[str, Any]] = [
    {"validation": Blobs(16, seed=1), "train": small_config(2, learning_rate=0.2)},
    {"train": small_config(2, optimizer=AdamW(), learning_rate=0.01, ema_decay=0.9)},
    {**TAUGHT, "train": small_config(2, optimizer=SGD(momentum=0.0, nesterov=False))},
    {
        "teacher": small_net(5),
        "objective": Objective(feature_weight=1.0),
        "alignment": AlignedFeatures((Tap("1", 1, 8, tuple(range(8))),)),
    },
    {"sparsify": Sparsify(0.5, WeightPruning())},
]


@pytest.mark.filterwarnings("ignore:`teacher` is right on")
@pytest.mark.parametrize("more", RUNS)
@pytest.mark.parametrize(("epoch", "step"), [(0, 1), (0, 2), (1, 2)])
def test_a_run_killed_within_an_epoch_goes_on_bit_for_bit(
    tmp_path: Path, more: dict[str, Any], epoch: int, step: int
) -> None:
    whole = run(Blobs(48), **more)
    with pytest.raises(Killed):
        run(Fragile(48, epoch, step), folder=tmp_path, **more)
    torch.manual_seed(99)
    source = Blobs(48)
    resumed = run(source, folder=tmp_path, **more)
    assert [(call["epoch"], call["start"]) for call in source.calls if call["seed"] is not None] == [
        (epoch, step),
        *((later, 0) for later in range(epoch + 1, 2)),
    ]
    assert_same(resumed, whole)


@settings(max_examples=12, deadline=None)
@given(kills=st.lists(st.integers(0, 2 * STEPS - 1), min_size=1, max_size=3), every=st.integers(1, 4))
def test_any_kills_at_any_steps_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], every: int
) -> None:
    folder = tmp_path_factory.mktemp("run")
    for kill in kills:
        with contextlib.suppress(Killed):  # Where an earlier process came further, this one runs to the end.
            run(Fragile(48, *divmod(kill, STEPS)), folder=folder, checkpoints=CheckpointPolicy(math.inf, every))
    assert_same(run(Blobs(48), folder=folder), run(Blobs(48)))


def test_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(Fragile(48, 0, 2), folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-000000-step-000001",
        "epoch-000000-step-000002",
    ]
    with pytest.raises(Killed):
        run(Fragile(48, 1, 1), folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-000001", "epoch-000001-step-000001"]


def test_a_damaged_one_within_an_epoch_is_passed_over(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(Fragile(48, 0, 2), folder=tmp_path)
    damaged = tmp_path / "epoch-000000-step-000002" / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    source = Blobs(48)
    with pytest.warns(UserWarning, match="going on from .*epoch-000000-step-000001, because later ones are damaged"):
        resumed = run(source, folder=tmp_path)
    assert source.calls[0]["start"] == 1
    assert_same(resumed, run(Blobs(48)))


class Clock:
    """Goes on by as many seconds at each look."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


@pytest.mark.parametrize(("seconds", "written"), [(300.0, [2, 4]), (200.0, [3]), (700.0, [1, 2, 3, 4, 5])])
def test_checkpoints_are_written_by_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, written: list[int]
) -> None:
    """Every 600 seconds: the clock is looked at once when the loop begins, in every step, and at every writing."""
    seen: list[str] = []
    monkeypatch.setattr(
        import_module("secateur.train.checkpoint"), "save_checkpoint", lambda folder, saved: seen.append(saved.name)
    )
    monkeypatch.setattr(import_module("secateur.train.checkpoint"), "monotonic", Clock(seconds))
    run(Blobs(80), train=small_config(1), folder=tmp_path, checkpoints=CheckpointPolicy())
    within = [int(name[-6:]) for name in seen if "step" in name]
    assert within == written
    assert seen[-1] == "epoch-000001"


def test_no_checkpoints_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        import_module("secateur.train.checkpoint"), "save_checkpoint", lambda *_: pytest.fail("nothing to write to")
    )
    assert len(run(Blobs(48)).history) == 2


@pytest.mark.parametrize("settings", [{"seconds": 0.0}, {"seconds": math.nan}, {"steps": 0}])
def test_bad_times_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(TrainingError, match=f"`{name}` between checkpoints must be"):
        CheckpointPolicy(**settings)


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_nothing_is_missing_in_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("secateur.train.callbacks"), "SECONDS_PER_LOOK", -1.0)
    whole, first, second = Recorder(), Recorder(), Recorder()
    run(Blobs(48), callbacks=whole)
    with pytest.raises(Killed):
        run(Fragile(48, 1, 2), folder=tmp_path, callbacks=first)
    run(Blobs(48), folder=tmp_path, callbacks=second)
    assert [(epoch, step) for epoch, step, _ in whole.steps] == [(e, s) for e in (1, 2) for s in (1, 2, 3)]
    # What the interrupted process showed of the epoch that it did not end is shown again.
    assert first.steps[:3] + second.steps == whole.steps
    assert second.opened == [{"what": "train", "epochs": 2, "steps": 3, "done": 1}]


def test_time_is_summed_up_over_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("secateur.train.trainer"), "perf_counter", Clock(1.0))
    with pytest.raises(Killed):
        run(Fragile(48, 0, 2), folder=tmp_path)
    (record,) = run(Blobs(48), folder=tmp_path, train=small_config(2)).history[:1]
    # Begun, asked at each of two checkpoints; then begun again, a checkpoint, and the end.
    assert record.seconds == 2.0 + 2.0
    assert record.images_per_s == 48 / 4


# --- teachers ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`teacher` is right on")
@pytest.mark.parametrize("step", [1, 2])
def test_remembered_logits_of_an_interrupted_epoch_are_whole(tmp_path: Path, step: int) -> None:
    whole = run(Blobs(48), teacher_cache=tmp_path / "wanted", **TAUGHT)
    remembered: dict[str, Any] = {"teacher_cache": tmp_path / "logits", "folder": tmp_path / "run", **TAUGHT}
    with pytest.raises(Killed):
        run(Fragile(48, 0, step), **remembered)
    assert not list((tmp_path / "logits").glob("seed*"))
    assert_same(run(Blobs(48), **remembered), whole)
    for path in (tmp_path / "wanted").glob("seed*"):
        assert (tmp_path / "logits" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.filterwarnings("ignore:`teacher` is right on")
def test_remembered_logits_of_another_run_are_read_in_the_middle(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(Fragile(48, 0, 2), teacher_cache=tmp_path / "logits", folder=tmp_path / "run", **TAUGHT)
    whole = run(Blobs(48), teacher_cache=tmp_path / "logits", **TAUGHT)
    assert_same(run(Blobs(48), teacher_cache=tmp_path / "logits", folder=tmp_path / "run", **TAUGHT), whole)


def test_a_teacher_that_guesses_is_found_over_both_halves_of_an_epoch(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(Fragile(48, 0, 2), folder=tmp_path, **TAUGHT)
    with pytest.warns(UserWarning, match="`teacher` is right on .* % of 48 training images"):
        run(Blobs(48), folder=tmp_path, **TAUGHT)


# --- stopping ---------------------------------------------------------------------------------------------------------


class Asking(Blobs):
    """Asks the run to stop before a step of the first epoch."""

    def __init__(self, n: int, stop: Any, step: int) -> None:
        super().__init__(n)
        self.stop, self.step, self.heard = stop, step, False

    def batches(self, batch_size: int, **settings: Any):
        for step, batch in enumerate(super().batches(batch_size, **settings)):
            if (settings["epoch"], step) == (0, self.step):
                self.heard = self.stop.acknowledged
                self.stop.ask()
            yield batch


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint_after_the_step(tmp_path: Path, step: int) -> None:
    with stoppable() as stop:
        source = Asking(48, stop, step)
        assert not stop.acknowledged
        with pytest.raises(Stopped, match=r"stopped on request; see .*run") as stopped:
            run(source, folder=tmp_path / "run", checkpoints=CheckpointPolicy())
    assert source.heard
    assert not stop.acknowledged
    assert stopped.value.folder == tmp_path / "run"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [f"epoch-000000-step-{step + 1:06d}"]
    assert_same(run(Blobs(48), folder=tmp_path / "run"), run(Blobs(48)))


def test_without_a_folder_nothing_is_kept() -> None:
    with stoppable() as stop, pytest.raises(Stopped, match="nothing was kept") as stopped:
        run(Asking(48, stop, 1))
    assert stopped.value.folder is None


def test_a_request_during_validation_stops_after_the_epoch_is_kept(tmp_path: Path) -> None:
    class Last(Blobs):
        def batches(self, batch_size: int, **settings: Any):
            yield from super().batches(batch_size, **settings)
            if len(self.calls) == 3:  # Before training, and after both epochs.
                stop.ask()

    with stoppable() as stop, pytest.raises(Stopped):
        run(Blobs(48), validation=Last(16), folder=tmp_path)
    assert (tmp_path / "epoch-000002").is_dir()
    assert_same(run(Blobs(48), validation=Blobs(16), folder=tmp_path), run(Blobs(48), validation=Blobs(16)))


def test_the_innermost_block_is_asked_and_only_inside_of_it() -> None:
    with stoppable() as outer:
        outer.ask()
        with stoppable():
            run(Blobs(48))
        with pytest.raises(Stopped):
            run(Blobs(48))
    run(Blobs(48))


def test_stopped_is_no_error_that_somebody_would_catch() -> None:
    assert issubclass(Stopped, KeyboardInterrupt)
    assert not issubclass(Stopped, Exception)
