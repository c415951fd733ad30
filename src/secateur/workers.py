"""Workers that run independent tasks: in this process, or on a Ray cluster of one or many machines."""

import contextlib
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, cast

from secateur import _ray_driver
from secateur.errors import WorkerError

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")


class Pool(ABC, Generic[Task, Result]):
    """Workers that hold a function and what it shares between tasks.

    Attributes:
        size: Number of tasks that are computed at the same time.
    """

    size: int

    @abstractmethod
    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Result]]:
        """Compute ``function(shared, task)`` for every task and yield each result as soon as it is ready.

        Tasks are taken from the iterable as workers become free. Leaving the iterator early abandons the rest.

        Args:
            tasks: Tasks that are independent of each other.

        Returns:
            The number of the task, from 0, and its result; in any order.

        Raises:
            Exception: Whatever the function raises for a task, unchanged.
            WorkerError: If the worker of a task ends every time.
        """


class Workers(ABC):
    """Where tasks are computed. Implementations are frozen dataclasses."""

    @abstractmethod
    def running(
        self, function: Callable[[Shared, Task], Result], shared: Shared
    ) -> AbstractContextManager[Pool[Task, Result]]:
        """Start workers, which end with the context.

        Args:
            function: Called as ``function(shared, task)``. It must not change ``shared``, must draw its random numbers
                from a seed within the task, and must be importable: a function of a module, or a partial of one.
            shared: What all tasks need, such as a network and images. Each worker gets it once.

        Raises:
            WorkerError: If the workers cannot be started.
            ImportError: If a package that they need is not installed.
        """


@dataclass(frozen=True)
class InProcess(Workers):
    """Compute in this process, one task after the other, in the order of the tasks."""

    @contextmanager
    def running(self, function: Callable[[Shared, Task], Result], shared: Shared) -> Generator[Pool[Task, Result]]:
        """Return a pool of one, which is this process."""
        yield _Here(function, shared)


class _Here(Pool[Task, Result]):
    def __init__(self, function: Callable[[Shared, Task], Result], shared: Shared):
        self.size = 1
        self._compute: Callable[[Task], Result] = lambda task: function(shared, task)

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Result]]:
        for index, task in enumerate(tasks):
            yield index, self._compute(task)


_PATIENCE = 30
"""Seconds in which Ray must end by itself."""


