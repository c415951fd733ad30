"""Where to compute and in which number formats: Lightning Fabric on one device."""

import copy
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import TrainingError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.precision import Precision as FabricPrecision

Model = TypeVar("Model", bound=nn.Module)


class Precision(Enum):
    """Number formats of forward and backward passes. Weights and optimiser are float32 in both."""

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
    with same_environment():
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
    with same_environment():
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
    if precision is not None and precision is not precision_of(fabric):
        raise TrainingError(
            f"`precision` must be that of `fabric`, {precision_of(fabric).name}; got {precision.name}. "
            "Give one of the two."
        )
    return fabric


def precision_of(fabric: "Fabric") -> Precision:
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


def placed(model: Model, device: torch.device) -> Model:
    """A copy on the device with channels-last weights of convolutions; the model itself stays as it is."""
    model = copy.deepcopy(model).to(device)
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
    """Random numbers from a seed on the CPU and the device; the caller's state is put back afterwards."""
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
def same_environment() -> Generator[None]:
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
