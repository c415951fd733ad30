"""Showing a run while it runs. Pass `Silent()` for nothing, `TerminalProgress()` for a bar, or your own `Progress`."""

import sys
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter
from typing import TYPE_CHECKING, Protocol, TextIO

from secateur.train._record import EpochRecord

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Meter(Protocol):
    """Receives the course of one run."""

    def step(self, epoch: int, step: int, loss: float, learning_rate: float) -> None:
        """Called every second, or every 20 steps if they are faster; ``epoch`` and ``step`` count from 1."""
        ...

    def epoch(self, record: EpochRecord) -> None:
        """Called at the end of every epoch, and for epoch 0 if the student is validated before training."""
        ...


class Progress(Protocol):
    """Opens a `Meter` for a run."""

    def watch(self, *, epochs: int, steps: int, done: int) -> AbstractContextManager[Meter]:
        """A meter that is closed when the run ends, also by an error.

        Args:
            epochs: Epochs of the whole run.
            steps: Steps per epoch.
            done: Epochs done by an earlier, resumed run.
        """
        ...


@dataclass(frozen=True)
class Silent:
    """Shows nothing."""

    @contextmanager
    def watch(self, *, epochs: int, steps: int, done: int) -> Generator[Meter]:
        """See `Progress.watch`."""
        del epochs, steps, done
        yield _SilentMeter()


@dataclass(frozen=True)
class TerminalProgress:
    """A progress bar and a line per epoch; only the lines where the stream is not a terminal.

    Attributes:
        stream: Where to write; None means standard error.
    """

    stream: TextIO | None = None

    @contextmanager
    def watch(self, *, epochs: int, steps: int, done: int) -> Generator[Meter]:
        """See `Progress.watch`."""
        stream = self.stream or sys.stderr
        if not stream.isatty():
            yield _LineMeter(stream, epochs, done)
            return
        with _bar(stream) as bar:
            yield _BarMeter(bar, epochs, steps, done)


class _SilentMeter:
    def step(self, epoch: int, step: int, loss: float, learning_rate: float) -> None:
        pass

    def epoch(self, record: EpochRecord) -> None:
        pass


class _LineMeter:
    def __init__(self, stream: TextIO, epochs: int, done: int) -> None:
        self._stream, self._epochs, self._done = stream, epochs, done
        self._began = perf_counter()

    def step(self, epoch: int, step: int, loss: float, learning_rate: float) -> None:
        pass

    def epoch(self, record: EpochRecord) -> None:
        line = epoch_line(record, self._epochs)
        run = record.epoch - self._done
        left = self._epochs - record.epoch
        if run > 0 and left > 0:
            seconds = (perf_counter() - self._began) / run * left
            line += f"  ETA {timedelta(seconds=round(seconds))}"
        print(line, file=self._stream, flush=True)


class _BarMeter:
    def __init__(self, bar: "Bar", epochs: int, steps: int, done: int) -> None:
        self._bar, self._epochs, self._steps = bar, epochs, steps
        self._task = bar.add_task("train", total=epochs * steps, completed=done * steps, numbers="")

    def step(self, epoch: int, step: int, loss: float, learning_rate: float) -> None:
        numbers = f"epoch {epoch}/{self._epochs}  step {step}/{self._steps}  loss {loss:.4f}  lr {learning_rate:.2g}"
        self._bar.update(self._task, completed=(epoch - 1) * self._steps + step, numbers=numbers)

    def epoch(self, record: EpochRecord) -> None:
        self._bar.console.print(epoch_line(record, self._epochs), highlight=False)


def epoch_line(record: EpochRecord, epochs: int) -> str:
    """One epoch in words, such as ``epoch 3/20  loss 0.4120  lr 0.012  validation 91.20 %``."""
    words = [f"epoch {record.epoch}/{epochs}"]
    if record.train_loss is not None:
        parts = ", ".join(f"{name} {value:.4f}" for name, value in record.parts.items())
        words.append(f"loss {record.train_loss:.4f} ({parts})")
    if record.learning_rate is not None:
        words.append(f"lr {record.learning_rate:.2g}")
    if record.validation_accuracy is not None:
        words.append(f"validation {100 * record.validation_accuracy:.2f} % (loss {record.validation_loss:.4f})")
    if record.images_per_s is not None:
        words.append(f"{record.seconds:.1f} s  {record.images_per_s:.0f} images/s")
    return "  ".join(words)


def _bar(stream: TextIO) -> "Bar":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        BarColumn(bar_width=10),  # All of the line fits into 80 columns.
        TextColumn("{task.fields[numbers]}  ETA"),
        TimeRemainingColumn(),
        console=Console(file=stream),
        refresh_per_second=2,  # Enough to see that it lives; drawing takes time from the training.
    )
