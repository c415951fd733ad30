"""What can run independent tasks."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

Shared = TypeVar("Shared")
Task = TypeVar("Task")
Result = TypeVar("Result")


class Pool(ABC, Generic[Task, Result]):
    """Workers that hold a function and what it shares between tasks.

    Attributes:
        size: How many tasks are computed at the same time.
    """

    size: int

    @abstractmethod
    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Result]]:
        """Compute ``function(shared, task)`` for every task, and give each result as soon as it is there.

        Tasks are taken from the iterable as workers become free. Leaving the iterator early abandons the rest.

        Args:
            tasks: Each of them independent of all others.

        Returns:
            Number of the task, from 0, and its result; in any order.

        Raises:
            Exception: What the function raises for a task, with its own message.
            WorkerError: If a task cannot be computed because its worker ends every time.
        """


class Workers(ABC):
    """Who computes. Implementations are frozen dataclasses."""

    @abstractmethod
    def running(
        self, function: Callable[[Shared, Task], Result], shared: Shared
    ) -> AbstractContextManager[Pool[Task, Result]]:
        """Workers that are ready to map, and are gone when the context ends.

        Args:
            function: Called as ``function(shared, task)``. It must not change ``shared``, must draw its random numbers
                from a seed within the task, and must be importable: a function of a module, or a partial of one.
            shared: What all tasks need, such as a network and images. It is handed to each worker once.

        Raises:
            WorkerError: If the workers cannot be started.
            ImportError: If a package that they need is not installed.
        """


@dataclass(frozen=True)
class InProcess(Workers):
    """In this process, one task after the other, in the order of the tasks."""

    @contextmanager
    def running(self, function: Callable[[Shared, Task], Result], shared: Shared) -> Generator[Pool[Task, Result]]:
        """A pool of one, which is this process."""
        yield _Here(function, shared)


class _Here(Pool[Task, Result]):
    def __init__(self, function: Callable[[Shared, Task], Result], shared: Shared):
        self.size = 1
        self._compute: Callable[[Task], Result] = lambda task: function(shared, task)

    def map(self, tasks: Iterable[Task]) -> Iterator[tuple[int, Result]]:
        for index, task in enumerate(tasks):
            yield index, self._compute(task)
