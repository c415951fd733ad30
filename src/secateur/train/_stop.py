"""Ending a long loop in good order: it writes a checkpoint after its next step and raises `Stopped`."""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path


class Stopped(KeyboardInterrupt):
    """A loop that was asked to stop has stopped. No error: it goes on where it was when it is started again.

    A `KeyboardInterrupt`, so that nothing takes it for a failure and goes on.

    Attributes:
        folder: Where the checkpoint lies that was written last; None if the loop was given no folder for checkpoints.
    """

    def __init__(self, folder: Path | None) -> None:
        where = "nothing was kept, because there is no folder for checkpoints" if folder is None else f"see {folder}"
        super().__init__(f"stopped on request; {where}")
        self.folder = folder


class StopRequest:
    """Whether the loops inside of a `stoppable` block shall stop. Safe to use in signal handlers: it takes no locks.

    Attributes:
        asked: Whether `ask` was called.
        heard: Whether a loop is running that will obey after its next step. Outside of loops nobody listens: then it
            is the next loop that stops, in its first step, unless the caller ends the work in another way.
    """

    def __init__(self) -> None:
        self.asked = False
        self.heard = False

    def ask(self) -> None:
        """Ask the loops to stop; once is enough."""
        self.asked = True


_current: ContextVar[StopRequest | None] = ContextVar("secateur_stop", default=None)


@contextmanager
def stoppable() -> Generator[StopRequest]:
    """A block whose trainings and searches can be asked to stop; of several blocks the innermost counts.

    Loops that run in this block (in this thread, or this task of asyncio) obey. For example::

        with stoppable() as stop:
            signal.signal(signal.SIGTERM, lambda *_: stop.ask())
            distill(...)  # raises Stopped after a step, with a checkpoint
    """
    request = StopRequest()
    token = _current.set(request)
    try:
        yield request
    finally:
        _current.reset(token)


def asked_to_stop() -> bool:
    """Whether the block that this runs in was asked to stop."""
    request = _current.get()
    return request is not None and request.asked


@contextmanager
def listening() -> Generator[StopRequest]:
    """A loop that obeys the request of the block it runs in; outside of such a block nobody can ask."""
    request = _current.get() or StopRequest()
    before, request.heard = request.heard, True
    try:
        yield request
    finally:
        request.heard = before
