"""Targets: the runtimes and devices that a forward pass is timed on."""

import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from secateur._files import temporary_folder
from secateur._kinds import settings
from secateur._runtime import ELAPSED_TIME, PROCESSOR_TIME, Clock, preserve_environment, torch_threads
from secateur.cost.onnx_templates import OnnxTemplates
from secateur.cost.timing import LayerShape, Pass, call_seconds, kernel_seconds, onnx_of
from secateur.errors import ExportError
from secateur.export._common import InputTensors, eval_copy
from secateur.export.onnx import feed, onnx_bytes, open_session

_PROFILE_ROOM = 2**20
"""Bytes among the temporary files for the times of the operators of one layer."""


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
        return PROCESSOR_TIME if self.threads == 1 else ELAPSED_TIME

    @abstractmethod
    def opened(self, model: nn.Module, inputs: InputTensors) -> AbstractContextManager[Pass]:
        """Open a model: yield a pass over a batch, finished when it returns, and restore its settings at the end.

        Args:
            model: Any device or mode; not changed.
            inputs: One batch, as it will be used.

        Raises:
            ExportError: If the model cannot be brought to this target.
        """

    def for_cuts(self) -> "Target":
        """Return this target for a search, which opens many cuts of one model; by default the target itself."""
        return self

    @abstractmethod
    def layer_seconds(self, shape: LayerShape) -> float:
        """Time one layer alone, for one pass of ``batch`` samples."""

    @property
    def key(self) -> str:
        """Everything that a time depends on, on one machine, as text."""
        return f"{self.runtime}, {self.threads} thread{'s' if self.threads > 1 else ''}, batch {self.batch}"

    def _check(self) -> None:
        for name, value in (("threads", self.threads), ("batch", self.batch)):
            if type(value) is not int or value < 1:
                raise ExportError(f"`{name}` must be a whole number, at least 1; got {value!r}. 1 is usual.")


