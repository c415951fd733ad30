import io
import math
import re
from collections.abc import Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
from small_runs import LABELS_ONLY, Blobs, fit_small, small_config, small_net

from secateur.train import Silent, TerminalProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(progress: Any, epochs: int = 2) -> None:
    schedule = small_config(epochs, batch_size=4)
    fit_small(
        small_net(),
        Blobs(100),
        train=schedule,
        objective=LABELS_ONLY,
        validation=Blobs(8),
        callbacks=progress,
    )


def test_a_stream_that_is_no_terminal_gets_one_line_per_epoch() -> None:
    stream = io.StringIO()
    run(TerminalProgress(stream))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"epoch 0/2  validation \d+\.\d\d % \(loss \d\.\d{4}\)", lines[0])
    numbers = r"loss \d\.\d{4} \(label \d\.\d{4}\)  lr \S+  validation \d+\.\d\d % \(loss \d\.\d{4}\)"
    assert re.fullmatch(rf"epoch 1/2  {numbers}  \d+\.\d s  \d+ images/s  ETA \d:\d\d:\d\d", lines[1])
    assert re.fullmatch(rf"epoch 2/2  {numbers}  \d+\.\d s  \d+ images/s", lines[2])


def test_slow_steps_are_shown_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("secateur.train.callbacks"), "SECONDS_PER_LOOK", 0.0)
    seen: list[int] = []

    class Steps(Silent):
        @contextmanager
        def start(self, loop: str, *, epochs: int, steps: int, done: int):
            yield self

        def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
            seen.append(step)

        def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
            pass

    run(Steps(), epochs=1)
    assert seen == list(range(1, 26))


def test_a_terminal_gets_a_bar_with_everything() -> None:
    stream = Terminal()
    run(TerminalProgress(stream))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"train 2/2  step 25/25  loss \d\.\d+  lr \S+  ETA", text)
    assert "ETA" in text
    assert re.search(r"epoch 2/2 +loss \d\.\d{4} \(label", text)


def test_the_default_writes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    run(TerminalProgress(), epochs=1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 2


def test_silent_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    run(Silent())
    assert capfd.readouterr() == ("", "")


def test_a_progress_of_ones_own_sees_the_run_and_is_closed_by_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("secateur.train.callbacks"), "SECONDS_PER_LOOK", math.inf)
    events: list[Any] = []

    class Mine:
        @contextmanager
        def start(self, loop: str, *, epochs: int, steps: int, done: int):
            events.append((loop, epochs, steps, done))
            try:
                yield self
            finally:
                events.append("closed")

        def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
            events.append((epoch, step, *numbers))
            assert numbers["loss"] > 0
            assert numbers["learning_rate"] > 0

        def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
            events.append((epoch, *numbers))
            assert line.startswith(f"epoch {epoch}/2  ")
            if epoch == 1:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(Mine())
    validated = ("validation_score", "validation_loss")
    assert events == [
        ("train", 2, 25, 0),
        (0, *validated),
        (1, 20, "loss", "learning_rate"),
        (1, 25, "loss", "learning_rate"),
        (1, "mean_loss", "mean_label", "last_learning_rate", *validated, "seconds", "images_per_s"),
        "closed",
    ]


def test_the_bar_fits_80_columns_and_leaves_out_what_has_no_room() -> None:
    stream = Terminal()
    numbers = {"loss": 1234.5678, "architecture_loss": 0.00012345, "entropy": 0.98765, "macs": 0.54321, "late": 1.0}
    with TerminalProgress(stream).start("search", epochs=12, steps=390, done=10) as meter:
        meter.step(11, 389, numbers)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = re.split(r"[\r\n]+", text)
    assert any("search 11/12  step 389/390  loss 1.23e+03  al 0.000123  ETA" in line for line in lines), lines
    assert "entropy" not in text
    assert max(map(len, lines)) <= 80


def test_lines_of_a_resumed_loop_reckon_with_its_own_epochs() -> None:
    stream = io.StringIO()
    with TerminalProgress(stream).start("search", epochs=4, steps=1, done=2) as meter:
        meter.epoch(2, {}, "as it was")
        meter.epoch(3, {}, "search 3/4  entropy 0.5")
        meter.epoch(4, {}, "search 4/4")
    first, second, last = stream.getvalue().splitlines()
    assert first == "as it was"
    assert re.fullmatch(r"search 3/4  entropy 0\.5  ETA \d:\d\d:\d\d", second)
    assert last == "search 4/4"
