"""The flags of the command line, each written once: its name, type, bounds, panel and help.

A frozen dataclass is a group of flags that a command takes as one argument; its ``to_...`` methods make the objects of
the Python interface, or raise a `SecateurError` that says which flag is wrong. Nothing here loads torch before such a
method runs, so that ``--help`` is quick.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from cyclopts import Group, Parameter, Token
from cyclopts.validators import Number

from secateur.cli.words import MAX_CHANNELS
from secateur.errors import ArtifactError, ExportError, TrainingError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from secateur.cli.tasks import NamedTask
    from secateur.cost.runtimes import Target
    from secateur.data.dataset import ImageData
    from secateur.data.loaders import OwnData
    from secateur.export.onnx_config import OnnxConfig
    from secateur.pipeline.config import CutConfig, RecoveryConfig, RunConfig
    from secateur.pipeline.workspace import OnExisting
    from secateur.prune.weight_pruning import WeightPruning
    from secateur.train.config import TrainConfig
    from secateur.train.device import Execution

MODEL_AND_DATA = Group("Model and data", sort_key=1)
CUT = Group("Search and cut", sort_key=2)
TRAIN = Group("Training", sort_key=3)
RUN = Group("Output and run", sort_key=4)
ADVANCED = Group("Advanced", sort_key=5)

MAX_COUNT, MAX_SEED = 2**31, 2**63 - 1
MAX_THREADS, MAX_BATCH, MAX_ROUNDS = 2**10, 2**16, 10**6
"""The largest numbers that have a meaning; no tensor can hold what lies above them."""

DEFAULT_LABEL_WEIGHT = 0.1
"""Weight of the labels beside a teacher's probabilities: Hinton's usual weights, 0.9 and 0.1."""
_P = "PATTERN"
AUGMENT_NAMES = ("--auto-augment", "--rand-augment")
"""Both names of one flag."""


def flag(text: str, panel: Group = ADVANCED, *, name: str | Sequence[str] = (), value: str | None = None) -> Parameter:
    """Describe one flag.

    Args:
        text: One line of help that can be read without the flag's name.
        panel: Where ``--help`` shows it.
        name: The flag, or several; derived from the name of the argument if none is given.
        value: The placeholder of its value; derived from the type if none is given.
    """
    return Parameter(name=name or None, help=text, group=panel, metavar=value, show_default=_shown, show_choices=False)


def choice(text: str, panel: Group = ADVANCED) -> Parameter:
    """Describe a flag with one of a few names."""
    return flag(text, panel, value="NAME")


def whole_number(
    text: str, panel: Group = ADVANCED, *, name: str | Sequence[str] = (), least: int = 1, most: int | None = None
) -> Parameter:
    """Describe a flag with a whole number from ``least`` to ``most``."""
    bounds = Parameter(validator=Number(gte=least, lte=most), converter=_to_whole_number)
    return Parameter.combine(flag(text, panel, name=name, value="N"), bounds)


def _to_whole_number(_type: object, tokens: Sequence[Token]) -> int:
    """Refuse fractions, which Cyclopts would round."""
    text = tokens[0].value.lower()
    try:
        if "." in text and float(text).is_integer():
            return int(float(text))
        return int(text, 0 if text.lstrip("+-")[:2] in ("0x", "0o", "0b") else 10)
    except ValueError:
        raise ValueError(f'unable to convert "{tokens[0].value}" into int.') from None


def number(
    text: str,
    panel: Group = ADVANCED,
    *,
    name: str | Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
) -> Parameter:
    """Describe a flag with a number from ``least`` to ``most``."""
    return Parameter.combine(flag(text, panel, name=name, value="X"), Parameter(validator=Number(gte=least, lte=most)))


def _shown(default: object) -> str | None:
    """Return how a default is shown; without a word where it means that nothing is done."""
    if default in (None, False, 0, (), ""):
        return None
    if isinstance(default, tuple):
        return ", ".join(map(str, cast(tuple[object, ...], default)))
    return f"{default:g}" if isinstance(default, float) else str(default)


Attention = Literal["heads", "dimensions"]
SearchedName = Literal["widths", "depths", "both"]
CombinationName = Literal["exact", "evolution"]
AblationName = Literal["no-stages", "no-sandwich", "no-in-place", "autoslim"]
TASPresetName = Literal["short", "paper-cifar", "paper-imagenet"]
PCAName = Literal["raw", "folded", "correlation"]
RankCapName = Literal["stretched", "literal"]
WeightScoreName = Literal["magnitude", "taylor", "snip", "movement", "random"]
AllocationName = Literal["global", "erk", "even", "2:4", "4:8"]
WeightScheduleName = Literal["cubic", "iterative", "one-shot"]
OptimizerName = Literal["sgd", "adamw"]
PrecisionName = Literal["auto", "32", "bf16"]
TargetName = Literal["ort", "torch", "compiled"]
Patterns = tuple[str, ...]

# Flags of several commands.

_DATA_HELP = "Folder of images or parquet files, coco:FOLDER, digits, ..."
Model = Annotated[str, choice("timm:NAME, torchvision:NAME, python:..., an artifact, ...", MODEL_AND_DATA)]
WeightsFile = Annotated[
    Path | None, flag("A .safetensors file, a torch file, or an artifact of --model.", MODEL_AND_DATA)
]
WeightsKey = Annotated[str | None, flag("Which weights of a file with several: model, ema, ...", value="NAME")]
Data = Annotated[str, choice(_DATA_HELP, MODEL_AND_DATA)]
MaybeData = Annotated[str | None, choice(_DATA_HELP, MODEL_AND_DATA)]
TrustSource = Annotated[bool, flag("Import and run the code that python:PACKAGE.MODULE:NAME names.", MODEL_AND_DATA)]
TaskText = Annotated[
    str | None,
    choice("segmentation, detection, imitation, ...: see docs/tasks.md.", MODEL_AND_DATA),
]
# Some that few need, and that messages name; docs/tasks.md describes them, and --help has no room.
Void = Annotated[int | None, Parameter(show=False, validator=Number(gte=0, lte=MAX_COUNT))]
NumClasses = Annotated[int | None, Parameter(show=False, validator=Number(gte=1, lte=MAX_CHANNELS))]
ImageSize = Annotated[str | None, flag("Resize images: 240x320 (height x width), 224.", MODEL_AND_DATA, value="SIZE")]
Channels = Annotated[str | None, Parameter(show=False)]
Resize = Annotated[str | None, Parameter(show=False)]
Mean = Annotated[str | None, flag("Mean of each channel of pixels / 255, such as 0.5,0.5,0.5.", value="X,...")]
Std = Annotated[str | None, flag("Standard deviation of each channel of pixels / 255.", value="X,...")]
SkipBadImages = Annotated[bool, flag("Leave out images that cannot be decoded, and name them.", MODEL_AND_DATA)]
BatchSize = Annotated[
    int | None, whole_number("Images per step; 128 by default, or 16 for other tasks.", TRAIN, most=MAX_CHANNELS)
]
Out = Annotated[Path, flag("Folder for the artifact, exports and report.", RUN, name="--out")]
Export = Annotated[str, flag("Other files: onnx, pt2, openvino, executorch, int8.", RUN, value="NAMES")]
Seed = Annotated[int, whole_number("Random seed.", RUN, least=0, most=MAX_SEED)]
Device = Annotated[str, choice("Device: auto, cpu, cuda, cuda:1 or mps.", RUN)]
Threads = Annotated[
    int | None, whole_number("CPU threads of PyTorch; all by default.", RUN, name="--threads", most=MAX_THREADS)
]
TensorBoardFolder = Annotated[
    Path | None, flag("Also log searches and trainings for TensorBoard.", name="--tensorboard", value="FOLDER")
]
Quiet = Annotated[bool, flag("Print only the result, in one line.", RUN)]
Debug = Annotated[bool, flag("Show the traceback of an error.")]
AsJson = Annotated[bool, flag("Print one JSON object instead of tables.", RUN, name="--json")]
BudgetText = Annotated[str, flag("Bounds: macs=50%, latency=4ms, 'size<=2MB, nonzero=20%'.", CUT, value="BOUNDS")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class LoadingFlags:
    """How models and images of strangers are read."""

    weights_key: WeightsKey = None
    trust_source: TrustSource = False
    skip_bad_images: SkipBadImages = False


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ReadingFlags(LoadingFlags):
    """How images are read and prepared."""

    task: TaskText = None
    image_size: ImageSize = None
    resize: Resize = None
    channels: Channels = None
    mean: Mean = None
    std: Std = None
    void: Void = None
    num_classes: NumClasses = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ImageFlags(ReadingFlags):
    """Which images a model is trained on, and how they are prepared."""

    limit: Annotated[int | None, whole_number("Use only the first N training images.", most=MAX_COUNT)] = None
    validation_fraction: Annotated[float, number("Fraction of training images that choose the epoch.")] = 0.1


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class NormalizationFlags:
    """What pixels are normalized with."""

    mean: Mean = None
    std: Std = None


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SpaceFlags:
    """Which layers may be cut, and to which widths."""

    divisor: Annotated[
        int | None,
        whole_number("Keep a multiple of N channels; 1, 4, 8, 16 are timed by default.", CUT, most=MAX_CHANNELS),
    ] = None
    min_width: Annotated[int, whole_number("Smallest number of channels of an axis.", CUT, most=MAX_CHANNELS)] = 1
    min_kept: Annotated[float, number("Smallest fraction of an axis that is kept.", CUT, least=0, most=1)] = 0.25
    include: Annotated[Patterns, flag("Cut only matching axes, modules or stages, such as layer2.", CUT, value=_P)] = ()
    exclude: Annotated[Patterns, flag("Never cut what matches. All patterns are repeatable.", CUT, value=_P)] = ()
    keep_whole: Annotated[Patterns, flag("Keep all weights of matching layers, inputs too.", value=_P)] = ()
    axis_divisor: Annotated[Patterns, flag("Use another --divisor for matching axes.", value=f"{_P}=N")] = ()
    axis_min_width: Annotated[Patterns, flag("Use another --min-width for matching axes.", value=f"{_P}=N")] = ()
    axis_min_kept: Annotated[Patterns, flag("Use another --min-kept for matching axes.", value=f"{_P}=X")] = ()
    attention: Annotated[Attention, choice("Cut heads, or dimensions of each head.")] = "dimensions"
    untied: Annotated[bool, flag("Let residual branches keep fewer channels than their stream.")] = False
    allow_not_run: Annotated[bool, flag("Cut also what parts that the example does not run may read.")] = False

    def to_config(self) -> "CutConfig":
        """Build the part of `CutConfig` that says what may be cut."""
        from secateur.cli.parsing import axis_rules, selection
        from secateur.graph.trace import HeadUnit
        from secateur.pipeline.config import Branches, CutConfig
        from secateur.search.space import SearchSpace

        rules = axis_rules(self.axis_divisor, self.axis_min_width, self.axis_min_kept)
        return CutConfig(
            selection=selection(self.include, self.exclude, self.keep_whole),
            heads={"heads": HeadUnit.HEAD, "dimensions": HeadUnit.DIMENSION}[self.attention],
            branches=Branches.UNTIED if self.untied else Branches.TIED,
            space=SearchSpace(self.min_width, self.divisor, self.min_kept, rules),
            allow_not_run=self.allow_not_run,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SearchFlags:
    """How an architecture is found; None and () mean the default of the strategy."""

    strategy: Annotated[
        str | None,
        choice("auto, knapsack, pca, pca-activations, global, uniform, tas, swp, ...", CUT),
    ] = None
    importance: Annotated[
        str | None, choice("reconstruction, l1, l2, fpgm, bn-scale, taylor, lamp, random, python:...", CUT)
    ] = None
    remove_blocks: Annotated[
        float | None,
        number("Largest fraction of blocks removed; 1 for latency budgets, else 3/8.", CUT, least=0, most=1),
    ] = None
    search_epochs: Annotated[int | None, whole_number("Epochs of the search by tas or swp.")] = None
    search_over: Annotated[
        SearchedName | None, choice("What tas and swp search: widths (default), depths or both.")
    ] = None
    search_learning_rate: Annotated[float | None, number("Peak learning rate in tas and swp.")] = None
    search_candidates: Annotated[int | None, whole_number("Candidates for each stage in swp.", most=MAX_CHANNELS)] = (
        None
    )
    combine: Annotated[CombinationName | None, choice("How swp combines candidates: exact (default) or evolution.")] = (
        None
    )
    stage_end: Annotated[Patterns, flag("Module that ends a stage in swp; repeatable.", value="MODULE")] = ()
    tas_preset: Annotated[
        TASPresetName | None, choice("tas: short (default); as published paper-cifar, paper-imagenet.")
    ] = None
    swp_ablation: Annotated[
        AblationName | None, choice("Ablation of swp: no-stages, no-sandwich, no-in-place or autoslim.")
    ] = None
    pca: Annotated[PCAName | None, choice("pca: folded (default), raw (as published) or correlation.")] = None
    rank_cap: Annotated[RankCapName | None, choice("pca: stretched (default), or literal as published.")] = None
    ray: Annotated[str | None, flag("Judge candidates of swp on Ray: local, auto or HOST:PORT.", value="ADDRESS")] = (
        None
    )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class WeightFlags:
    """How single weights are pruned under a budget for ``nonzero``."""

    weight_score: Annotated[
        WeightScoreName | None, choice("With nonzero=: magnitude, taylor, snip, movement or random.")
    ] = None
    weight_allocation: Annotated[
        AllocationName | None, choice("Which layers lose weights: global, erk, even, 2:4 or 4:8.")
    ] = None
    weight_schedule: Annotated[
        WeightScheduleName | None, choice("When weights are removed: cubic, iterative or one-shot.")
    ] = None
    dense: Annotated[Patterns, flag("Keep every weight of matching layers nonzero.", value=_P)] = ()

    def to_pruning(self) -> "WeightPruning | None":
        """Build the `WeightPruning` that the flags describe; None if none of them is given."""
        from secateur import prune

        if self == WeightFlags():
            return None
        scores = {
            "magnitude": prune.MagnitudeScore(),
            "taylor": prune.TaylorScore(),
            "snip": prune.SnipScore(),
            "movement": prune.MovementScore(),
            "random": prune.RandomScore(),
        }
        allocations = {
            "global": prune.GlobalAllocation(),
            "erk": prune.ERKAllocation(),
            "even": prune.UniformAllocation(),
            "2:4": prune.NOfM(2, 4),
            "4:8": prune.NOfM(4, 8),
        }
        schedules = {"cubic": prune.Cubic, "iterative": prune.Iterative, "one-shot": prune.OneShot}
        default = prune.WeightPruning()
        return replace(
            default,
            score=default.score if self.weight_score is None else scores[self.weight_score],
            allocation=default.allocation if self.weight_allocation is None else allocations[self.weight_allocation],
            schedule=default.schedule if self.weight_schedule is None else schedules[self.weight_schedule],
            exclude=self.dense,
        )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CutFlags:
    """What may be cut, and how the cut model is made."""

    space: SpaceFlags = SpaceFlags()
    weights: WeightFlags = WeightFlags()
    calibration: Annotated[int, whole_number("Training images for search and repairs.", CUT, most=MAX_COUNT)] = 1024
    flush_denormals: Annotated[bool, flag("Set denormal weights, which are slow, to 0 first.", CUT)] = False
    from_scratch: Annotated[bool, flag("Draw new weights; needs --epochs and --lr like the original.", CUT)] = False

    def to_config(self) -> "CutConfig":
        """Build the `CutConfig` of these flags."""
        from secateur.pipeline.config import KeepWeights, Reinitialize

        return replace(
            self.space.to_config(),
            init=Reinitialize() if self.from_scratch else KeepWeights(),
            weight_pruning=self.weights.to_pruning(),
            flush_denormals=self.flush_denormals,
            calibration_images=self.calibration,
        )


Epochs = Annotated[int, whole_number("Distillation epochs; 0 repairs without training.", TRAIN, least=0)]
LearningRate = Annotated[float, number("Peak learning rate; a high one undoes repairs.", TRAIN, name="--lr")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """How a student is trained, except for most losses."""

    epochs: Epochs = 1
    batch_size: BatchSize = None
    learning_rate: LearningRate = 0.01
    optimizer: Annotated[OptimizerName, choice("Optimizer: sgd or adamw.", TRAIN)] = "sgd"
    precision: Annotated[PrecisionName, choice("Number formats: auto, 32 or bf16.", TRAIN)] = "auto"
    warmup: Annotated[float, number("Fraction of steps with a rising rate.", least=0, most=1)] = 0.05
    weight_decay: Annotated[float | None, number("Weight decay; default of the optimizer.", least=0)] = None
    ema: Annotated[float | None, number("Decay of an average of the weights, such as 0.999.")] = None
    accumulate: Annotated[int, whole_number("Compute each batch in N parts, with less memory.")] = 1
    clip_norm: Annotated[float | None, number("Clip the L2 norm of gradients, such as 1.")] = None
    auto_augment: Annotated[
        str | None,
        flag("Augment as timm does: rand-m9-mstd0.5-inc1, original, ...", name=AUGMENT_NAMES, value="POLICY"),
    ] = None
    erase: Annotated[float, number("Probability of erasing a part of an image.")] = 0.0
    mixup: Annotated[float, number("Mix pairs of images with this alpha; 0 is off.")] = 0.0
    cutmix: Annotated[float, number("Paste parts of images with this alpha; 0 is off.")] = 0.0
    label_smoothing: Annotated[float, number("Share of each label spread over all classes.")] = 0.0
    temperature: Annotated[float, number("Temperature that softens probabilities.")] = 4.0
    label_weight: Annotated[
        float | None, number("Weight of the labels; 0.1, in distill that of the loss.", least=0)
    ] = None
    compiled: Annotated[bool, flag("Use torch.compile: slow to start, then often faster.", name="--compile")] = False

    def to_train(self, seed: int, usual_batch: int = 128) -> "TrainConfig":
        """Build the `TrainConfig` of a run; ``usual_batch`` is the batch size where no flag says one."""
        from secateur.cli.parsing import optimizer, precision
        from secateur.train.config import TrainConfig

        return TrainConfig(
            epochs=self.epochs,
            batch_size=self.batch_size or usual_batch,
            learning_rate=self.learning_rate,
            warmup_fraction=self.warmup,
            optimizer=optimizer(self.optimizer, self.weight_decay),
            ema_decay=self.ema,
            accumulate=self.accumulate,
            clip_norm=self.clip_norm,
            precision=precision(self.precision),
            seed=seed,
        )

    @property
    def execution(self) -> "Execution":
        """How the networks are run."""
        from secateur.train.device import Compiled, Eager

        return Compiled() if self.compiled else Eager()

    def check_augment(self) -> None:
        """Refuse augmentations that cannot be, before anything is loaded."""
        from secateur.data.transforms import Augment

        Augment(**self._augment)

    def augment(self, images: "ImageData | OwnData") -> "ImageData | OwnData":
        """Return the same images with these augmentations added to the default ones, if they have any."""
        if images.augment is None:
            return images
        return replace(images, augment=replace(images.augment, **self._augment))

    def check_task(self, named: "NamedTask") -> None:
        """Refuse flags that have no effect on a task.

        Raises:
            TrainingError: If one is given.
        """
        if named.classifies:
            return
        only = (*((name, getattr(self, name)) for name in self._augment), ("label_smoothing", self.label_smoothing))
        for name, value in only:
            if value:
                flag_name = name.replace("_", "-")
                raise TrainingError(
                    f"`--{flag_name}` must go with --task classification; got {named.name}. Leave it out."
                )

    @property
    def _augment(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("auto_augment", "erase", "mixup", "cutmix")}


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DistillTrainFlags(TrainFlags):
    """The same flags with the defaults of a student that is not cut from its teacher."""

    epochs: Epochs = 30
    learning_rate: LearningRate = 0.05


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RecoveryFlags:
    """How a cut model recovers: its training and its losses."""

    train: TrainFlags = TrainFlags()
    kd_weight: Annotated[float, number("Weight of the teacher's probabilities.", least=0)] = 0.9
    feature_weight: Annotated[float, number("Weight of the teacher's aligned features.", least=0)] = 10.0

    def to_config(self, seed: int, usual_batch: int = 128) -> "RecoveryConfig":
        """Build the `RecoveryConfig` of these flags; see `TrainFlags.to_train`."""
        from secateur.distill.objective import Objective
        from secateur.pipeline.config import RecoveryConfig

        train = self.train
        objective = Objective(
            self.kd_weight,
            DEFAULT_LABEL_WEIGHT if train.label_weight is None else train.label_weight,
            self.feature_weight,
            train.temperature,
            train.label_smoothing,
        )
        return RecoveryConfig(train.to_train(seed, usual_batch), objective, train.execution)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class OnnxFlags:
    """How an ONNX file is written."""

    onnx_opset: Annotated[int | None, flag("Version of ONNX's operations in model.onnx.", value="N")] = None
    onnx_free_size: Annotated[bool, flag("Let height and width of model.onnx free, too.")] = False
    onnx_half: Annotated[bool, flag("Let model.onnx hold and compute with float16.")] = False
    onnx_outputs: Annotated[
        str, flag("Modules whose outputs model.onnx returns, such as raw heads.", value="NAME,...")
    ] = ""

    def to_config(self) -> "OnnxConfig":
        """Build the `OnnxConfig` of these flags."""
        from secateur.export.onnx_config import OnnxConfig

        names = tuple(name.strip() for name in self.onnx_outputs.split(",")) if self.onnx_outputs else ()
        return OnnxConfig(self.onnx_opset, self.onnx_free_size, self.onnx_half, names)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Where a long command runs, what it writes and shows, and what becomes of an unfinished run."""

    export: Export = "onnx"
    # docs/export.md describes them, `export --help` shows them, and here is no room.
    onnx: Annotated[OnnxFlags, Parameter(name="*", show=False)] = OnnxFlags()
    resume: Annotated[bool, flag("Continue an interrupted run.", RUN)] = False
    restart: Annotated[bool, flag("Remove an interrupted run and begin again.", RUN)] = False
    seed: Seed = 0
    device: Device = "auto"
    thread_count: Threads = None
    quiet: Quiet = False
    as_json: Annotated[bool, flag("Print lines of JSON: steps, epochs, the result.", RUN, name="--json")] = False
    checkpoint_minutes: Annotated[float, number("Minutes between checkpoints within an epoch.")] = 10.0
    checkpoint_steps: Annotated[int | None, whole_number("Also checkpoint every N steps.")] = None
    tensorboard: TensorBoardFolder = None

    @property
    def on_existing(self) -> "OnExisting":
        """What to do with an unfinished run."""
        from secateur.pipeline.workspace import OnExisting

        if self.resume and self.restart:
            raise ArtifactError("`--resume` continues an interrupted run and `--restart` removes it; give one of them.")
        return OnExisting.RESUME if self.resume else OnExisting.OVERWRITE if self.restart else OnExisting.ERROR

    def to_config(self) -> "RunConfig":
        """Build the `RunConfig` of these flags; its device is that of `fabric`."""
        from secateur.cli.parsing import callbacks
        from secateur.pipeline.config import RunConfig
        from secateur.train.checkpoint import CheckpointPolicy

        return RunConfig(
            seed=self.seed,
            checkpoints=CheckpointPolicy(60 * self.checkpoint_minutes, self.checkpoint_steps),
            callbacks=callbacks(self.quiet, self.tensorboard, as_json=self.as_json),
            on_existing=self.on_existing,
            onnx=self.onnx.to_config(),
        )

    @contextmanager
    def fabric(self, train: "TrainConfig") -> "Generator[Fabric]":
        """Run a block with the device and threads of these flags, in all processes that torchrun has started."""
        from secateur._runtime import process_count, torch_threads
        from secateur.cli.parsing import device
        from secateur.train.device import open_fabric
        from secateur.train.distributed import open_group

        found = device(self.device)
        with torch_threads(self.thread_count):
            if process_count() == 1:
                yield open_fabric(train.precision, device=found)
                return
            import torch

            yield open_group(train.precision, device=found)
            # Not after an error: the others would be waited for, who wait for this one.
            torch.distributed.destroy_process_group()


