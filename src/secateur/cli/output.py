"""A terminal that shows names of strangers, and does nothing that they say.

What a command says while it runs and at its end.

What the commands print: plain numbers with their units.

SIGINT and SIGTERM while a long command computes: it stops in good order, and says how to go on.

Where errors become one clear message, and the process' settings are put back."""

from __future__ import annotations

import functools
import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from secateur._runtime import is_first, processes
from secateur.errors import SecateurError, TrainingError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import ConsoleOptions
    from rich.segment import Segment

    from secateur.pipeline.config import CompressResult
    from secateur.pipeline.distill import Distilled
    from secateur.report.html import Page
    from secateur.report.run import Check, Measured, RunReport


_KEPT = frozenset("\n\t")
_INSTEAD = "\N{REPLACEMENT CHARACTER}"


class PlainConsole(Console):
    """Replaces the characters that cannot be printed, whatever is shown.

    Names of classes, modules and files can hold escape sequences, which change colors, titles or the clipboard of a
    terminal; marks that reverse the order of letters; and halves of characters, which cannot be written at all. Only
    what rich itself adds for styles goes through, after this.
    """

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of what is shown, see `rich.console.Console.render`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def printable(text: str) -> str:
    """The text with a replacement character for each that cannot be printed; line ends and tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _KEPT else _INSTEAD for c in text)


def show(result: CompressResult | Distilled) -> None:
    """The tables of a finished run; ends with an error if a check failed."""

    print_before_after(result.report)
    print_steps(result.report)
    print_exports(result.report)
    print_checks(result.report.checks)
    print_written(result.files)
    if result.failed:
        err().print(Text("Error: " + "; ".join(result.failed), style="bold red"), soft_wrap=True)
        raise SystemExit(BAD_INPUT)


def tell(message: str) -> None:
    """A step of the way, on standard error."""
    err().print(Text(message, style="dim"), soft_wrap=True)


def silent(message: str) -> None:
    """Nothing."""
    del message


def print_before_after(report: RunReport) -> None:
    """Accuracy, MACs, parameters, file size and latency of the original and the compressed model."""
    from secateur.cost.budget import format_count

    title = ", ".join(filter(None, (report.model, report.budget)))
    table = plain_table(title, ("", "before", "after", "change"), numbers=3)
    before, after = report.before, report.after
    if before.accuracy is not None and after.accuracy is not None:
        change = f"{100 * (after.accuracy.top1 - before.accuracy.top1):+.2f} points"
        table.add_row(f"test accuracy (n = {after.accuracy.n})", _accuracy(before), _accuracy(after), change)
    for name, old, new in (("MACs", before.macs, after.macs), ("parameters", before.params, after.params)):
        table.add_row(name, format_count(old), format_count(new), _relative(old, new))
    if after.weights != after.params:
        counts = format_count(before.weights), format_count(after.weights)
        table.add_row("non-zero parameters", *counts, _relative(before.weights, after.weights))
    if before.size_bytes is not None and after.size_bytes is not None:
        sizes = f"{format_count(before.size_bytes)}B", f"{format_count(after.size_bytes)}B"
        table.add_row("weights file", *sizes, _relative(before.size_bytes, after.size_bytes))
    for record in report.latency:
        name = f"latency, {record.runtime}, {record.threads} thread, batch {record.batch_size}"
        times = f"{1e3 * record.before[1]:.3g} ms", f"{1e3 * record.after[1]:.3g} ms"
        table.add_row(name, *times, f"{record.speedup[1]:.2f} x the speed")
    if report.efficiency is not None:
        efficiency = [f"{value:.2f}" for value in report.efficiency]
        table.add_row("Performance Efficiency over non-zero parameters (ours)", "1.00", efficiency[0], "")
        table.add_row("Performance Efficiency over MACs (ours)", "1.00", efficiency[1], "")
    out().print(table)


def print_steps(report: RunReport) -> None:
    """Accuracy on the way."""
    way = " -> ".join(f"{step.name} {100 * step.accuracy.top1:.2f} %" for step in report.steps)
    out().print(Text(f"Test accuracy: {way}"), soft_wrap=True)


def print_exports(report: RunReport) -> None:
    """Files for other runtimes: size, and of those in 8-bit integers accuracy and time beside the float file's."""
    from secateur.cost.budget import format_count

    if not report.exports:
        return
    columns = ("file", "size", "difference", "accuracy", "in float", "same answer", "time", "float file's")
    table = plain_table("Files for other runtimes", columns, numbers=len(columns) - 1)
    for file in report.exports:
        accuracies = (file.accuracy, file.float_accuracy)
        shares = [None if each is None else each.top1 for each in accuracies] + [file.agreement]
        times = () if file.latency is None else (file.latency.after[1], file.latency.before[1])
        table.add_row(
            file.name,
            f"{format_count(file.size_bytes)}B",
            "" if file.difference is None else f"{file.difference:.1e}",
            *("" if share is None else f"{100 * share:.2f} %" for share in shares),
            *(f"{1e3 * seconds:.3g} ms" for seconds in times),
        )
    out().print(table)


