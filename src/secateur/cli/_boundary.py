"""Where errors become one clear message, and the process' settings are put back."""

import functools
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from secateur.cli._console import PlainConsole
from secateur.errors import SecateurError, TrainingError
from secateur.workers import is_first, processes

BAD_INPUT = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

_Command = TypeVar("_Command", bound=Callable[..., Any])


def out() -> Console:
    """Standard output; wide where nobody watches, so that no table is cut."""
    return _console(stderr=False)


def err() -> Console:
    """Standard error."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return PlainConsole(stderr=stderr, highlight=False, markup=False, width=None if stream.isatty() else 120)


def told(command: _Command) -> _Command:
    """Make a command end with a message and a code, never with a traceback (unless it is asked for, or a bug).

    Code 2 for whatever the user can mend, 130 for an interrupt (see also `secateur.cli._stopping.goes_on`). The command
    must have a ``debug`` argument. It is for one process: several that torchrun has started would do the same.
    """

    @functools.wraps(command)
    def alone(*args: Any, **kwargs: Any) -> Any:
        _check_alone()
        return command(*args, **kwargs)

    return told_together(alone)  # type: ignore[return-value]


def told_together(command: _Command) -> _Command:
    """As `told`, for a command that torchrun may start several times at once."""

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


def _end(message: str, code: int) -> typer.Exit:
    err().print(Text(message, style="bold red" if code == BAD_INPUT else ""), soft_wrap=True)
    return typer.Exit(code)


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
