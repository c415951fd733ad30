"""Callbacks show a long loop while it runs: on the terminal, in a CSV file, or as TensorBoard curves.

Pass `Silent()` for nothing, `TerminalProgress()` for a bar, `CsvLog` or `TensorBoard` around one of these, or your own
`Callbacks`. `LossMeter` reads the losses of an epoch from the device and hands them to the callbacks.
"""

import csv
import io
import math
import sys
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import torch
from torch import Tensor

from secateur._files import write_atomic
from secateur._kinds import settings
from secateur._text import csv_cell, csv_text, is_text, visible
from secateur.errors import TrainingError

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from torch.utils.tensorboard import SummaryWriter


class LoopCallbacks(Protocol):
    """Receives the numbers of one loop. Both counts begin with 1."""

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        """Receive the numbers of a step; called from time to time within an epoch, at least once.

        Args:
            epoch: The epoch of the step.
            step: The step within the epoch.
            numbers: Numbers by name, the most important first.
        """
        ...

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        """Receive the numbers of an epoch at its end, and of epoch 0 if something is measured before the loop.

        Args:
            epoch: The epoch that ended.
            numbers: Numbers of the whole epoch by name, for logs. The names differ from those of the steps.
            line: The epoch in words, for people.
        """
        ...


class Callbacks(Protocol):
    """Opens the `LoopCallbacks` of every loop of a run: a search, a training."""

    def start(self, loop: str, *, epochs: int, steps: int, done: int) -> AbstractContextManager[LoopCallbacks]:
        """Return a context with the callbacks of one loop. It is left when the loop ends, also by an error.

        Args:
            loop: What the loop does, one word such as ``train`` or ``search``.
            epochs: Epochs of the whole loop.
            steps: Steps per epoch.
            done: Epochs done by an earlier process whose run is resumed.
        """
        ...


@settings
class Silent:
    """Callbacks that show nothing."""

    @contextmanager
    def start(self, loop: str, *, epochs: int, steps: int, done: int) -> Generator[LoopCallbacks]:
        """See `Callbacks.start`."""
        del loop, epochs, steps, done
        yield _SilentLoop()


COLUMNS = 80
"""The bar with everything beside it fits into the narrowest usual terminal."""

_BAR, _ETA = 10, 13
"""Columns of the bar itself, and of the time left with its word and spaces."""


@settings
class TerminalProgress:
    """A progress bar and a line per epoch; only the lines where the stream is not a terminal.

    Attributes:
        stream: Where to write; None means standard error.
    """

    stream: TextIO | None = None

    @contextmanager
    def start(self, loop: str, *, epochs: int, steps: int, done: int) -> Generator[LoopCallbacks]:
        """See `Callbacks.start`."""
        # Looked up when the loop starts, because tests and notebooks replace sys.stderr.
        stream = self.stream or sys.stderr
        if not stream.isatty():
            yield _LineLoop(stream, epochs, done)
            return
        with _bar(stream) as bar:
            yield _BarLoop(bar, loop, epochs, steps, done)


class _SilentLoop:
    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        pass

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        pass


class _LineLoop:
    def __init__(self, stream: TextIO, epochs: int, done: int) -> None:
        self._stream, self._epochs, self._done = stream, epochs, done
        self._began = perf_counter()

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        pass

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        # Epochs of an earlier process say nothing about the speed of this one.
        run, left = epoch - self._done, self._epochs - epoch
        if run > 0 and left > 0:
            seconds = (perf_counter() - self._began) / run * left
            line += f"  ETA {timedelta(seconds=round(seconds))}"
        print(line, file=self._stream, flush=True)


class _BarLoop:
    def __init__(self, bar: "Bar", loop: str, epochs: int, steps: int, done: int) -> None:
        self._bar, self._loop, self._epochs, self._steps = bar, loop, epochs, steps
        self._task = bar.add_task(loop, total=epochs * steps, completed=done * steps, numbers=loop)

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        place = f"{self._loop} {epoch}/{self._epochs}  step {step}/{self._steps}"
        line = _compact(place, numbers, COLUMNS - _BAR - _ETA)
        self._bar.update(self._task, completed=(epoch - 1) * self._steps + step, numbers=line)

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        self._bar.console.print(line, highlight=False)


def _compact(place: str, numbers: Mapping[str, float], columns: int) -> str:
    """As many of the numbers as there is room for. A name of several words is shortened to its initials: lr."""
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
        refresh_per_second=2,  # Enough to see that the loop runs; drawing takes time from it.
    )


