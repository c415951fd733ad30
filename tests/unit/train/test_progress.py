import io
import math
import re
from contextlib import contextmanager
from typing import Any

import pytest
from small_runs import LABELS_ONLY, Blobs, small_net, small_schedule

from secateur.train import EpochRecord, Silent, TerminalProgress, fit


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(progress: Any, epochs: int = 2) -> None:
    schedule = small_schedule(epochs, batch_size=4)
    fit(
        small_net(),
        Blobs(100),
        schedule=schedule,
        objective=LABELS_ONLY,
        validation=Blobs(8),
        progress=progress,
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
    monkeypatch.setattr("secateur.train._ledger.SECONDS_PER_LOOK", 0.0)
    seen: list[int] = []

    class Steps(Silent):
        @contextmanager
        def watch(self, *, epochs: int, steps: int, done: int):
            yield self

        def step(self, epoch: int, step: int, loss: float, learning_rate: float) -> None:
            seen.append(step)

        def epoch(self, record: EpochRecord) -> None:
            pass

    run(Steps(), epochs=1)
    assert seen == list(range(1, 26))


def test_a_terminal_gets_a_bar_with_everything() -> None:
    stream = Terminal()
    run(TerminalProgress(stream))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert re.search(r"epoch 2/2 +step 20/25 +loss \d\.\d{4} +lr \S+", text)
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
    monkeypatch.setattr("secateur.train._ledger.SECONDS_PER_LOOK", math.inf)
    events: list[Any] = []

    class Mine:
        @contextmanager
        def watch(self, *, epochs: int, steps: int, done: int):
            events.append((epochs, steps, done))
            try:
                yield self
            finally:
                events.append("closed")

        def step(self, epoch: int, step: int, loss: float, learning_rate: float) -> None:
            events.append((epoch, step))
            assert loss > 0
            assert learning_rate > 0

        def epoch(self, record: EpochRecord) -> None:
            events.append(record.epoch)
            if record.epoch == 1:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(Mine())
    assert events == [(2, 25, 0), 0, (1, 20), 1, "closed"]
