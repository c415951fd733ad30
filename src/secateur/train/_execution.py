"""How the networks of a training are run: operation by operation, or compiled."""

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import TrainingError
from secateur.train._stop import asked_to_stop

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_NOTES = ("TORCH", "_TORCH", "TRITON")
"""Environment variables in which compilers leave notes to themselves begin like this."""


class Execution(ABC):
    """How student and teacher compute in a training. Implementations are frozen dataclasses; fields are configuration.

    Chosen by the caller and never by a stopwatch: two ways round differently, and what a run gives must not depend on
    what else the machine did.
    """

    @abstractmethod
    def prepared(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """The model's forward, to be called in a `running` block.

        The model itself stays an ordinary module with the same tensors, and hooks on its modules are heard.
        """

    @abstractmethod
    def running(self) -> AbstractContextManager[None]:
        """A block in which prepared forwards are called and differentiated.

        Raises:
            TrainingError: If a model cannot be run like this.
        """

    @abstractmethod
    def check(self, fabric: "Fabric") -> None:
        """Find out at the door what would be found out in the first step.

        Raises:
            TrainingError: If this machine cannot run any model like this.
        """


@dataclass(frozen=True)
class Eager(Execution):
    """Operation by operation, as PyTorch does by itself."""

    def prepared(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """See `Execution.prepared`: the model."""
        return model

    def running(self) -> AbstractContextManager[None]:
        """See `Execution.running`: nothing to do."""
        return nullcontext()

    def check(self, fabric: "Fabric") -> None:
        """See `Execution.check`: nothing to refuse."""


@dataclass(frozen=True)
class Compiled(Execution):
    """By `torch.compile`, for the very shapes of the batches: about a minute at first, then often faster steps.

    Losses, optimiser and validation stay eager. The code is made anew in every process; on the CPU, with the same
    compiler and number of threads, it computes the same bits, so a run goes on as exactly as an eager one. Parts of
    different sizes (`Schedule.accumulate`) are compiled twice; a model that asks for more and more code is refused.

    Attributes:
        backend: As `torch.compile` names it. ``inductor`` needs a C++ compiler on the CPU, and Triton on CUDA.
    """

    backend: str = "inductor"

    def prepared(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """See `Execution.prepared`."""
        return torch.compile(model, backend=self.backend, dynamic=False, **_ALONE)

    def running(self) -> AbstractContextManager[None]:
        """See `Execution.running`."""
        return self._explained("these models", "Train without it: Eager(), or no --compile.")

    def check(self, fabric: "Fabric") -> None:
        """See `Execution.check`: compiles a function of one line."""
        if fabric.world_size > 1:
            raise TrainingError(
                f"`execution` must be Eager() with several processes; got {self} with {fabric.world_size}. "
                "Leave it out, or take one device."
            )
        way_out = (
            "Install what is missing (a C++ compiler such as g++ for the CPU, Triton for CUDA), or train without it: "
            "Eager(), or no --compile."
        )
        with self._explained("this machine", way_out), torch.inference_mode(mode=False), torch.no_grad():
            torch.compile(_one_line, backend=self.backend, dynamic=False)(torch.ones(8, device=fabric.device))

    @contextmanager
    def _explained(self, whom: str, way_out: str) -> Generator[None]:
        from torch._dynamo import config
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            # Else torch would go on eagerly after the limit, and a resumed run would count from the beginning.
            with _same_notes(), config.patch(fail_on_recompile_limit_hit=True):
                yield
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            if asked_to_stop():  # Ctrl-C ends the C++ compiler too.
                raise KeyboardInterrupt from error
            raise TrainingError(
                f"`execution` must be one that {whom} can do; {self} failed ({_reason(error)}). {way_out}"
            ) from error


_ALONE: dict[str, Any] = (
    # Code for one model shall not count as a recompilation of the next one of its class.
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)


def _one_line(values: Tensor) -> Tensor:
    return values * 2 + 1


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, beneath the layers of the compiler."""
    cause: BaseException = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__


@contextmanager
def _same_notes() -> Generator[None]:
    before = _notes()
    try:
        yield
    finally:
        for name in _notes().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _notes() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_NOTES)}