_LOOP, _EPOCH = "loop", "epoch"

CsvRow = dict[str, str]


@settings
class CsvLog:
    """Callbacks that keep a CSV table of all epochs, and pass everything on to others.

    A row is an epoch: the loop (``train``, ``search``), the number of the epoch, then every number of it by name, empty
    where a loop has no such number. The file is complete at any moment: every epoch writes it again. A resumed loop
    replaces the rows after its checkpoint, and a loop that begins again replaces all of its rows.

    Attributes:
        path: The file, created at the end of the first epoch.
        inner: The callbacks that everything is passed on to.
    """

    path: Path
    inner: Callbacks = TerminalProgress()

    @contextmanager
    def start(self, loop: str, *, epochs: int, steps: int, done: int) -> Generator[LoopCallbacks]:
        """See `Callbacks.start`.

        Raises:
            TrainingError: If the file is not such a table, or cannot be written.
        """
        # Epoch 0 is measured before the loop; a resumed loop has it already, also within its first epoch.
        named = visible(loop, keep="")
        rows = [row for row in _read(self.path) if row[_LOOP] != named or int(row[_EPOCH]) <= done]
        with self.inner.start(loop, epochs=epochs, steps=steps, done=done) as inner:
            yield _CsvLoop(self.path, rows, named, inner)


class _CsvLoop:
    def __init__(self, path: Path, rows: list[CsvRow], loop: str, inner: LoopCallbacks) -> None:
        self._path, self._rows, self._loop, self._inner = path, rows, loop, inner

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        self._inner.step(epoch, step, numbers)

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        # repr, because it is read back to the same bits.
        named = {visible(name, keep=""): repr(float(value)) for name, value in numbers.items()}
        # A loop that begins again measures epoch 0 again.
        self._rows = [row for row in self._rows if row[_LOOP] != self._loop or int(row[_EPOCH]) < epoch]
        self._rows.append({_LOOP: self._loop, _EPOCH: str(epoch), **named})
        _write(self._path, self._rows)  # Before the checkpoint that follows, so that no epoch of it is missing.
        self._inner.epoch(epoch, numbers, line)


def _read(path: Path) -> list[CsvRow]:
    try:
        if path.exists() and not path.is_file():  # Nobody may ever write to a pipe.
            raise ValueError("it is a pipe, a device or a folder")
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file, strict=True)
            if list(table.fieldnames or ())[:2] != [_LOOP, _EPOCH]:
                raise ValueError(f"the first line is {','.join(table.fieldnames or ())!r:.80}")
            rows = [{csv_text(name): csv_text(value) for name, value in row.items() if value} for row in table]
        for row in rows:
            int(row[_EPOCH])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise TrainingError(
            f"{path} must be a table of epochs, written by an earlier part of this run; got something else ({error}). "
            "Move it away."
        ) from error
    return rows


