"""Showing a long loop while it runs. Pass `Silent()` for nothing, `TerminalProgress()` for a bar, or your own."""

import sys
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from time import perf_counter
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

COLUMNS = 80
"""The bar with everything beside it fits into the narrowest usual terminal."""

_BAR, _ETA = 10, 13
"""Columns of the bar itself, and of the time left with its word and spaces."""


class Meter(Protocol):
    """Receives the course of one loop. Both counts begin with 1."""

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        """Called now and then within an epoch, at least once.

        Args:
            epoch: The epoch that the step is of.
            step: Within the epoch.
            numbers: Of this step, by name, the most telling first.
        """
        ...

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        """Called at the end of every epoch, and for epoch 0 if something is measured before the loop.

        Args:
            epoch: The epoch that ended.
            numbers: Of the whole epoch, by name, for logs; other names than those of the steps.
            line: The epoch in words, for people.
        """
        ...


class Progress(Protocol):
    """Opens a `Meter` for a loop."""

    def watch(self, what: str, *, epochs: int, steps: int, done: int) -> AbstractContextManager[Meter]:
        """A meter that is closed when the loop ends, also by an error.

        Args:
            what: What the loop does, one word such as ``train`` or ``search``.
            epochs: Epochs of the whole loop.
            steps: Steps per epoch.
            done: Epochs done by an earlier, resumed process.
        """
        ...


@dataclass(frozen=True)
class Silent:
    """Shows nothing."""

    @contextmanager
    def watch(self, what: str, *, epochs: int, steps: int, done: int) -> Generator[Meter]:
        """See `Progress.watch`."""
        del what, epochs, steps, done
        yield _SilentMeter()


@dataclass(frozen=True)
class TerminalProgress:
    """A progress bar and a line per epoch; only the lines where the stream is not a terminal.

    Attributes:
        stream: Where to write; None means standard error.
    """

    stream: TextIO | None = None

    @contextmanager
    def watch(self, what: str, *, epochs: int, steps: int, done: int) -> Generator[Meter]:
        """See `Progress.watch`."""
        stream = self.stream or sys.stderr
        if not stream.isatty():
            yield _LineMeter(stream, epochs, done)
            return
        with _bar(stream) as bar:
            yield _BarMeter(bar, what, epochs, steps, done)


class _SilentMeter:
    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        pass

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        pass


class _LineMeter:
    def __init__(self, stream: TextIO, epochs: int, done: int) -> None:
        self._stream, self._epochs, self._done = stream, epochs, done
        self._began = perf_counter()

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        pass

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        run, left = epoch - self._done, self._epochs - epoch
        if run > 0 and left > 0:
            seconds = (perf_counter() - self._began) / run * left
            line += f"  ETA {timedelta(seconds=round(seconds))}"
        print(line, file=self._stream, flush=True)


class _BarMeter:
    def __init__(self, bar: "Bar", what: str, epochs: int, steps: int, done: int) -> None:
        self._bar, self._what, self._epochs, self._steps = bar, what, epochs, steps
        self._task = bar.add_task(what, total=epochs * steps, completed=done * steps, numbers=what)

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        place = f"{self._what} {epoch}/{self._epochs}  step {step}/{self._steps}"
        line = _compact(place, numbers, COLUMNS - _BAR - _ETA)
        self._bar.update(self._task, completed=(epoch - 1) * self._steps + step, numbers=line)

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        self._bar.console.print(line, highlight=False)


def _compact(place: str, numbers: Mapping[str, float], columns: int) -> str:
    """As many of the numbers as there is room for. A name of several words is told by its initials: lr."""
    line = place
    for name, value in numbers.items():
        words = name.split("_")
        short = name if len(words) == 1 else "".join(word[:1] for word in words)
        longer = f"{line}  {short} {value:.3g}"
        if len(longer) > columns:
            break
        line = longer
    return line


def _bar(stream: TextIO) -> "Bar":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        BarColumn(bar_width=_BAR),
        TextColumn("{task.fields[numbers]}  ETA", markup=False),
        TimeRemainingColumn(),
        console=Console(file=stream),
        refresh_per_second=2,  # Enough to see that it lives; drawing takes time from the loop.
    )
