"""Streams, messages, signals and exit codes of the commands.

Whatever goes wrong becomes one clear message and exit code 2; SIGINT, SIGTERM and SIGHUP end a long command in good
order.
"""

import functools
import json
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.text import Text

from secateur._text import visible
from secateur.cli.messages import describe_foreign, flags_of, in_flags
from secateur.errors import SecateurError, TrainingError

if TYPE_CHECKING:
    from rich.console import ConsoleOptions
    from rich.segment import Segment

BAD_INPUT = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The last one comes when a terminal or a connection is closed."""
_STOPPING = b"\nStopping: a checkpoint is written after this step. The same signal once more ends everything at once.\n"
_WIDTH = 120
"""Characters of a line where nobody watches, so that no table is cut."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


class PlainConsole(Console):
    """A console that shows escapes for the characters that cannot be printed, whatever is shown (`secateur._text`).

    Only what rich itself adds for styles goes through, after this.
    """

    def render(self, renderable: Any, options: "ConsoleOptions | None" = None) -> "Iterable[Segment]":
        """Return the segments of what is shown, see `rich.console.Console.render`."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))

    def on_broken_pipe(self) -> None:
        """Drop what nobody reads any more; the command goes on."""


def out() -> Console:
    """Return a console for standard output."""
    return _console(stderr=False)


def err() -> Console:
    """Return a console for standard error."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return PlainConsole(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else _WIDTH)


class _Steps(logging.Handler):
    """Prints every logged step on standard error, or as a line of JSON on standard output."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def emit(self, record: logging.LogRecord) -> None:
        if self._as_json:
            print_json("step", {"message": record.getMessage()})
            return
        err().print(Text(record.getMessage(), style="dim"), soft_wrap=True)


def print_json(kind: str, fields: Mapping[str, object]) -> None:
    """Print one line of JSON on standard output, for machines; numbers that are not finite are null."""
    from secateur._json import finite

    out().print(Text(json.dumps({"kind": kind, **finite(fields)})), soft_wrap=True)


@dataclass(frozen=True)
class JsonLines:
    """Callbacks that print each epoch of a loop as a line of JSON."""

    @contextmanager
    def start(self, loop: str, *, epochs: int, steps: int, done: int) -> "Generator[_JsonLoop]":
        """See `secateur.train.Callbacks.start`."""
        del steps, done
        yield _JsonLoop(loop, epochs)


@dataclass(frozen=True)
class _JsonLoop:
    loop: str
    epochs: int

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        pass

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        del line
        print_json("epoch", {"loop": self.loop, "epoch": epoch, "epochs": self.epochs, **numbers})


@contextmanager
def logged(*, quiet: bool, as_json: bool = False) -> Generator[None]:
    """Show the steps of a run, which are logged to the logger ``secateur``, within a block."""
    logger, handler = logging.getLogger("secateur"), _Steps(as_json=as_json)
    before = logger.level, logger.propagate
    if not quiet:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def handle_errors(command: _Command) -> _Command:
    """Make a command end with a message and a code, never with a traceback (unless it is asked for, or a bug).

    The code is 2 for whatever the user can fix, 130 for an interrupt (see also `resumable`). The command takes
    ``debug`` as a keyword argument. It is for one process: several that torchrun has started would do the same.
    """

    @functools.wraps(command)
    def alone(*args: Any, **kwargs: Any) -> Any:
        _check_alone()
        return command(*args, **kwargs)

    return handle_errors_together(alone)  # type: ignore[return-value]


def handle_errors_together(command: _Command) -> _Command:
    """Do what `handle_errors` does, for a command that torchrun may start several times at once."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with _shown_warnings(command):
                return command(*args, **kwargs)
        except KeyboardInterrupt:
            err().print("Interrupted. Nothing was written.")
            raise SystemExit(INTERRUPTED) from None
        except (SecateurError, OSError) as error:
            if kwargs.get("debug"):
                raise
            raise end_with_error(in_flags(_message(error), flags_of(command))) from error
        except BaseException as error:
            said = describe_foreign(error)
            if said is None or (kwargs.get("debug") and not isinstance(error, SystemExit)):
                raise
            if kwargs.get("debug"):
                traceback.print_exception(error)
            raise end_with_error(in_flags(said, flags_of(command))) from None

    return run  # type: ignore[return-value]


