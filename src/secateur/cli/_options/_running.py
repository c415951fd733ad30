"""Where a command runs, and what it shows and writes."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._options._names import FormatName

_SHOW, _RUN = "Show", "Run"
_THREADS, _SEEDS = 2**10, 2**63 - 1
"""Largest numbers that have a meaning; above them come those that no tensor can hold."""

ShowTree = Annotated[
    bool, typer.Option("--tree", help="Show the modules instead: parameters, MACs, channels.", rich_help_panel=_SHOW)
]
Draw = Annotated[
    Path | None,
    typer.Option(
        help="Also write a drawing: FILE.svg for a browser, FILE.dot for graphviz.",
        metavar="FILE",
        rich_help_panel=_SHOW,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.", rich_help_panel=_SHOW)]
Out = Annotated[
    Path,
    typer.Option(
        "--out", help="Folder for the artifact, exports and report.", rich_help_panel=_RUN, show_default=False
    ),
]
Export = Annotated[
    str,
    typer.Option(
        "--export",
        metavar="NAMES",
        help=f"Files for other runtimes, such as onnx,int8: {', '.join(FormatName)}; '' for none.",
        rich_help_panel=_RUN,
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=_RUN)]
Restart = Annotated[
    bool, typer.Option("--restart", help="Remove an interrupted run and begin again.", rich_help_panel=_RUN)
]
CheckpointMinutes = Annotated[
    float,
    typer.Option(
        metavar="MINUTES",
        help="Checkpoints of searches and trainings, beside those at the ends of epochs.",
        rich_help_panel=_RUN,
    ),
]
CheckpointSteps = Annotated[
    int | None, typer.Option(metavar="N", help="The same: after so many steps.", min=1, rich_help_panel=_RUN)
]
Seed = Annotated[int, typer.Option(help="Of everything that is random.", min=0, max=_SEEDS, rich_help_panel=_RUN)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=_RUN)]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", help="Of PyTorch on the CPU; all if left out.", min=1, max=_THREADS, rich_help_panel=_RUN
    ),
]
TensorBoard = Annotated[
    Path | None,
    typer.Option(
        "--tensorboard", help="Also log the search and training there.", metavar="FOLDER", rich_help_panel=_RUN
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the results.", rich_help_panel=_RUN)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_RUN)]
