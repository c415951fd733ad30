"""Where and how to compute: devices, number formats, random states, and eager or compiled execution."""

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur._kinds import settings
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
    """Return bfloat16 where the hardware computes in it, else float32.

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
    """Open a Fabric for one device in this process; nothing is launched.

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
    """Return the Fabric plugin of a precision; None means `best_precision` of the device."""
    with preserve_nvml_variable():
        from lightning_fabric.plugins.precision import MixedPrecision
        from lightning_fabric.plugins.precision import Precision as FullPrecision

    mixed = (precision or best_precision(device)) is Precision.BF16_MIXED
    return MixedPrecision("bf16-mixed", device.type) if mixed else FullPrecision()


def resolve_fabric(fabric: "Fabric | None", precision: Precision | None) -> "Fabric":
    """Return the caller's Fabric if it can be used, or a new one.

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
    """Return the precision of a Fabric.

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
    """Return a context in which forward passes run in a precision, where there is no Fabric."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision is Precision.BF16_MIXED)


def in_precision(fabric: "Fabric", model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model's forward in the precision of a Fabric, with float32 outputs."""

    # Not Fabric.setup: with several processes every backward pass would then send its gradients. They travel once in
    # a step, see average_gradients_.

    def forward(*inputs: Any, **by_name: Any) -> Any:
        with fabric.autocast():
            output = model(*inputs, **by_name)
        return output.float() if isinstance(output, Tensor) else tree_map_only(Tensor, _upcast, output)

    return forward


def _upcast(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def copy_to_device(model: ModelType, device: torch.device) -> ModelType:
    """Return a copy on the device with channels-last weights of convolutions; the model stays as it is."""
    model = copy_model(model).to(device)
    for parameter in model.parameters():
        if parameter.ndim == 4:
            # Module.to(memory_format=) would refuse a model that has five-dimensional weights too.
            parameter.data = parameter.data.to(memory_format=torch.channels_last)
    return model


def channels_last(images: Tensor) -> Tensor:
    """Return images in channels-last order if they are a batch of two-dimensional images."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


@contextmanager
def seeded(device: torch.device, *seed: int) -> Generator[None]:
    """Seed the random numbers of the CPU and the device; the caller's state is restored at the end."""
    # Mixed, so that neighboring seeds and epochs have unrelated random numbers.
    number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    before = random_states(device)
    try:
        for generator in _generators(device):
            generator.manual_seed(number)
        yield
    finally:
        set_random_states(device, before)


def random_states(device: torch.device) -> tuple[Tensor, ...]:
    """Return the states of torch's generators of the CPU and the device, as uint8 tensors on the CPU."""
    return tuple(generator.get_state() for generator in _generators(device))


def set_random_states(device: torch.device, states: Sequence[Tensor]) -> None:
    """Inverse of `random_states`."""
    for generator, state in zip(_generators(device), states, strict=True):
        # A copy, because torch reads the bytes as larger numbers and crashes if they are not aligned.
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
"""Compilers set environment variables whose names begin like this."""


class Execution(ABC):
    """How student and teacher are run in a training. Implementations are frozen dataclasses.

    The caller chooses, never a measurement of time: two ways round differently, and the result of a run must not depend
    on what else the machine was doing.
    """

    @abstractmethod
    def prepared(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """Return the model's forward, to be called in a `running` block.

        The model itself stays an ordinary module with the same tensors, and hooks on its modules are called.
        """

    @abstractmethod
    def running(self) -> AbstractContextManager[None]:
        """Return a context in which prepared forwards are called and differentiated.

        Raises:
            TrainingError: If a model cannot be run like this.
        """

    @abstractmethod
    def check(self, fabric: "Fabric") -> None:
        """Refuse before the first step what would fail in it.

        Raises:
            TrainingError: If this machine cannot run any model like this.
        """


@settings
class Eager(Execution):
    """Run operation by operation, as PyTorch does by default."""

    def prepared(self, model: nn.Module) -> Callable[[Tensor], Any]:
        """See `Execution.prepared`: the model."""
        return model

    def running(self) -> AbstractContextManager[None]:
        """See `Execution.running`: nothing to do."""
        return nullcontext()

    def check(self, fabric: "Fabric") -> None:
        """See `Execution.check`: nothing to refuse."""


@settings
class Compiled(Execution):
    """Compile with `torch.compile`, for the exact shapes of the batches: about a minute, then often faster steps.

    Losses, optimizer and validation stay eager. Every process compiles again; on the CPU, with the same compiler and
    number of threads, the code computes the same bits, so that a run is resumed as exactly as an eager one. Parts of
    different sizes (`TrainConfig.accumulate`) are compiled twice; a model that keeps asking for more code is refused.

    Attributes:
        backend: Backend of `torch.compile`. ``inductor`` needs a C++ compiler on the CPU, and Triton on CUDA.
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
            # Else torch would continue eagerly after the limit, which a resumed run would reach at another step.
            with _same_notes(), config.patch(fail_on_recompile_limit_hit=True):
                yield
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            if stop_requested():  # Ctrl-C ends the C++ compiler too.
                raise KeyboardInterrupt from error
            raise TrainingError(
                f"`execution` must be one that {whom} can do; {self} failed ({_reason(error)}). {way_out}"
            ) from error


_ALONE: dict[str, Any] = (
    # Code for one model must not count as a recompilation of the next model of its class.
    {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
)


def _one_line(values: Tensor) -> Tensor:
    return values * 2 + 1


def _reason(error: BaseException) -> str:
    """Return the first line of the error beneath the layers of the compiler."""
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
