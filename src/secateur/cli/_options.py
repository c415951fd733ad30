"""The flags, each written once. Nothing here loads torch, so that ``--help`` is quick."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class StrategyName(StrEnum):
    """Strategies by name; see `secateur.search`."""

    KNAPSACK = "knapsack"
    PCA = "pca"
    PCA_ACTIVATIONS = "pca-activations"
    GLOBAL = "global"
    UNIFORM = "uniform"
    TAS = "tas"
    SWP = "swp"


class SearchedName(StrEnum):
    """What a search that learns searches, by name; see `secateur.search.TAS` and `secateur.search.SWP`."""

    WIDTHS = "widths"
    DEPTHS = "depths"
    BOTH = "both"


class CombinationName(StrEnum):
    """How one candidate of every stage is chosen, by name; see `secateur.search.SWP`."""

    EXACT = "exact"
    EVOLUTION = "evolution"


class ImportanceName(StrEnum):
    """Importances by name; see `secateur.importance`."""

    RECONSTRUCTION = "reconstruction"
    L1 = "l1"
    L2 = "l2"
    FPGM = "fpgm"
    BN_SCALE = "bn-scale"
    TAYLOR = "taylor"
    LAMP = "lamp"
    RANDOM = "random"


class LossName(StrEnum):
    """Distillation losses by name; see `secateur.distill`."""

    KD = "kd"
    DKD = "dkd"
    DIST = "dist"
    STANDARDISED = "standardised"
    HINT = "hint"
    ATTENTION = "attention"
    VID = "vid"
    RKD = "rkd"
    SP = "sp"
    PKT = "pkt"
    CRD = "crd"
    REVIEW = "review"


class WeightScoreName(StrEnum):
    """Scores of single weights by name; see `secateur.sparsity.WeightScore`."""

    MAGNITUDE = "magnitude"
    TAYLOR = "taylor"
    SNIP = "snip"
    MOVEMENT = "movement"
    RANDOM = "random"


class AllocationName(StrEnum):
    """How many weights each layer keeps, by name; see `secateur.sparsity.Allocation`."""

    GLOBAL = "global"
    ERK = "erk"
    EVEN = "even"
    TWO_OF_FOUR = "2:4"
    FOUR_OF_EIGHT = "4:8"


class WeightScheduleName(StrEnum):
    """When weights go, by name; see `secateur.sparsity.SparsitySchedule`."""

    CUBIC = "cubic"
    ITERATIVE = "iterative"
    ONE_SHOT = "one-shot"


class OptimiserName(StrEnum):
    """Optimisers by name."""

    SGD = "sgd"
    ADAMW = "adamw"


class PrecisionName(StrEnum):
    """Number formats by name."""

    AUTO = "auto"
    FLOAT32 = "32"
    BF16 = "bf16"


class AttentionName(StrEnum):
    """What is kept or removed as one in attention; see `secateur.graph.HeadUnit`."""

    HEADS = "heads"
    DIMENSIONS = "dimensions"


class FormatName(StrEnum):
    """Files for other runtimes by name; see `secateur.Format`."""

    ONNX = "onnx"
    PT2 = "pt2"
    OPENVINO = "openvino"
    EXECUTORCH = "executorch"
    INT8 = "int8"


_MODEL, _DATA, _CUT, _TRAIN, _RUN = "Model", "Data", "Search and cut", "Recovery", "Run"
_SHOW = "Show"
_SIDE, _WIDEST, _THREADS, _MANY, _SEEDS = 2**13, 2**20, 2**10, 2**31, 2**63 - 1
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

BudgetText = Annotated[
    str,
    typer.Option(
        help="Upper bounds, such as macs=50%, latency=4ms or 'macs<=20M, latency=60%, size<=2MB'; nonzero=20% prunes "
        "single weights.",
        rich_help_panel=_CUT,
        show_default=False,
    ),
]
Strategy = Annotated[StrategyName, typer.Option(help="How widths are found.", rich_help_panel=_CUT)]
Importance = Annotated[
    ImportanceName | None,
    typer.Option(help="Which channels stay; the strategy's usual one if left out.", rich_help_panel=_CUT),
]
Divisor = Annotated[
    int, typer.Option(help="Widths are multiples of it; 8 or 16 for speed.", min=1, max=_WIDEST, rich_help_panel=_CUT)
]
MinWidth = Annotated[int, typer.Option(help="Fewest channels of an axis.", min=1, max=_WIDEST, rich_help_panel=_CUT)]
MinKept = Annotated[
    float, typer.Option(help="Smallest part of an axis that stays, 0 to 1.", min=0, max=1, rich_help_panel=_CUT)
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Cut only what matches: axes, modules or stages by name, such as 'layer2' or '*.conv1'; repeatable.",
        rich_help_panel=_CUT,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Do not cut the channels of what matches; repeatable.", rich_help_panel=_CUT),
]
KeepWhole = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Take no weight from the layers that match, not even for channels they read; repeatable.",
        rich_help_panel=_CUT,
    ),
]
Attention = Annotated[
    AttentionName,
    typer.Option(
        help="Cut whole heads, or the same dimensions of every head where the attention's scale allows it.",
        rich_help_panel=_CUT,
    ),
]
AxisDivisor = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=N", help="--divisor for the axes that match; repeatable.", rich_help_panel=_CUT),
]
AxisMinWidth = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=N", help="--min-width for the axes that match; repeatable.", rich_help_panel=_CUT),
]
AxisMinKept = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN=X", help="--min-kept for the axes that match; repeatable.", rich_help_panel=_CUT),
]
RemoveBlocks = Annotated[
    float,
    typer.Option(
        help="Largest part of the residual blocks that may be removed whole, 0 to 1; 0 cuts channels only.",
        metavar="FRACTION",
        min=0,
        max=1,
        rich_help_panel=_CUT,
    ),
]
Untied = Annotated[
    bool,
    typer.Option(
        "--untied", help="Branches of a residual stream may keep fewer channels than it.", rich_help_panel=_CUT
    ),
]
SearchEpochs = Annotated[
    int | None,
    typer.Option(help="Of --strategy tas or swp; its usual number if left out.", min=1, rich_help_panel=_CUT),
]
SearchOver = Annotated[
    SearchedName | None,
    typer.Option(help="What --strategy tas or swp searches; widths if left out.", rich_help_panel=_CUT),
]
SearchLearningRate = Annotated[
    float | None,
    typer.Option(
        "--search-learning-rate", help="Highest of the weights in --strategy tas or swp.", rich_help_panel=_CUT
    ),
]
SearchCandidates = Annotated[
    int | None,
    typer.Option(
        help="Judged in every stage by --strategy swp; its usual number if left out.", max=_WIDEST, rich_help_panel=_CUT
    ),
]
Combine = Annotated[
    CombinationName | None,
    typer.Option(
        help="How --strategy swp chooses one candidate of every stage; exact if left out.", rich_help_panel=_CUT
    ),
]
StageEnd = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE",
        help="Ends a stage in --strategy swp; repeatable. Found if left out: see inspect.",
        rich_help_panel=_CUT,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Judge candidates of --strategy swp on Ray: local, auto (this machine's cluster), or HOST:PORT.",
        rich_help_panel=_CUT,
    ),
]
Calibration = Annotated[
    int, typer.Option(help="Training images for search and healing.", min=1, max=_MANY, rich_help_panel=_CUT)
]

WeightScore = Annotated[
    WeightScoreName | None,
    typer.Option(help="With a bound on nonzero: what single weights are worth.", rich_help_panel=_CUT),
]
WeightAllocation = Annotated[
    AllocationName | None,
    typer.Option(help="The same: which layers lose them.", rich_help_panel=_CUT),
]
WeightSchedule = Annotated[
    WeightScheduleName | None,
    typer.Option(help="The same: when they go in the recovery.", rich_help_panel=_CUT),
]
Dense = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="The same: layers that lose none, by name; repeatable.", rich_help_panel=_CUT),
]

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