def print_checks(checks: Iterable[Check]) -> None:
    """What was verified."""
    table = plain_table("Checks", ("check", "", "largest difference", "detail"), numbers=0)
    for check in checks:
        difference = ""
        if check.max_rel is not None and check.tolerance is not None:
            difference = f"{check.max_rel:.1e} (at most {check.tolerance:.0e})"
        table.add_row(
            check.name, "passed" if check.passed else Text("FAILED", style="bold red"), difference, check.detail
        )
    out().print(table)


def print_written(paths: Iterable[Path]) -> None:
    """What was written, with sizes."""
    from secateur.cost.budget import format_count

    for path in paths:
        out().print(Text(f"Wrote {path} ({format_count(path.stat().st_size)}B)"), soft_wrap=True)


def print_page(page: Page) -> None:
    """The tables of a page."""
    for shown in page.tables:
        table = plain_table(shown.title, shown.columns, numbers=len(shown.columns) - 1)
        for row in shown.rows:
            table.add_row(*row)
        out().print(table)
    for note in page.notes:
        out().print(Text(note), soft_wrap=True)


def plain_table(title: str, columns: tuple[str, ...], *, numbers: int) -> Table:
    """An empty table; the last ``numbers`` columns are to the right."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for place, column in enumerate(columns):
        right = place >= len(columns) - numbers
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    return table


def _accuracy(measured: Measured) -> str:
    assert measured.accuracy is not None
    return f"{100 * measured.accuracy.top1:.2f} %"


def _relative(before: float, after: float) -> str:
    return f"{100 * (after / before - 1):+.1f} %" if before else ""


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STOPPING = b"\nStopping: a checkpoint is written after this step. The same signal once more ends everything at once.\n"

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass
class Caught:
    """The signal that came.

    Attributes:
        number: Of the signal; None if none came.
    """

    number: int | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it."""
        return INTERRUPTED if self.number is None else 128 + self.number


def work_of(out_folder: Path) -> Path | None:
    """Return the folder of the unfinished run that writes to ``out_folder``, if there is one."""
    work = out_folder.with_name(f"{out_folder.name}.work")
    return work if work.is_dir() else None


