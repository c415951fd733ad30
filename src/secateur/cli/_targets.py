"""What a latency is on, from the words of the command line. Nothing here loads torch, so that ``--help`` is quick."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli._devices import check_device

if TYPE_CHECKING:
    from secateur.latency import Target


class TargetName(StrEnum):
    """Runtimes by name; see `secateur.latency`."""

    ORT = "ort"
    TORCH = "torch"
    COMPILED = "compiled"


_PANEL = "Latency"
_THREADS, _BATCH, _ROUNDS = 2**10, 2**16, 10**6
_TARGET_HELP = "Runtime: ort (ONNX Runtime on the CPU), torch (eager), or compiled (torch.compile)."

TargetOption = Annotated[
    TargetName, typer.Option("--target", help=f"Of a bound on latency. {_TARGET_HELP}", rich_help_panel=_PANEL)
]
TargetThreads = Annotated[
    int,
    typer.Option("--target-threads", help="Of the runtime on the CPU.", min=1, max=_THREADS, rich_help_panel=_PANEL),
]
TargetBatch = Annotated[
    int, typer.Option("--target-batch", help="Images per pass.", min=1, max=_BATCH, rich_help_panel=_PANEL)
]
TargetDevice = Annotated[
    str,
    typer.Option("--target-device", help="Of torch and compiled: cpu, cuda or mps.", rich_help_panel=_PANEL),
]

BenchTarget = Annotated[TargetName, typer.Option("--target", help=_TARGET_HELP, rich_help_panel=_PANEL)]
BenchThreads = Annotated[
    int, typer.Option("--threads", help="On the CPU.", min=1, max=_THREADS, rich_help_panel=_PANEL)
]
BenchBatch = Annotated[int, typer.Option("--batch", help="Images per pass.", min=1, max=_BATCH, rich_help_panel=_PANEL)]
BenchDevice = Annotated[
    str, typer.Option("--device", help="Of torch and compiled: cpu, cuda or mps.", rich_help_panel=_PANEL)
]
Rounds = Annotated[
    int,
    typer.Option(
        help="Turns of each model that are measured, after warm-up.", min=3, max=_ROUNDS, rich_help_panel=_PANEL
    ),
]


def target_of(
    name: TargetName, threads: int, batch: int, device: str = "cpu", *, device_flag: str = "--target-device"
) -> Target:
    """The target of a name.

    Raises:
        ExportError: If a flag has no effect on it.
        TrainingError: If this machine has no such device.
    """
    from secateur.errors import ExportError
    from secateur.latency import OnnxRuntime, TorchCompiled, TorchEager

    if name is TargetName.ORT:
        if device != "cpu":
            raise ExportError(
                f"`--target ort` must run on the CPU; got the device {device!r}. Say --target torch or compiled for it."
            )
        return OnnxRuntime(threads, batch)
    check_device(device_flag, device)
    return (TorchEager if name is TargetName.TORCH else TorchCompiled)(threads, batch, device)
