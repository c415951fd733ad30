"""Curves are read back from the event files, the way TensorBoard itself reads them."""

import io
import time
from collections.abc import Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LABELS_ONLY, Blobs, fit_small, small_config, small_net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from secateur.errors import TrainingError
from secateur.train import Callbacks, Silent, TensorBoard, TerminalProgress


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) pairs of every scalar of one run."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def run(callbacks: Callbacks, epochs: int = 2, folder: Path | None = None) -> Any:
    return fit_small(
        small_net(),
        Blobs(100),
        train=small_config(epochs, batch_size=4),
        objective=LABELS_ONLY,
        validation=Blobs(8),
        folder=folder,
        callbacks=callbacks,
    )


def test_every_number_is_logged_at_its_step_and_handed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("secateur.train.callbacks"), "SECONDS_PER_LOOK", 0.0)
    stream = io.StringIO()
    trained = run(TensorBoard(tmp_path / "new" / "events", TerminalProgress(stream)))
    found = scalars(tmp_path / "new" / "events" / "train")
    assert set(found) == {
        "train/loss", "train/learning_rate", "train/mean_loss", "train/mean_label", "train/validation_score",
        "train/validation_loss", "train/images_per_s", "train/last_learning_rate", "train/seconds",
    }  # fmt: skip
    assert [step for step, _ in found["train/loss"]] == list(range(1, 51))
    rates = [rate for _, rate in found["train/learning_rate"]]
    schedule = small_config(2, batch_size=4)
    assert rates == pytest.approx([schedule.learning_rate_at(step, steps=50) for step in range(50)])
    mean = [(25 * r.epoch, pytest.approx(r.train_loss)) for r in trained.history[1:]]
    assert found["train/mean_loss"] == mean
    assert sum(value for _, value in found["train/loss"][25:]) / 25 == pytest.approx(trained.history[2].train_loss)
    accuracy = [(25 * r.epoch, pytest.approx(r.validation_score)) for r in trained.history]
    assert found["train/validation_score"] == accuracy
    assert [line[:9] for line in stream.getvalue().splitlines()] == ["epoch 0/2", "epoch 1/2", "epoch 2/2"]


class Dies(Silent):
    """Like a kill in the middle of the third epoch."""

    @contextmanager
    def start(self, loop: str, *, epochs: int, steps: int, done: int):
        yield self

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        if (epoch, step) == (3, 20):
            raise KeyboardInterrupt

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        pass


def test_a_resumed_run_goes_on_at_its_step_and_leaves_no_trace_of_what_it_repeats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("secateur.train.callbacks"), "SECONDS_PER_LOOK", 1e9)
    run(TensorBoard(tmp_path / "whole", Silent()), epochs=4)
    with pytest.raises(KeyboardInterrupt):
        run(TensorBoard(tmp_path / "parts", Dies()), epochs=4, folder=tmp_path / "checkpoint")
    assert [step for step, _ in scalars(tmp_path / "parts" / "train")["train/loss"]] == [20, 25, 45, 50, 70]
    run(TensorBoard(tmp_path / "parts", Silent()), epochs=4, folder=tmp_path / "checkpoint")
    whole, parts = (scalars(tmp_path / name / "train") for name in ("whole", "parts"))
    assert [step for step, _ in whole["train/loss"]] == [20, 25, 45, 50, 70, 75, 95, 100]
    assert len(whole["train/validation_loss"]) == 5
    for name in whole.keys() - {"train/images_per_s", "train/seconds"}:
        assert parts[name] == whole[name]


def test_a_run_that_begins_anew_replaces_the_curves_of_its_kind_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board, began = TensorBoard(tmp_path, Silent()), time.time()
    for number, (what, loss) in enumerate((("search", 1.0), ("train", 2.0), ("train", 3.0))):
        # Files are read in the order of their names: a second, then a counter, of which 10 comes before 9.
        monkeypatch.setattr(time, "time", lambda now=began + number: now)
        with board.start(what, epochs=1, steps=10, done=0) as meter:
            meter.step(1, 7, {"loss": loss})
    assert scalars(tmp_path / "search") == {"search/loss": [(7, 1.0)]}
    assert scalars(tmp_path / "train") == {"train/loss": [(7, 3.0)]}


def test_an_error_closes_the_file_and_the_inner_meter(tmp_path: Path) -> None:
    events: list[str] = []

    class Inner(Silent):
        @contextmanager
        def start(self, loop: str, *, epochs: int, steps: int, done: int):
            try:
                with super().start(loop, epochs=epochs, steps=steps, done=done) as meter:
                    yield meter
            finally:
                events.append("closed")

    def interrupted() -> None:
        with TensorBoard(tmp_path, Inner()).start("train", epochs=1, steps=10, done=0) as meter:
            meter.step(1, 3, {"loss": 0.5})
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        interrupted()
    assert events == ["closed"]
    assert scalars(tmp_path / "train") == {"train/loss": [(3, 0.5)]}


def test_the_random_state_stays(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    with TensorBoard(tmp_path, Silent()).start("train", epochs=1, steps=1, done=0) as meter:
        meter.epoch(1, {"loss": 0.5}, "epoch 1/1")
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_logged_to_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(TrainingError, match=r"`folder` must be a folder for event files; got the file .*Name another"):
        TensorBoard(file)
    monkeypatch.setattr(import_module("secateur.train.callbacks"), "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=r"must have the package tensorboard; got none\. Run: pip install"):
        TensorBoard(tmp_path)


def test_a_folder_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """TensorBoard writes paths as UTF-8, and would end in the midst of a run."""
    with pytest.raises(TrainingError, match=r"`folder` must be a path that is text.*PYTHONUTF8=1"):
        TensorBoard(tmp_path / "logs\udcff")
