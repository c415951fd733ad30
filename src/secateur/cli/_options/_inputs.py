"""What a command is given: models and images."""

from pathlib import Path
from typing import Annotated

import typer

_MODEL, _DATA = "Model", "Data"
_SIDE, _MANY = 2**13, 2**31
"""Largest numbers that have a meaning; above them come those that no tensor can hold."""

Model = Annotated[
    str,
    typer.Option(
        help="timm:NAME, torchvision:NAME, python:pkg.mod:factory, cifar_resnet20/32/44/56/110, digits_resnet, "
        "or an artifact folder.",
        rich_help_panel=_MODEL,
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="A .safetensors file, or a torch file without code.", rich_help_panel=_MODEL),
]
TrustSource = Annotated[
    bool, typer.Option("--trust-source", help="Import and run code that --model names.", rich_help_panel=_MODEL)
]
Teacher = Annotated[
    str, typer.Option(help="As --model of the other commands.", rich_help_panel=_MODEL, show_default=False)
]
Student = Annotated[
    str, typer.Option(help="The same; new weights if none are given.", rich_help_panel=_MODEL, show_default=False)
]
TeacherWeights = Annotated[
    Path | None,
    typer.Option(help="Of the teacher: a .safetensors file, or a torch file without code.", rich_help_panel=_MODEL),
]
StudentWeights = Annotated[
    Path | None, typer.Option(help="The same for the student, to begin with.", rich_help_panel=_MODEL)
]
_DATA_HELP = (
    "Folder of Hugging Face parquet files, folder with train/ and test/ (or val/) images by class, "
    "torchvision:cifar10[:ROOT], or digits."
)
Data = Annotated[str, typer.Option(help=_DATA_HELP, rich_help_panel=_DATA, show_default=False)]
MaybeData = Annotated[str | None, typer.Option(help=_DATA_HELP, rich_help_panel=_DATA)]
Limit = Annotated[
    int | None,
    typer.Option(help="Use only the first so many training images.", min=1, max=_MANY, rich_help_panel=_DATA),
]
ImageSize = Annotated[
    int | None,
    typer.Option(help="Resize images to squares of this side, in pixels.", min=1, max=_SIDE, rich_help_panel=_DATA),
]
Mean = Annotated[
    str | None,
    typer.Option(help="Per channel, of pixels / 255, such as 0.485,0.456,0.406.", rich_help_panel=_DATA),
]
Std = Annotated[str | None, typer.Option(help="The same for the standard deviation.", rich_help_panel=_DATA)]
ValidationFraction = Annotated[
    float, typer.Option(help="Part of the training images held out for choosing.", rich_help_panel=_DATA)
]