@settings
class OnnxRuntime(Target):
    """ONNX Runtime on this CPU: what most deployments use.

    A pass runs a session over the file that `secateur.export_onnx` writes, with all optimizations of the runtime. A
    layer alone is timed by the runtime's profile of its kernel: norms and most activations are fused into it, and
    conversions of the memory layout, which disappear between layers, are not counted.

    Attributes:
        threads: Threads of the session.
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
    def opened(self, model: nn.Module, inputs: InputTensors) -> Generator[Pass]:
        """See `Target.opened`."""
        yield self.opened_file(self.exported(model, inputs), inputs)

    def exported(self, model: nn.Module, inputs: InputTensors) -> bytes:
        """Return the content of the ONNX file of a model, as it is timed.

        Args:
            model: Any device or mode; not changed.
            inputs: One batch.

        Raises:
            ExportError: If it cannot be exported.
        """
        return onnx_bytes(eval_copy(model), inputs)

    def for_cuts(self) -> Target:
        """See `Target.for_cuts`: cuts with the same operations are exported once, see `OnnxTemplates`."""
        return _OnnxRuntimeOfCuts(self.threads, self.batch)

    def with_file(self, model: nn.Module, content: bytes) -> "OnnxRuntime":
        """Return this target for a model that is exported already: it opens the content of its file.

        Args:
            model: The very object that will be opened; others are exported.
            content: Of its ONNX file.
        """
        return _OnnxRuntimeWithFiles(self.threads, self.batch, ((model, content),))

    def opened_file(self, model: Path | bytes, inputs: InputTensors) -> Pass:
        """Open an ONNX file, or its content: return a pass over a batch."""
        session = open_session(model, threads=self.threads)
        fed = feed(session, inputs)
        return lambda: session.run(None, fed)

    def layer_seconds(self, shape: LayerShape) -> float:
        """See `Target.layer_seconds`."""
        with temporary_folder("secateur-profile-", room=_PROFILE_ROOM) as folder:
            profile = folder / "profile"
            session = open_session(onnx_of(shape, self.batch), threads=self.threads, profile=profile)
            return kernel_seconds(session, shape, self.batch)


@dataclass(frozen=True)
class _OnnxRuntimeOfCuts(OnnxRuntime):
    """ONNX Runtime for cuts of one model."""

    templates: OnnxTemplates = field(default_factory=OnnxTemplates, compare=False, repr=False)

    @contextmanager
    def opened(self, model: nn.Module, inputs: InputTensors) -> Generator[Pass]:
        """See `Target.opened`."""
        yield self.opened_file(self.templates.content(eval_copy(model), inputs), inputs)


@dataclass(frozen=True)
class _OnnxRuntimeWithFiles(OnnxRuntime):
    """ONNX Runtime, and the files of some models."""

    files: tuple[tuple[nn.Module, bytes], ...] = field(default=(), compare=False, repr=False)

    def with_file(self, model: nn.Module, content: bytes) -> OnnxRuntime:
        """See `OnnxRuntime.with_file`: the files before it stay."""
        return _OnnxRuntimeWithFiles(self.threads, self.batch, (*self.files, (model, content)))

    @contextmanager
    def opened(self, model: nn.Module, inputs: InputTensors) -> Generator[Pass]:
        """See `Target.opened`."""
        content = next((content for known, content in self.files if known is model), None)
        if content is not None:
            yield self.opened_file(content, inputs)
        else:
            with super().opened(model, inputs) as run:
                yield run


@settings
class TorchEager(Target):
    """PyTorch without compilation, in inference mode.

    Attributes:
        threads: Threads on the CPU; ignored elsewhere.
        batch: Samples per pass.
        device: Such as ``cpu`` or ``cuda``. On an accelerator elapsed time counts, to the end of the work.
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
        return super().clock if self.device == "cpu" else ELAPSED_TIME

    @contextmanager
    def opened(self, model: nn.Module, inputs: InputTensors) -> Generator[Pass]:
        """See `Target.opened`."""
        moved = tuple(tensor.detach().to(self.device) for tensor in inputs)
        placed = self._prepared(eval_copy(model).to(self.device))
        finish = _finisher(self.device)

        def run() -> None:
            placed(*moved)
            finish()

        with torch_threads(self.threads), torch.inference_mode():
            yield run

    def layer_seconds(self, shape: LayerShape) -> float:
        """See `Target.layer_seconds`: norms and activations are operations of their own here."""
        with TorchEager.opened(_uncompiled(self), shape.module(), (shape.example(self.batch),)) as run:
            return call_seconds(run, self.clock)

    def _prepared(self, model: nn.Module) -> Callable[..., object]:
        return model


@settings
class TorchCompiled(TorchEager):
    """PyTorch with `torch.compile` (inductor); compilation is not counted.

    A layer alone is timed uncompiled, as compiling each would take hours; measurements of whole models correct that.

    Attributes:
        threads: Threads on the CPU; ignored elsewhere.
        batch: Samples per pass.
        device: Such as ``cpu`` or ``cuda``.
    """

    @property
    def runtime(self) -> str:
        """See `Target.runtime`."""
        return f"{_package('torch')}, compiled, on {_device_name(self.device)}"

    @contextmanager
    def opened(self, model: nn.Module, inputs: InputTensors) -> Generator[Pass]:
        """See `Target.opened`."""
        with preserve_environment(), super().opened(model, inputs) as run:
            yield run

    def _prepared(self, model: nn.Module) -> Callable[..., object]:
        torch.compiler.reset()  # Otherwise the code of the last model counts as a recompilation of this one.
        return torch.compile(model)


def _uncompiled(target: TorchEager) -> TorchEager:
    return TorchEager(target.threads, target.batch, target.device)


def _finisher(device: str) -> Callable[[], object]:
    """Return a function that waits for the work of a device."""
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
