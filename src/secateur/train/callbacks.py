"""Showing a long loop while it runs. Pass `Silent()` for nothing, `TerminalProgress()` for a bar, or your own.

The epochs of long loops as a table in a file.

A long loop as curves in TensorBoard."""

import csv
import io
import sys
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Protocol, TextIO

from secateur._files import write_whole
from secateur.errors import TrainingError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from torch.utils.tensorboard import SummaryWriter


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


_LOOP, _EPOCH = "loop", "epoch"

Row = dict[str, str]


@dataclass(frozen=True)
class CsvLog:
    """Keeps a table of all epochs, and hands everything on.

    A row is an epoch: which loop it is of (``train``, ``search``), its number, then every number of it by name, empty
    where a loop has no such number. The file is whole at any moment, and written anew with every epoch. A resumed loop
    goes on where its checkpoint was: rows after that are replaced. A loop that begins anew replaces all rows of its
    kind.

    Attributes:
        path: The file; made with the first epoch.
        inner: Shows the loop as well.
    """

    path: Path
    inner: Progress = TerminalProgress()

    @contextmanager
    def watch(self, what: str, *, epochs: int, steps: int, done: int) -> Generator[Meter]:
        """See `Progress.watch`.

        Raises:
            TrainingError: If the file is no such table, or cannot be written.
        """
        # Epoch 0 is what was measured before the loop; one that goes on has it already, also within its first epoch.
        rows = [row for row in _read(self.path) if row[_LOOP] != what or int(row[_EPOCH]) <= done]
        with self.inner.watch(what, epochs=epochs, steps=steps, done=done) as inner:
            yield _RowMeter(self.path, rows, what, inner)


class _RowMeter:
    def __init__(self, path: Path, rows: list[Row], what: str, inner: Meter) -> None:
        self._path, self._rows, self._what, self._inner = path, rows, what, inner

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        self._inner.step(epoch, step, numbers)

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        named = {name: repr(float(value)) for name, value in numbers.items()}
        # One that begins anew measures epoch 0 again.
        self._rows = [row for row in self._rows if row[_LOOP] != self._what or int(row[_EPOCH]) < epoch]
        self._rows.append({_LOOP: self._what, _EPOCH: str(epoch), **named})
        _write(self._path, self._rows)  # Before the checkpoint that follows: nothing that it has done is missing.
        self._inner.epoch(epoch, numbers, line)


def _read(path: Path) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file, strict=True)
            if list(table.fieldnames or ())[:2] != [_LOOP, _EPOCH]:
                raise ValueError(f"the first line is {','.join(table.fieldnames or ())!r:.80}")
            rows = [{name: value for name, value in row.items() if value} for row in table]
        for row in rows:
            int(row[_EPOCH])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise TrainingError(
            f"{path} must be a table of epochs, begun by an earlier part of this run; got something else ({error}). "
            "Move it away."
        ) from error
    return rows


def _write(path: Path, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    try:
        write_whole(path, text.getvalue().encode())
    except OSError as error:
        raise TrainingError(
            f"{path} must be a file that can be written; {error}. Make room or mend the permissions, and go on."
        ) from error


@dataclass(frozen=True)
class TensorBoard:
    """Logs all numbers as scalars for ``tensorboard --logdir FOLDER``, and hands everything on.

    Each kind of loop is a run of its own, ``<folder>/<what>``, with the scalars ``<what>/<name>``. Numbers of steps
    and of epochs share one time axis, the steps since the beginning of the loop. A resumed loop goes on where its
    checkpoint was: what an interrupted process logged after that is replaced. A loop that begins anew replaces
    everything.

    Attributes:
        folder: Where the event files go; made if it is not there.
        inner: Shows the loop as well.

    Raises:
        TrainingError: If the package tensorboard is not installed, or the folder is a file.
    """

    folder: Path
    inner: Progress = TerminalProgress()

    def __post_init__(self) -> None:
        if find_spec("tensorboard") is None:
            raise TrainingError(
                "`TensorBoard` must have the package tensorboard; got none. Run: pip install tensorboard"
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise TrainingError(f"`folder` must be a folder for event files; got the file {self.folder}. Name another.")

    @contextmanager
    def watch(self, what: str, *, epochs: int, steps: int, done: int) -> Generator[Meter]:
        """See `Progress.watch`."""
        from torch.utils.tensorboard import SummaryWriter

        # Steps up to the checkpoint are on disk and stay; step 0 is what was measured before the loop.
        first = done * steps + 1 if done else 0
        with (
            SummaryWriter(self.folder / what, purge_step=first) as writer,
            self.inner.watch(what, epochs=epochs, steps=steps, done=done) as inner,
        ):
            yield _ScalarMeter(writer, inner, what, steps)


class _ScalarMeter:
    def __init__(self, writer: "SummaryWriter", inner: Meter, what: str, steps: int) -> None:
        self._writer, self._inner, self._what, self._steps = writer, inner, what, steps

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        self._add(numbers, (epoch - 1) * self._steps + step)
        self._inner.step(epoch, step, numbers)

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        self._add(numbers, epoch * self._steps)
        self._writer.flush()  # Before the checkpoint that follows: a killed process loses nothing it can go on from.
        self._inner.epoch(epoch, numbers, line)

    def _add(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(f"{self._what}/{name}", value, step)
