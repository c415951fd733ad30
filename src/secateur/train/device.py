"""Where to compute and in which number formats: Lightning Fabric on one device.

How the networks of a training are run: operation by operation, or compiled."""

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur._runtime import copy_model, stop_requested
from secateur.errors import TrainingError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.precision import Precision as FabricPrecision


ModelType = TypeVar("ModelType", bound=nn.Module)


class Precision(Enum):
    """Number formats of forward and backward passes. Weights and optimizer are float32 in both."""

    FLOAT32 = "32-true"
    """Everything in float32."""
    BF16_MIXED = "bf16-mixed"
    """Convolutions and matrix products in bfloat16 (autocast)."""


def best_precision(device: torch.device) -> Precision:
    """bfloat16 where the hardware computes in it, else float32.

    Hardware means CUDA's own bfloat16 (not emulated), or a CPU with AVX512-BF16 or AMX-BF16: elsewhere bfloat16 is
    slower than float32.
    """
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        native = torch.backends.mkldnn.is_available() and _cpu_has("avx512_bf16", "amx_bf16")
    else:
        native = False
    return Precision.BF16_MIXED if native else Precision.FLOAT32


def open_fabric(precision: Precision | None = None, *, device: torch.device | None = None) -> "Fabric":
    """A Fabric for one device in this process; nothing is launched.

    Args:
        precision: None means `best_precision` of the device.
        device: None means the accelerator if there is one, else the CPU.
    """
    with preserve_nvml_variable():
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    device = device or default_device()
    return Fabric(
        accelerator=device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        # The environment is named so that one process under SLURM or torchrun is not taken for a part of many.
        plugins=[LightningEnvironment(), fabric_plugin(precision, device)],
    )


def fabric_plugin(precision: Precision | None, device: torch.device) -> "FabricPrecision":
    """What has a Fabric compute in a precision; None means `best_precision` of the device."""
    with preserve_nvml_variable():
        from lightning_fabric.plugins.precision import MixedPrecision
        from lightning_fabric.plugins.precision import Precision as FullPrecision

    mixed = (precision or best_precision(device)) is Precision.BF16_MIXED
    return MixedPrecision("bf16-mixed", device.type) if mixed else FullPrecision()


def one_device(fabric: "Fabric | None", precision: Precision | None) -> "Fabric":
    """The caller's Fabric if it can be used, or a new one.

    Raises:
        TrainingError: If it spans several processes, or has another precision than the one asked for.
    """
    if fabric is not None and fabric.world_size > 1:
        raise TrainingError(f"`fabric` must have one device; got {fabric.world_size}. Use Fabric(devices=1).")
    return usable(fabric, precision)


def usable(fabric: "Fabric | None", precision: Precision | None) -> "Fabric":
    """The caller's Fabric if it can be used, or a new one.

    Raises:
        TrainingError: If it has another precision than the one asked for, its processes were not started, or each of
            them holds a part of the model only.
    """
    if fabric is None:
        return open_fabric(precision)
    from lightning_fabric.strategies.ddp import DDPStrategy
    from lightning_fabric.strategies.single_device import SingleDeviceStrategy

    if not isinstance(fabric.strategy, (DDPStrategy, SingleDeviceStrategy)):
        raise TrainingError(
            f"`fabric` must have one device, or the strategy ddp; got {type(fabric.strategy).__name__}. Models that "
            "are compressed fit on one device: use Fabric(strategy='ddp')."
        )
    if fabric.world_size > 1 and not torch.distributed.is_initialized():
        raise TrainingError(
            f"`fabric` must have started its {fabric.world_size} processes; got one that has not. "
            "Call fabric.launch() first."
        )
    if precision is not None and precision is not fabric_precision(fabric):
        raise TrainingError(
            f"`precision` must be that of `fabric`, {fabric_precision(fabric).name}; got {precision.name}. "
            "Give one of the two."
        )
    return fabric


def fabric_precision(fabric: "Fabric") -> Precision:
    """The precision of a Fabric.

    Raises:
        TrainingError: If it is not one of `Precision`.
    """
    name = str(getattr(fabric.strategy.precision, "precision", ""))
    if name not in {p.value for p in Precision}:
        raise TrainingError(
            f"`fabric` must have one of the precisions {[p.value for p in Precision]}; got {name!r}. "
            "Use secateur.train.open_fabric()."
        )
    return Precision(name)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """A context in which forward passes run in a precision, where there is no Fabric to ask."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision is Precision.BF16_MIXED)


def in_precision(fabric: "Fabric", model: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    """A model's forward in the precision of a Fabric, with a float32 output.

    Not `Fabric.setup`: with several processes that would make every backward pass send its gradients, see
    `average_gradients_`.
    """

    def forward(images: Tensor) -> Tensor:
        with fabric.autocast():
            output = model(images)
        return output.float() if isinstance(output, Tensor) else output

    return forward


def placed(model: ModelType, device: torch.device) -> ModelType:
    """A copy on the device with channels-last weights of convolutions; the model itself stays as it is."""
    model = copy_model(model).to(device)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            # Module.to(memory_format=) would refuse a model that has five-dimensional weights too.
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return model


def channels_last(images: Tensor) -> Tensor:
    """The images in channels-last order, if they are a batch of two-dimensional ones."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


@contextmanager
def seeded(device: torch.device, *seed: int) -> Generator[None]:
    """Random numbers from a seed on the CPU and the device; the caller's state is put back afterward."""
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    before = random_states(device)
    try:
        for generator in _generators(device):
            generator.manual_seed(number)
        yield
    finally:
        set_random_states(device, before)


def random_states(device: torch.device) -> tuple[Tensor, ...]:
    """Where torch's random numbers are, on the CPU and on the device: uint8 tensors on the CPU."""
    return tuple(generator.get_state() for generator in _generators(device))


def set_random_states(device: torch.device, states: Sequence[Tensor]) -> None:
    """Inverse of `random_states`."""
    for generator, state in zip(_generators(device), states, strict=True):
        # A copy: torch reads the bytes as larger numbers, and dies where they do not lie on such a boundary.
        generator.set_state(state.clone())


def _generators(device: torch.device) -> list[torch.Generator]:
    generators = [torch.default_generator]
    if device.type == "cuda":
        generators.append(torch.cuda.default_generators[device.index or 0])
    elif device.type == "mps":
        generators.append(torch.mps._get_default_mps_generator())  # pyright: ignore[reportPrivateUsage]
    return generators


@contextmanager
def preserve_nvml_variable() -> Generator[None]:
    """Put back the one variable that importing Fabric sets: it would change how torch looks for CUDA devices."""
    name = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(name)
    yield
    if before is None:
        os.environ.pop(name, None)


def _cpu_has(*features: str) -> bool:
    # Older versions of torch cannot say; float32 is then the safe answer.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(bool(capabilities.get(feature)) for feature in features)


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if accelerator is None or accelerator.type not in {"cuda", "mps"} else accelerator


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

    Losses, optimizer and validation stay eager. The code is made anew in every process; on the CPU, with the same
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
            if stop_requested():  # Ctrl-C ends the C++ compiler too.
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
