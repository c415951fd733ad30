"""Targets: what a forward pass is timed on. Each is opened for a model and then runs one pass at a time."""

import importlib.metadata
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur._runtime import ELAPSED, ONE_THREAD, Clock, same_environment, torch_threads
from secateur.cost import timing as _alone
from secateur.cost.timing import LayerShape, Pass
from secateur.errors import ExportError
from secateur.export._common import eval_copy
from secateur.export.onnx import feed, onnx_bytes, open_session

Inputs = tuple[Tensor, ...]


class Target(ABC):
    """A runtime with its settings. Implementations are frozen dataclasses; fields are configuration.

    Attributes:
        batch: Samples per pass, for which a budget holds.
        threads: Threads on the CPU.
    """

    batch: int
    threads: int

    @property
    @abstractmethod
    def runtime(self) -> str:
        """Name and version of the runtime, and its device."""

    @property
    def clock(self) -> Clock:
        """Processor time with one thread on the CPU, else elapsed time; see `Latency`."""
        return ONE_THREAD if self.threads == 1 else ELAPSED

    @abstractmethod
    def opened(self, model: nn.Module, inputs: Inputs) -> AbstractContextManager[Pass]:
        """A pass of a model over a batch, finished when it returns; the process' settings are put back at the end.

        Args:
            model: Any device or mode; not changed.
            inputs: One batch, whose batch size counts.

        Raises:
            ExportError: If the model cannot be brought to this target.
        """

    @abstractmethod
    def seconds_alone(self, shape: LayerShape) -> float:
        """Seconds of one layer for one pass of ``batch`` samples, without what surrounds it."""

    @property
    def key(self) -> str:
        """Everything that decides a time on one machine, as text."""
        return f"{self.runtime}, {self.threads} thread{'s' if self.threads > 1 else ''}, batch {self.batch}"

    def _check(self) -> None:
        for name, value in (("threads", self.threads), ("batch", self.batch)):
            if type(value) is not int or value < 1:
                raise ExportError(f"`{name}` must be a whole number, at least 1; got {value!r}. 1 is usual.")


@dataclass(frozen=True)
class OnnxRuntime(Target):
    """ONNX Runtime on this CPU: what most deployments use.

    A pass is a run of a session over the file that `secateur.export_onnx` writes, with all of the runtime's own
    optimizations. A layer alone is what the runtime's profile says its kernel takes: norms and most activations are
    fused into it, and conversions of the memory layout are not counted, as they fall away between layers.

    Attributes:
        threads: Of the session.
        batch: Samples per pass.
    """

    threads: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        self._check()

    @property
    def runtime(self) -> str:
        """See `Target.runtime`."""
        return _package("onnxruntime")

    @contextmanager
    def opened(self, model: nn.Module, inputs: Inputs) -> Generator[Pass]:
        """See `Target.opened`."""
        yield self.opened_file(onnx_bytes(eval_copy(model), inputs), inputs)

    def opened_file(self, model: Path | bytes, inputs: Inputs) -> Pass:
        """The same of an ONNX file, or its content."""
        session = open_session(model, threads=self.threads)
        fed = feed(session, inputs)
        return lambda: session.run(None, fed)

    def seconds_alone(self, shape: LayerShape) -> float:
        """See `Target.seconds_alone`."""
        with tempfile.TemporaryDirectory() as folder:
            profile = Path(folder) / "profile"
            session = open_session(_alone.onnx_of(shape, self.batch), threads=self.threads, profile=profile)
            return _alone.kernel_seconds(session, shape, self.batch)


@dataclass(frozen=True)
class TorchEager(Target):
    """PyTorch as it is, in inference mode.

    Attributes:
        threads: On the CPU; ignored elsewhere.
        batch: Samples per pass.
        device: Such as ``cpu`` or ``cuda``; elsewhere than on the CPU elapsed time counts, to the end of the work.
    """

    threads: int = 1
    batch: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        self._check()

    @property
    def runtime(self) -> str:
        """See `Target.runtime`."""
        return f"{_package('torch')} on {_device_name(self.device)}"

    @property
    def clock(self) -> Clock:
        """See `Target.clock`."""
        return super().clock if self.device == "cpu" else ELAPSED

    @contextmanager
    def opened(self, model: nn.Module, inputs: Inputs) -> Generator[Pass]:
        """See `Target.opened`."""
        moved = tuple(tensor.detach().to(self.device) for tensor in inputs)
        placed = self._prepared(eval_copy(model).to(self.device))
        finish = _finisher(self.device)

        def run() -> None:
            placed(*moved)
            finish()

        with torch_threads(self.threads), torch.inference_mode():
            yield run

    def seconds_alone(self, shape: LayerShape) -> float:
        """See `Target.seconds_alone`: its kernels alone; norms and activations are operations of their own here."""
        with TorchEager.opened(_bare(self), shape.module(), (shape.example(self.batch),)) as run:
            return _alone.call_seconds(run, self.clock)

    def _prepared(self, model: nn.Module) -> Callable[..., object]:
        return model


@dataclass(frozen=True)
class TorchCompiled(TorchEager):
    """PyTorch with `torch.compile` (inductor); compiling is not counted.

    A layer alone is timed uncompiled, as compiling each would take hours; measurements of whole models correct it.

    Attributes:
        threads: On the CPU; ignored elsewhere.
        batch: Samples per pass.
        device: Such as ``cpu`` or ``cuda``.
    """

    @property
    def runtime(self) -> str:
        """See `Target.runtime`."""
        return f"{_package('torch')}, compiled, on {_device_name(self.device)}"

    @contextmanager
    def opened(self, model: nn.Module, inputs: Inputs) -> Generator[Pass]:
        """See `Target.opened`."""
        with same_environment(), super().opened(model, inputs) as run:
            yield run

    def _prepared(self, model: nn.Module) -> Callable[..., object]:
        torch.compiler.reset()  # Code for the last model would count as a recompilation of this one.
        return torch.compile(model)


def _bare(target: TorchEager) -> TorchEager:
    return TorchEager(target.threads, target.batch, target.device)


def _finisher(device: str) -> Callable[[], object]:
    """Waits for the work that was given to a device."""
    kind = torch.device(device).type
    if kind == "cpu":
        return lambda: None
    return torch.cuda.synchronize if kind == "cuda" else torch.mps.synchronize


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return device


def _package(name: str) -> str:
    return f"{name} {importlib.metadata.version(name)}"
