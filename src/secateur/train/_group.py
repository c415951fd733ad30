"""Several processes that torchrun has started, on one machine or many, as one Fabric."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from secateur.errors import TrainingError
from secateur.train._machine import Precision, default_device, fabric_plugin, same_environment
from secateur.workers import processes

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_PATIENCE = timedelta(days=30)
"""How long a process waits for the others: while the first searches alone, that may be long. Where one has died,
torchrun ends the rest."""


def open_group(precision: Precision | None = None, *, device: torch.device | None = None) -> "Fabric":
    """A Fabric for this process and all others that torchrun has started with it, connected to them.

    Every process has a device of its own: with CUDA the one of its number on its machine.

    Args:
        precision: None means `best_precision` of the device.
        device: Kind of device, without a number; None means the accelerator if there is one, else the CPU.

    Raises:
        TrainingError: If the device has a number, or torchrun did not start this process.
    """
    kind = device or default_device()
    if ":" in str(kind):
        raise TrainingError(
            f"`device` must have no number with several processes, each of which takes its own; got {kind}. "
            f"Say {kind.type}."
        )
    with same_environment():
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning_fabric.strategies.ddp import DDPStrategy

    together = processes()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", together))
    if not TorchElasticEnvironment.detect() or together % here:
        raise TrainingError(
            f"Several processes must be started by torchrun, as many on each machine; got {together} in all and {here} "
            "on this one, or not all of its variables. Run torchrun --nproc-per-node N."
        )
    fabric = Fabric(
        accelerator=kind.type,
        devices=here,
        num_nodes=together // here,
        strategy=DDPStrategy(timeout=_PATIENCE),
        plugins=[TorchElasticEnvironment(), fabric_plugin(precision, kind)],
    )
    fabric.launch()
    return fabric