def to_target(
    name: TargetName, threads: int, batch: int, device: str = "cpu", *, device_flag: str = "--target-device"
) -> "Target":
    """Build the runtime that latency is measured on."""
    from secateur.cli.parsing import check_device
    from secateur.cost.runtimes import OnnxRuntime, TorchCompiled, TorchEager

    if name == "ort":
        if device != "cpu":
            raise ExportError(
                f"`--target ort` must run on the CPU; got the device {device!r}. Say --target torch or compiled for it."
            )
        return OnnxRuntime(threads, batch)
    check_device(device_flag, device)
    return (TorchEager if name == "torch" else TorchCompiled)(threads, batch, device)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TargetFlags:
    """Where the latency of a budget is measured."""

    target: Annotated[TargetName, choice("For latency=: ort, torch or compiled, as in bench.")] = "ort"
    target_threads: Annotated[int, whole_number("CPU threads of the target.", most=MAX_THREADS)] = 1
    target_batch: Annotated[int, whole_number("Images per pass on the target.", most=MAX_BATCH)] = 1
    target_device: Annotated[str, choice("Device of torch and compiled: cpu, cuda, mps.")] = "cpu"

    def to_target(self) -> "Target":
        """Build the runtime that latency is measured on; see `to_target`."""
        return to_target(self.target, self.target_threads, self.target_batch, self.target_device)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class BenchFlags:
    """How ``bench`` measures latency."""

    target: Annotated[
        TargetName, flag("ort (ONNX Runtime on the CPU), torch (eager) or compiled.", RUN, value="NAME")
    ] = "ort"
    thread_count: Annotated[int, whole_number("CPU threads.", RUN, name="--threads", most=MAX_THREADS)] = 1
    batch: Annotated[int, whole_number("Images per pass.", RUN, most=MAX_BATCH)] = 1
    device: Annotated[str, choice("Device of torch and compiled: cpu, cuda or mps.", RUN)] = "cpu"
    rounds: Annotated[
        int, whole_number("Measured passes of each model after warm-up.", RUN, least=3, most=MAX_ROUNDS)
    ] = 30

    def to_target(self) -> "Target":
        """Build the runtime that latency is measured on; see `to_target`."""
        return to_target(self.target, self.thread_count, self.batch, self.device, device_flag="--device")
