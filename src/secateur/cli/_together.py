"""The processes of a command: one, or as many as torchrun has started."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from secateur.workers import processes

if TYPE_CHECKING:
    import torch
    from lightning_fabric import Fabric

    from secateur.train import Precision


@contextmanager
def processes_of(device: "torch.device | None", precision: "Precision | None") -> "Generator[Fabric]":
    """The Fabric of this process and of those that were started with it.

    Args:
        device: None for the accelerator if there is one.
        precision: None for the best that the device has.

    Raises:
        TrainingError: If the processes cannot work together.
    """
    from secateur.train import open_fabric, open_group

    if processes() == 1:
        yield open_fabric(precision, device=device)
        return
    import torch

    yield open_group(precision, device=device)
    # Not after an error: the others would be waited for, who wait for this one.
    torch.distributed.destroy_process_group()
