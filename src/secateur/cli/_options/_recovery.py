"""Training: of what was cut, or of any student."""

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._options._names import LossName, OptimiserName, PrecisionName

_TRAIN = "Recovery"
_WIDEST = 2**20
"""The largest number that has a meaning; above it come those that no tensor can hold."""

FromScratch = Annotated[
    bool,
    typer.Option(
        "--from-scratch",
        help="Draw all weights anew: needs --epochs and --lr like the original.",
        rich_help_panel=_TRAIN,
    ),
]
Epochs = Annotated[int, typer.Option(help="Of distillation; 0 heals only.", min=0, rich_help_panel=_TRAIN)]
BatchSize = Annotated[int, typer.Option(help="Images per step.", min=1, max=_WIDEST, rich_help_panel=_TRAIN)]
LearningRate = Annotated[
    float, typer.Option("--lr", help="The highest; a high one wipes healing out.", rich_help_panel=_TRAIN)
]
Warmup = Annotated[
    float, typer.Option(help="Part of the steps with a rising rate.", min=0, max=1, rich_help_panel=_TRAIN)
]
Optimiser = Annotated[OptimiserName, typer.Option("--optimizer", help="For the recovery.", rich_help_panel=_TRAIN)]
WeightDecay = Annotated[
    float | None, typer.Option(help="None: the optimizer's usual one.", min=0, rich_help_panel=_TRAIN)
]
Ema = Annotated[
    float | None, typer.Option(help="Decay of an average of the weights, such as 0.999.", rich_help_panel=_TRAIN)
]
Accumulate = Annotated[
    int,
    typer.Option(
        help="Parts that each batch is computed in: less memory, the same step.", min=1, rich_help_panel=_TRAIN
    ),
]
ClipNorm = Annotated[
    float | None, typer.Option(help="Longest gradient, as an L2 norm, such as 1.", rich_help_panel=_TRAIN)
]
LabelSmoothing = Annotated[
    float, typer.Option(help="Share of a label spread over all classes.", rich_help_panel=_TRAIN)
]
AutoAugment = Annotated[
    str | None,
    typer.Option(
        "--auto-augment",
        "--rand-augment",
        metavar="POLICY",
        help="Vary training images as timm does: rand-m9-mstd0.5-inc1, original, augmix-m3-w3, ...",
        rich_help_panel=_TRAIN,
    ),
]
Erase = Annotated[
    float, typer.Option(help="Probability that a part of a training image is erased.", rich_help_panel=_TRAIN)
]
Mixup = Annotated[
    float, typer.Option(metavar="ALPHA", help="Mix pairs of training images; 0 does not.", rich_help_panel=_TRAIN)
]
Cutmix = Annotated[
    float,
    typer.Option(
        metavar="ALPHA", help="Paste parts of training images into others; 0 does not.", rich_help_panel=_TRAIN
    ),
]
Temperature = Annotated[float, typer.Option(help="Of the softened probabilities.", rich_help_panel=_TRAIN)]
KdWeight = Annotated[float, typer.Option(help="Of the teacher's probabilities.", min=0, rich_help_panel=_TRAIN)]
LabelWeight = Annotated[float, typer.Option(help="Of the labels.", min=0, rich_help_panel=_TRAIN)]
FeatureWeight = Annotated[float, typer.Option(help="Of the teacher's aligned features.", min=0, rich_help_panel=_TRAIN)]
Precision = Annotated[PrecisionName, typer.Option(help="Number formats of the training.", rich_help_panel=_TRAIN)]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Run both networks by torch.compile: about a minute at first, then often faster.",
        rich_help_panel=_TRAIN,
    ),
]
Losses = Annotated[
    list[str] | None,
    typer.Option(
        "--loss",
        metavar="NAME[=WEIGHT]",
        help=f"{', '.join(LossName)}; repeatable. kd alone if left out.",
        rich_help_panel=_TRAIN,
    ),
]
Hints = Annotated[
    list[str] | None,
    typer.Option(
        metavar="STUDENT=TEACHER",
        help="Modules whose outputs losses of features compare; the last at each resolution if left out. Repeatable.",
        rich_help_panel=_TRAIN,
    ),
]
HintEpochs = Annotated[
    int, typer.Option(help="Epochs of losses of features alone, before the others.", min=0, rich_help_panel=_TRAIN)
]
Remember = Annotated[
    Path | None,
    typer.Option(
        "--remember",
        metavar="FOLDER",
        help="Keep the teacher's logits there; later runs with the same seed read them.",
        rich_help_panel=_TRAIN,
    ),
]
