"""SIGINT and SIGTERM while a long command computes: it stops in good order, and says how to go on."""

import functools
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import typer
from rich.text import Text

from secateur.cli._boundary import INTERRUPTED, err
from secateur.errors import SecateurError

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


def goes_on(command: _Command) -> _Command:
    """Make a command that can be resumed end in good order when it is interrupted: 130 for SIGINT, 143 for SIGTERM.

    The command must have an ``out_folder`` argument.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        with obeyed() as caught:
            try:
                return command(*args, **kwargs)
            except (KeyboardInterrupt, SecateurError) as error:
                # Libraries catch interrupts and end with an error of their own, as torch's exporters do.
                if isinstance(error, SecateurError) and caught.number is None:
                    raise
                err().print(Text(_after(kwargs["out_folder"])), soft_wrap=True)
                raise typer.Exit(caught.exit_code) from None

    return run  # type: ignore[return-value]


@contextmanager
def obeyed() -> Generator[Caught]:
    """A block that SIGINT and SIGTERM stop; the handlers that were there are put back at its end.

    The first signal ends a training or search after its next step, with a checkpoint, and everything else at once, by
    a `KeyboardInterrupt`. The second is the system's: it ends the process, whatever that is doing. In other threads
    than the main one, which hear of no signals, nothing is changed.
    """
    from secateur.train import stoppable

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


def _after(out: Path) -> str:
    work = out.with_name(f"{out.name}.work")
    place = work if work.is_dir() else out if (out / "study.json").is_file() else None
    if place is None:
        return "Interrupted. Nothing was written."
    words = [word for word in sys.argv[1:] if word not in ("--restart", "--resume")]
    again = shlex.join(["secateur", *words, "--resume"])
    return f"Interrupted. The work so far is in {place}: go on with the same command and --resume:\n{again}"