def resumable(
    command: _Command, *, work: Callable[[Path], Path | None] = work_of, program: str = "secateur"
) -> _Command:
    """Make a command that can be resumed end in good order when it is interrupted: 130 for SIGINT, 143 for SIGTERM.

    Args:
        command: A command with an ``out_folder`` argument.
        work: Finds the unfinished work for an output folder.
        program: How the command is started, for the message that says how to continue.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        with signal_handler() as caught:
            try:
                return command(*args, **kwargs)
            except (KeyboardInterrupt, SecateurError) as error:
                # Libraries catch interrupts and end with an error of their own, as torch's exporters do.
                if isinstance(error, SecateurError) and caught.number is None:
                    raise
                err().print(Text(_after(work(kwargs["out_folder"]), program)), soft_wrap=True)
                raise SystemExit(caught.exit_code) from None

    return run  # type: ignore[return-value]


@contextmanager
def signal_handler() -> Generator[Caught]:
    """A block that SIGINT and SIGTERM stop; the handlers that were there are put back at its end.

    The first signal ends a training or search after its next step, with a checkpoint, and everything else at once, by
    a `KeyboardInterrupt`. The second is the system's: it ends the process, whatever that is doing. In other threads
    than the main one, which hear of no signals, nothing is changed.
    """
    from secateur._runtime import stoppable

    caught, owner = Caught(), os.getpid()
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    with stoppable() as stop:

        def handle(number: int, _frame: FrameType | None) -> None:
            if os.getpid() != owner:
                _in_a_child(number)
                return
            caught.number = number
            for each in _SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            if not stop.heard:
                raise KeyboardInterrupt
            stop.ask()
            os.write(2, _STOPPING)  # Not by print, which may be what was interrupted.

        before = {each: signal.signal(each, handle) for each in _SIGNALS}
        try:
            yield caught
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def _in_a_child(number: int) -> None:
    """A forked worker has the handlers too. Ctrl-C goes to all processes of a terminal: this one's parent ends it."""
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _after(work: Path | None, program: str) -> str:
    if work is None:
        return "Interrupted. Nothing was written."
    words = [word for word in sys.argv[1:] if word not in ("--restart", "--resume")]
    again = f"{program} {shlex.join([*words, '--resume'])}"
    return f"Interrupted. The work so far is in {work}: go on with the same command and --resume:\n{again}"


BAD_INPUT = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


def out() -> Console:
    """Standard output; wide where nobody watches, so that no table is cut."""
    return _console(stderr=False)


def err() -> Console:
    """Standard error."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return PlainConsole(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else 120)


def handle_errors(command: _Command) -> _Command:
    """Make a command end with a message and a code, never with a traceback (unless it is asked for, or a bug).

    Code 2 for whatever the user can mend, 130 for an interrupt (see also `resumable`). The command
    must have a ``debug`` argument. It is for one process: several that torchrun has started would do the same.
    """

    @functools.wraps(command)
    def alone(*args: Any, **kwargs: Any) -> Any:
        _check_alone()
        return command(*args, **kwargs)

    return handle_errors_together(alone)  # type: ignore[return-value]


def handle_errors_together(command: _Command) -> _Command:
    """As `handle_errors`, for a command that torchrun may start several times at once."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with _spoken_warnings():
                return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise _end("Interrupted. Nothing was written.", INTERRUPTED) from None
        except (SecateurError, OSError) as error:
            if kwargs.get("debug"):
                raise
            raise _end(f"Error: {_message(error)}", BAD_INPUT) from error

    return run  # type: ignore[return-value]


def command_line() -> str:
    """The exact command, for the record."""
    program = Path(sys.argv[0] if sys.argv else "")
    ours = program.name in ("secateur", "secateur.exe") or program.parts[-2:] == ("secateur", "__main__.py")
    text = shlex.join(["secateur", *sys.argv[1:]]) if ours else f"secateur ({program.name})"
    return text.encode(errors="backslashreplace").decode()  # file names need not be text


@contextmanager
def threads(count: int | None) -> Generator[None]:
    """PyTorch's threads on the CPU for a while."""
    import torch

    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_alone() -> None:
    """Refuse to be one of several processes that torchrun has started.

    Raises:
        TrainingError: If so.
    """
    together = processes()
    if together > 1:
        raise TrainingError(
            f"This command must run in one process; got number {os.environ['RANK']} of {together} (RANK, WORLD_SIZE). "
            "Start it without torchrun; compress and distill train on several."
        )


def _end(message: str, code: int) -> SystemExit:
    err().print(Text(message, style="bold red" if code == BAD_INPUT else ""), soft_wrap=True)
    return SystemExit(code)


def _message(error: Exception) -> str:
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{where}. Check the path, its permissions and the room on the disk."
    return str(error)


@contextmanager
def _spoken_warnings() -> Generator[None]:
    """Warnings as one line each on standard error."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and is_first():
            err().print(Text(f"Warning: {message}", style="yellow"), soft_wrap=True)

    with warnings.catch_warnings():
        if "PYTHONWARNINGS" not in os.environ:
            warnings.simplefilter("once", UserWarning)
        warnings.showwarning = show
        yield