def _write(path: Path, rows: list[CsvRow]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    table.writerow({name: csv_cell(name) for name in columns})
    table.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    try:
        write_atomic(path, text.getvalue())
    except OSError as error:
        raise TrainingError(
            f"{path} must be a file that can be written; {error}. Free some space or fix the permissions, and resume."
        ) from error


@settings
class TensorBoard:
    """Callbacks that log all numbers as scalars for ``tensorboard --logdir FOLDER``, and pass everything on to others.

    Each loop is a TensorBoard run of its own, ``<folder>/<loop>``, with the scalars ``<loop>/<name>``. Numbers of
    steps and of epochs share one time axis: the steps since the beginning of the loop. A resumed loop replaces what
    was logged after its checkpoint, and a loop that begins again replaces everything.

    Attributes:
        folder: The folder of the event files, created if it is missing.
        inner: The callbacks that everything is passed on to.

    Raises:
        TrainingError: If the package tensorboard is not installed, or the folder is a file or no text.
    """

    folder: Path
    inner: Callbacks = TerminalProgress()

    def __post_init__(self) -> None:
        # Found, not imported: importing takes time, and a loop may never start.
        if find_spec("tensorboard") is None:
            raise TrainingError(
                "`TensorBoard` must have the package tensorboard; got none. Run: pip install tensorboard"
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise TrainingError(f"`folder` must be a folder for event files; got the file {self.folder}. Name another.")
        if not is_text(self.folder):
            raise TrainingError(
                f"`folder` must be a path that is text, which TensorBoard needs; got {str(self.folder)!a}. Name "
                "another (--tensorboard), or set PYTHONUTF8=1 if your locale does not know its characters."
            )

    @contextmanager
    def start(self, loop: str, *, epochs: int, steps: int, done: int) -> Generator[LoopCallbacks]:
        """See `Callbacks.start`."""
        from torch.utils.tensorboard import SummaryWriter

        # Steps up to the checkpoint are on disk and stay; step 0 was measured before the loop.
        first = done * steps + 1 if done else 0
        with (
            SummaryWriter(self.folder / loop, purge_step=first) as writer,
            self.inner.start(loop, epochs=epochs, steps=steps, done=done) as inner,
        ):
            yield _TensorBoardLoop(writer, inner, loop, steps)


class _TensorBoardLoop:
    def __init__(self, writer: "SummaryWriter", inner: LoopCallbacks, loop: str, steps: int) -> None:
        self._writer, self._inner, self._loop, self._steps = writer, inner, loop, steps

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        self._add(numbers, (epoch - 1) * self._steps + step)
        self._inner.step(epoch, step, numbers)

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        self._add(numbers, epoch * self._steps)
        self._writer.flush()  # Before the checkpoint that follows, so that a killed process loses no epoch of it.
        self._inner.epoch(epoch, numbers, line)

    def _add(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(f"{self._loop}/{name}", value, step)


STEPS_PER_LOOK = 20
"""The losses are read after this many steps at the latest. Reading waits for the device, so it must be rare."""

SECONDS_PER_LOOK = 1.0
"""Where steps take long, losses are read sooner: one wait per second costs nothing."""


class DivergenceError(TrainingError):
    """A training whose numbers are no longer finite, or far from where they began: a lower learning rate may help."""


_TIMES = 30.0
"""A loss this many times that of the beginning is divergence: trainings that recover from a bad start stay far below,
and those that do not recover go far beyond."""
_LEAST_LOSS = 1.0
"""Losses of the beginning count as at least this, in nats: a student that still equals its teacher begins near 0."""
_BEGINNING = 10
_IN_A_ROW = 3
"""A single odd batch is no divergence."""


class DivergenceWatch:
    """Finds losses that stay far above those of the beginning of a training.

    With m the median of the first ten losses, or of those so far: three losses in a row above 30 * max(m, 1).
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._above = 0

    @property
    def limit(self) -> float:
        """The bound on the losses; infinite before the first one."""
        # The median, because one odd loss at the beginning must not raise the bound.
        return _TIMES * max(median(self._first), _LEAST_LOSS) if self._first else math.inf

    def note(self, loss: float) -> bool:
        """Note the loss of the next step, and return whether the training has diverged."""
        if loss > self.limit:
            self._above += 1
            return self._above >= _IN_A_ROW
        # Losses above the bound never get here, so they cannot raise it.
        self._above = 0
        if len(self._first) < _BEGINNING:
            self._first.append(loss)
        return False

    @property
    def ends_above(self) -> bool:
        """Whether the last loss was above the bound: what a training must not end with."""
        return self._above > 0

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON object."""
        return {"first": self._first, "above": self._above}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "DivergenceWatch":
        """Inverse of `to_json`."""
        watch = cls()
        watch._first, watch._above = [float(loss) for loss in data["first"]], int(data["above"])
        return watch


class LossMeter:
    """Sums the losses of one epoch, finds the first step whose losses are not finite, and keeps what was shown.

    Args:
        epoch: Number of the epoch, from 1.
        watch: Finds losses that are finite and far too high; None takes any.
        together: Whether other processes compute the same losses. All of them then raise an error in the same step,
            however their clocks differ: when a multiple of `STEPS_PER_LOOK` steps is done, and in `look`.

    Attributes:
        epoch: As given.
        steps: Steps so far.
        latest: Total loss of the last step that was read from the device.
    """

    def __init__(self, epoch: int, watch: DivergenceWatch | None = None, *, together: bool = False) -> None:
        self.epoch = epoch
        self._watch, self._together = watch, together
        self._found: DivergenceError | None = None
        self.steps = 0
        self.latest = math.nan
        self._sums: dict[str, float] = {}
        self._unread: list[Tensor] = []
        self._shown: list[tuple[int, dict[str, float]]] = []
        self._rates: list[float] = []
        self._looked = perf_counter()

    def add(self, losses: Mapping[str, Tensor], rate: float) -> bool:
        """Note the losses of one step without waiting for the device, and return whether they were read.

        Args:
            losses: The "total" first, then each part.
            rate: Learning rate of the step.

        Raises:
            DivergenceError: See `look`.
        """
        # Names are known with the first step only: they are those of the step's losses.
        if not self._sums:
            self._sums = dict.fromkeys(losses, 0.0)
        self._unread.append(torch.stack(list(losses.values())))
        self.steps += 1
        self._rates.append(rate)
        # A number of steps is the same in all processes, while their clocks differ.
        due = self._together and self.steps % STEPS_PER_LOOK == 0
        looks = due or len(self._unread) == STEPS_PER_LOOK or perf_counter() - self._looked > SECONDS_PER_LOOK
        if looks:
            self.read()
        if due:
            self.look()
        return looks

    def look(self) -> None:
        """Read the losses that were not read yet; this waits for the device.

        Raises:
            DivergenceError: If one of them is not finite, or they are far too high.
        """
        self.read()
        if self._found is not None:
            raise self._found

    def read(self) -> None:
        """Do what `look` does; with other processes raise nothing yet.

        Raises:
            DivergenceError: See `look`.
        """
        # One transfer for all steps since the last look.
        rows = torch.stack(self._unread).tolist() if self._unread else []
        first, rates = self.steps - len(rows) + 1, self._rates
        self._unread.clear()
        self._rates = []
        self._looked = perf_counter()
        for step, (row, rate) in enumerate(zip(rows, rates, strict=True), first):
            if self._found is None:
                self._found = self._problem(step, row, rate)
            # A process that raised alone would leave the others waiting for its gradients.
            if self._found is not None and not self._together:
                raise self._found
            for name, value in zip(self._sums, row, strict=True):
                self._sums[name] += value
            self.latest = row[0]

    def _problem(self, step: int, row: list[float], rate: float) -> DivergenceError | None:
        """What is wrong with the losses of a step, or with those of the steps before it."""
        if all(map(math.isfinite, row)):
            if self._watch is None or not self._watch.note(row[0]):
                return None
            bound = f"below {self._watch.limit:.3g}"
        else:
            bound = "finite"
        values = ", ".join(f"{name} {value:g}" for name, value in zip(self._sums, row, strict=True))
        return divergence_error(f"loss ({values})", f"epoch {self.epoch}, step {step}", rate, bound)

    def show(self, callbacks: LoopCallbacks, numbers: Mapping[str, float]) -> None:
        """Show numbers of the last step."""
        self._shown.append((self.steps, dict(numbers)))
        callbacks.step(self.epoch, self.steps, numbers)

    def show_again(self, callbacks: LoopCallbacks) -> None:
        """Show everything that was shown of the epoch before it was interrupted, so that no log has a gap."""
        for step, numbers in self._shown:
            callbacks.step(self.epoch, step, numbers)

    @property
    def means(self) -> dict[str, float]:
        """Mean of each loss over the steps so far.

        Raises:
            TrainingError: See `look`.
        """
        self.look()
        return {name: value / self.steps for name, value in self._sums.items()}

    def to_json(self) -> dict[str, Any]:
        """Return everything as a JSON object.

        Raises:
            TrainingError: See `look`.
        """
        self.look()
        return {"steps": self.steps, "latest": self.latest, "sums": self._sums, "shown": self._shown}

    @classmethod
    def from_json(
        cls, epoch: int, data: Mapping[str, Any], watch: DivergenceWatch | None = None, *, together: bool = False
    ) -> "LossMeter":
        """Inverse of `to_json`."""
        meter = cls(epoch, watch, together=together)
        meter.steps, meter.latest = int(data["steps"]), float(data["latest"])
        meter._sums = {name: float(value) for name, value in data["sums"].items()}
        meter._shown = [(int(step), dict(numbers)) for step, numbers in data["shown"]]
        return meter


def divergence_error(what: str, where: str, rate: float, bound: str = "finite") -> DivergenceError:
    """The error for a run whose numbers are no longer finite, or no longer within another bound."""
    return DivergenceError(
        f"the {what} must stay {bound}; that failed at {where} (learning rate {rate:.3g}). "
        "Lower the learning rate or warm up longer, and check that the images are normalized."
    )