@dataclass(frozen=True)
class OnRay(Workers):
    """Compute on Ray workers, each with the function and the shared data in its memory; needs the extra ``ray``.

    Shared data goes once into Ray's object store. A worker that ends (killed, out of memory) is replaced, and its task
    is computed again; an exception of a task is raised in the caller. Results equal those of `InProcess` bit for bit
    if the function computes with a fixed number of threads. A separate process talks to Ray, so that Ray changes
    nothing in the caller's process (environment, signals, logging, threads). Ray sends no usage statistics, and nothing
    of it is left when the context ends or the caller is killed.

    Attributes:
        address: "local" starts Ray on this machine; "auto" joins the cluster that this machine is part of; HOST:PORT
            joins that one. The machines of a cluster need the same Python and the same packages.
        workers: Number of workers; None means as many as there are cores for.
        threads_each: Threads of each worker, which are also the CPUs that Ray reserves for it.
        retries: How often a task is computed again after its worker ended.

    Raises:
        WorkerError: If a number or the address is out of range.

    References:
        Moritz et al., Ray: a distributed framework for emerging AI applications, arXiv:1712.05889.
    """

    address: str = "local"
    workers: int | None = None
    threads_each: int = 1
    retries: int = 3

    def __post_init__(self) -> None:
        if self.address not in ("local", "auto") and not self.address.rpartition(":")[2].isdigit():
            raise WorkerError(f"`address` must be 'local', 'auto' or HOST:PORT; got {self.address!r}.")
        for name, least in (("workers", 1), ("threads_each", 1), ("retries", 0)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise WorkerError(f"`{name}` must be at least {least}; got {number}.")

    @contextmanager
    def running(self, function: Callable[[Shared, Task], Result], shared: Shared) -> Generator[Pool[Task, Result]]:
        """Start the Ray workers; starting Ray on this machine takes several seconds.

        Raises:
            WorkerError: If Ray cannot be started or reached, or has too few CPUs.
            ImportError: If Ray is not installed.
        """
        for package in ("ray", "cloudpickle"):
            if importlib.util.find_spec(package) is None:
                raise ImportError(f"`OnRay` needs {package}; got none. Run pip install 'secateur[ray]'.")
        # Ray puts sockets into this folder, and their paths must be short.
        folder = Path(tempfile.mkdtemp(prefix="ray-"))
        try:
            with (folder / "log").open("wb") as log:
                driver = self._started(folder, log)
            try:
                yield self._pool(driver, function, shared, folder)
            finally:
                _end(driver)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _started(self, folder: Path, log: BinaryIO) -> "subprocess.Popen[bytes]":
        environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = str(self.threads_each)
        if self.address == "local":
            # Otherwise Ray writes a token of its own into the home folder.
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        return subprocess.Popen(
            # -P keeps the folder of the file off the module path. The new session keeps Ctrl-C for the caller.
            [sys.executable, "-P", str(Path(_ray_driver.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            start_new_session=True,
        )

    def _pool(
        self,
        driver: "subprocess.Popen[bytes]",
        function: Callable[[Shared, Task], Result],
        shared: Shared,
        folder: Path,
    ) -> Pool[Task, Result]:
        import cloudpickle

        settings = {
            "address": self.address,
            "folder": str(folder),
            "workers": self.workers,
            "threads_each": self.threads_each,
            "retries": self.retries,
            "paths": [str(Path(path).resolve()) for path in sys.path],
        }
        link = _Link(driver, folder / "log")
        link.send(settings, cloudpickle.dumps((function, shared)))
        answer = link.receive()
        if answer[0] == "failed":
            raise WorkerError(f"`address` must lead to a Ray that can be used; got {self.address!r}: {answer[1]}")
        return _Remote(link, cast(int, answer[1]))


class _Link:
    """The connection to the driver process."""

    def __init__(self, driver: "subprocess.Popen[bytes]", log: Path):
        assert driver.stdin is not None
        assert driver.stdout is not None
        self._to, self._from, self._log = cast(BinaryIO, driver.stdin), cast(BinaryIO, driver.stdout), log

    def send(self, *message: object) -> None:
        try:
            _ray_driver.write(self._to, message)
        except BrokenPipeError:
            raise self._gone() from None

    def receive(self) -> tuple[Any, ...]:
        message = _ray_driver.read(self._from)
        if message is None:
            raise self._gone()
        return message

    def _gone(self) -> WorkerError:
        lines = self._log.read_text(errors="replace").strip().splitlines()[-5:]
        return WorkerError(
            "Ray ended before the work was done. Its last output: " + (" / ".join(lines) or "none") + ". "
            "A run with an output folder goes on with --resume."
        )


class _Remote(Pool[Task, Result]):
    def __init__(self, link: _Link, size: int):
        self.size = size
        self._link = link
        self._numbers = count()

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Result]]:
        import cloudpickle

        source = enumerate(tasks)
        ahead: dict[int, int] = {}
        try:
            while True:
                # Two for each worker: the next task is there when one is done, and few are packed in advance.
                while len(ahead) < 2 * self.size and (following := next(source, None)) is not None:
                    number = next(self._numbers)
                    self._link.send("task", number, cloudpickle.dumps(following[1]))
                    ahead[number] = following[0]
                if not ahead:
                    return
                kind, number, *rest = self._link.receive()
                if number not in ahead:
                    continue  # A result of a map that was left early.
                index = ahead.pop(number)
                if kind == "lost":
                    said = (rest[1].strip().splitlines() or ["no reason"])[0]
                    raise WorkerError(
                        f"A worker of Ray must live until its work is done; those of task {index} ended {rest[0]} "
                        f"times. Ray says: {said} Is there too little memory? A run with an output folder goes on with "
                        "--resume."
                    )
                found = cloudpickle.loads(rest[0])
                if kind == "raised":
                    raise found
                yield index, found
        finally:
            if ahead:
                self._link.send("forget")


def _end(driver: "subprocess.Popen[bytes]") -> None:
    """Wait for Ray to end, then kill what is left of it."""
    assert driver.stdin is not None
    assert driver.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        driver.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        driver.wait(_PATIENCE)
    # If the driver was killed, Ray's agents outlive it; they are in its process group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
