"""One run on several processes: the first finds, writes and speaks, all train."""

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from secateur.errors import TrainingError
from secateur.pipeline._work import Leftover, Workplace, surroundings_of, workplace, workplace_of
from secateur.train import Precision, open_fabric, usable

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def fabric_for(
    fabric: "Fabric | None", precision: Precision | None, device: torch.device | None, out: Path | None
) -> "Fabric":
    """The caller's Fabric, or one for a device in this process.

    Raises:
        TrainingError: If both are given, the Fabric cannot be used, or its processes have no folder to share.
    """
    if fabric is None:
        return open_fabric(precision, device=device)
    if device is not None:
        raise TrainingError(
            f"`device` must be left out with `fabric`, which has one; got {device}. Give one of the two."
        )
    if fabric.world_size > 1 and out is None:
        raise TrainingError(
            f"`out` must be given with {fabric.world_size} processes; got None. The first hands on to the others "
            "there: name a folder that all machines share."
        )
    return usable(fabric, precision)


@contextmanager
def first_alone(fabric: "Fabric") -> Generator[None]:
    """A block that the first process goes through before all others begin it.

    If it fails there the others wait until torchrun ends them.
    """
    if not fabric.is_global_zero:
        fabric.barrier()
    yield
    if fabric.is_global_zero and fabric.world_size > 1:
        fabric.barrier()


@contextmanager
def shared_workplace(
    fabric: "Fabric", out: Path, settings: Mapping[str, str], leftover: Leftover
) -> Generator[Workplace]:
    """The work of a run until it is finished, see `workplace`: the first process has it, then the others read it.

    What was left at the same place is gone on with, or removed, before they look.
    """
    with ExitStack() as stack:
        with first_alone(fabric):
            if fabric.is_global_zero:
                work = stack.enter_context(workplace(out, settings, leftover, surroundings_of(fabric.device)))
            else:
                work = workplace_of(out)
        yield work