def end_with_error(message: str) -> SystemExit:
    """Print an error message; return the exception that ends the command."""
    err().print(Text(f"Error: {message}", style="bold red"), soft_wrap=True)
    return SystemExit(BAD_INPUT)


def _check_alone() -> None:
    """Refuse to be one of several processes that torchrun has started.

    Raises:
        TrainingError: If so.
    """
    from secateur._runtime import process_count

    together = process_count()
    if together > 1:
        raise TrainingError(
            f"This command must run in one process; got number {os.environ['RANK']} of {together} (RANK, WORLD_SIZE). "
            "Start it without torchrun; compress and distill train on several."
        )


def _message(error: Exception) -> str:
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror or error}{where}. Check the path, its permissions and the space on the disk."
    return str(error)


@contextmanager
def _shown_warnings(command: Callable[..., Any]) -> Generator[None]:
    """Show warnings as one line each on standard error, in the flags of a command, within a block."""
    from secateur._runtime import is_main_process

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and is_main_process():
            said = in_flags(str(message), flags_of(command))
            err().print(Text(f"Warning: {said}", style="yellow"), soft_wrap=True)

    with warnings.catch_warnings():
        if "PYTHONWARNINGS" not in os.environ:
            warnings.simplefilter("once", UserWarning)
        warnings.showwarning = show
        yield


def relative_path(path: Path) -> Path:
    """Return the path from the working directory if it lies in it, as people write it; else the path itself."""
    with suppress(OSError, ValueError):  # The directory is gone, or the path lies elsewhere.
        return path.relative_to(Path.cwd())
    return path


def command_line() -> str:
    """Return the exact command, for the record."""
    program = Path(sys.argv[0] if sys.argv else "")
    ours = program.name in ("secateur", "secateur.exe") or program.parts[-2:] == ("secateur", "__main__.py")
    text = shlex.join(["secateur", *sys.argv[1:]]) if ours else f"secateur ({program.name})"
    return text.encode(errors="backslashreplace").decode()  # file names need not be text


@dataclass
class Caught:
    """The signal that came.

    Attributes:
        number: The number of the signal; None if none came.
    """

    number: int | None = None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it."""
        return INTERRUPTED if self.number is None else 128 + self.number


def work_of(out_folder: Path) -> Path | None:
    """Return the folder of the unfinished run that writes to ``out_folder``, if there is one."""
    work = out_folder.parent / f"{out_folder.name}.work"
    return work if work.is_dir() else None


def resumable(
    command: _Command, *, work: Callable[[Path], Path | None] = work_of, program: str = "secateur"
) -> _Command:
    """Make a command that can be resumed end in good order when it is interrupted: 130 for SIGINT, 143 for SIGTERM, 129
    for SIGHUP.

    Args:
        command: A command that takes ``out_folder`` as a keyword argument.
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
                err().print(Text(_way_to_resume(work(kwargs["out_folder"]), program)), soft_wrap=True)
                raise SystemExit(caught.exit_code) from None

    return run  # type: ignore[return-value]


@contextmanager
def signal_handler() -> Generator[Caught]:
    """Let SIGINT, SIGTERM and SIGHUP stop a block; the handlers that were there are put back at its end.

    A signal that whoever started the process lets it ignore (nohup, a shell without job control) stays ignored.

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
                _handle_in_child(number)
                return
            caught.number = number
            for each in before:
                signal.signal(each, signal.SIG_DFL)
            if not stop.acknowledged:
                raise KeyboardInterrupt
            stop.ask()
            with suppress(OSError):  # Nobody may read it.
                os.write(2, _STOPPING)  # Not by print, which may be what was interrupted.

        now = {each: signal.getsignal(each) for each in _SIGNALS}
        before = {each: handler for each, handler in now.items() if handler != signal.SIG_IGN}
        for each in before:
            signal.signal(each, handle)
        try:
            yield caught
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


def _handle_in_child(number: int) -> None:
    """Handle a signal in a forked worker: Ctrl-C goes to all processes of a terminal, and the parent ends this one."""
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _way_to_resume(work: Path | None, program: str) -> str:
    if work is None:
        return "Interrupted. Nothing was written."
    words = [word for word in sys.argv[1:] if word not in ("--restart", "--resume")]
    again = f"{program} {shlex.join([*words, '--resume'])}"
    return f"Interrupted. The work so far is in {work}: continue with the same command and --resume:\n{again}"
