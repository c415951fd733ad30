"""Devices by name.

Groups of flags: classes whose fields typer sees as flags of the command itself.

What flags can be set to, where that is one of a few words.

Budget, search, and what may be cut.

What a command is given: models and images.

Training: of what was cut, or of any student.

Where a command runs, and what it shows and writes.

What a latency is on, from the words of the command line. Nothing here loads torch, so that ``--help`` is quick."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.errors import TrainingError

if TYPE_CHECKING:
    import torch

    from secateur.cost.targets import Target


_KINDS = ("cpu", "cuda", "mps")


def check_device(flag: str, text: str, *, instead: str = "cpu") -> torch.device:
    """The device of a name.

    Args:
        flag: That the name was given with, for the message.
        text: Such as cpu or cuda:1.
        instead: What to say instead, for the message.

    Raises:
        TrainingError: If this machine has no such device.
    """
    import torch

    reason = f"one of {', '.join(_KINDS)} is wanted"
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
    else:
        if device.type in _KINDS:
            return device
    raise TrainingError(
        f"`{flag}` must be a device that this machine has: cpu, cuda, cuda:N or mps; got {text!r} ({reason}). "
        f"Say {instead}."
    )


def expand_dataclasses(command: Callable[..., None]) -> Callable[..., None]:
    """Let typer see the fields of every parameter that is a dataclass, in its place, as parameters of the command.

    So flags that commands share are written once, with their usual values, and reach the command as one object.
    """
    parameters = inspect.signature(command).parameters
    groups: dict[str, Any] = {name: p.annotation for name, p in parameters.items() if is_dataclass(p.annotation)}
    flat = [
        flag
        for name, parameter in parameters.items()
        for flag in (inspect.signature(groups[name]).parameters.values() if name in groups else [parameter])
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {flag.name: flag.annotation for flag in flat}
    return run


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
    STANDARDIZED = "standardized"
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
    """Optimizers by name."""

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


_CUT = "Search and cut"
_WIDEST, _MANY_CUT = 2**20, 2**31
"""Largest numbers that have a meaning; above them come those that no tensor can hold."""

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
    float | None,
    typer.Option(
        help="Largest part of the residual blocks that may be removed whole, 0 to 1; 0 cuts channels only. 1 if the "
        "budget limits the latency, else 0.",
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
    int, typer.Option(help="Training images for search and repairs.", min=1, max=_MANY_CUT, rich_help_panel=_CUT)
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


_TRAIN = "Recovery"
_WIDEST_RATE = 2**20
"""The largest number that has a meaning; above it come those that no tensor can hold."""

FromScratch = Annotated[
    bool,
    typer.Option(
        "--from-scratch",
        help="Draw all weights anew: needs --epochs and --lr like the original.",
        rich_help_panel=_TRAIN,
    ),
]
Epochs = Annotated[int, typer.Option(help="Of distillation; 0 repairs only.", min=0, rich_help_panel=_TRAIN)]
BatchSize = Annotated[int, typer.Option(help="Images per step.", min=1, max=_WIDEST_RATE, rich_help_panel=_TRAIN)]
LearningRate = Annotated[
    float, typer.Option("--lr", help="The highest; a high one wipes repairs out.", rich_help_panel=_TRAIN)
]
Warmup = Annotated[
    float, typer.Option(help="Part of the steps with a rising rate.", min=0, max=1, rich_help_panel=_TRAIN)
]
Optimizer = Annotated[OptimiserName, typer.Option("--optimizer", help="For the recovery.", rich_help_panel=_TRAIN)]
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


class TargetName(StrEnum):
    """Runtimes by name; see `secateur.latency`."""

    ORT = "ort"
    TORCH = "torch"
    COMPILED = "compiled"


_PANEL = "Latency"
_TARGET_THREADS, _BATCH, _ROUNDS = 2**10, 2**16, 10**6
_TARGET_HELP = "Runtime: ort (ONNX Runtime on the CPU), torch (eager), or compiled (torch.compile)."

TargetOption = Annotated[
    TargetName, typer.Option("--target", help=f"Of a bound on latency. {_TARGET_HELP}", rich_help_panel=_PANEL)
]
TargetThreads = Annotated[
    int,
    typer.Option(
        "--target-threads", help="Of the runtime on the CPU.", min=1, max=_TARGET_THREADS, rich_help_panel=_PANEL
    ),
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
    int, typer.Option("--threads", help="On the CPU.", min=1, max=_TARGET_THREADS, rich_help_panel=_PANEL)
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
    from secateur.cost.targets import OnnxRuntime, TorchCompiled, TorchEager
    from secateur.errors import ExportError

    if name is TargetName.ORT:
        if device != "cpu":
            raise ExportError(
                f"`--target ort` must run on the CPU; got the device {device!r}. Say --target torch or compiled for it."
            )
        return OnnxRuntime(threads, batch)
    check_device(device_flag, device)
    return (TorchEager if name is TargetName.TORCH else TorchCompiled)(threads, batch, device)
