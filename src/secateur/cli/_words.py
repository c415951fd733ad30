"""From the words of the command line to objects.

From the words of the command line to the losses of a distillation.

From the words of the command line to how single weights are pruned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from secateur.cli.options import (
    AllocationName,
    AttentionName,
    FormatName,
    ImportanceName,
    LossName,
    OptimiserName,
    PrecisionName,
    WeightScheduleName,
    WeightScoreName,
    check_device,
)
from secateur.errors import ChoiceError, DataError, ExportError, TrainingError

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from secateur.data.dataset import ImageData
    from secateur.distill.objective import Objective, Term
    from secateur.distill.taps import Taps
    from secateur.export.formats import Format
    from secateur.graph.selection import Selection
    from secateur.graph.trace import HeadUnit
    from secateur.pipeline.config import Branches, StudentInit
    from secateur.prune.weight_pruning import WeightPruning
    from secateur.search.importance import Importance
    from secateur.search.space import AxisRule
    from secateur.train.callbacks import Progress
    from secateur.train.checkpoint import CheckpointPolicy
    from secateur.train.config import SGD, AdamW
    from secateur.train.device import Execution, Precision


Words = Sequence[str] | None
"""What a repeatable flag gives."""
Number = TypeVar("Number", int, float)

_WIDEST = 2**20
"""Channels; larger numbers have no meaning for an axis."""
Variation = Callable[["ImageData"], "ImageData"]
"""Gives the same images with another augmentation."""


def importance_of(name: ImportanceName) -> Importance:
    """The importance of a name."""
    from secateur.search.importance import L1, L2, LAMP, BatchNormScale, GeometricMedian, RandomImportance
    from secateur.search.importance_data import Reconstruction, Taylor

    return {
        ImportanceName.RECONSTRUCTION: Reconstruction,
        ImportanceName.L1: L1,
        ImportanceName.L2: L2,
        ImportanceName.FPGM: GeometricMedian,
        ImportanceName.BN_SCALE: BatchNormScale,
        ImportanceName.TAYLOR: Taylor,
        ImportanceName.LAMP: LAMP,
        ImportanceName.RANDOM: RandomImportance,
    }[name]()


def choices_of(include: Words, exclude: Words, whole: Words) -> Selection:
    """Which layers may be cut, from repeated patterns.

    Raises:
        ChoiceError: If a pattern is empty.
    """
    from secateur.graph.selection import Selection

    for name, patterns in (("--include", include), ("--exclude", exclude), ("--keep-whole", whole)):
        if "" in (patterns or ()):
            raise ChoiceError(f"`{name}` must be a name pattern, such as 'layer1.*'; got ''.")
    return Selection(tuple(include or ()), tuple(exclude or ()), tuple(whole or ()))


def heads_of(name: AttentionName) -> HeadUnit:
    """What is cut as one in attention."""
    from secateur.graph.trace import HeadUnit

    return {AttentionName.HEADS: HeadUnit.HEAD, AttentionName.DIMENSIONS: HeadUnit.DIMENSION}[name]


def branches_of(untied: bool) -> Branches:
    """Whether the branches of a residual stream may be narrower than it."""
    from secateur.pipeline.config import Branches

    return Branches.UNTIED if untied else Branches.TIED


def start_of(from_scratch: bool) -> StudentInit:
    """What the recovery begins with."""
    from secateur.pipeline.config import KeepWeights, Reinitialize

    return Reinitialize() if from_scratch else KeepWeights()


def progress_of(quiet: bool, tensorboard: Path | None) -> Progress:
    """How searches and trainings are shown.

    Raises:
        TrainingError: If the folder or the package for TensorBoard is missing.
    """
    from secateur.train.callbacks import Silent, TensorBoard, TerminalProgress

    shown = Silent() if quiet else TerminalProgress()
    return shown if tensorboard is None else TensorBoard(tensorboard, shown)


def saving_of(minutes: float, steps: int | None) -> CheckpointPolicy:
    """When checkpoints are written within epochs.

    Raises:
        TrainingError: If the time is not positive.
    """
    from secateur.train.checkpoint import CheckpointPolicy

    return CheckpointPolicy(60 * minutes, steps)


def rules_of(divisors: Words, min_widths: Words, min_kept: Words) -> tuple[AxisRule, ...]:
    """Other bounds for some axes, from "PATTERN=N" words.

    Raises:
        ChoiceError: If a word is not of this form.
        BudgetError: If a number is out of range.
    """
    from secateur.search.space import AxisRule

    rules: list[AxisRule] = []
    for word in divisors or ():
        pattern, number = _named_number(word, "--axis-divisor", int)
        rules.append(AxisRule(pattern, divisor=number))
    for word in min_widths or ():
        pattern, number = _named_number(word, "--axis-min-width", int)
        rules.append(AxisRule(pattern, min_width=number))
    for word in min_kept or ():
        pattern, number = _named_number(word, "--axis-min-kept", float)
        rules.append(AxisRule(pattern, min_kept_fraction=number))
    return tuple(rules)


def _named_number(word: str, flag: str, kind: Callable[[str], Number]) -> tuple[str, Number]:
    pattern, _, number = word.rpartition("=")
    try:
        if pattern and kind(number) <= _WIDEST:
            return pattern, kind(number)
    except (ValueError, OverflowError):
        pass
    what = "a whole number" if kind is int else "a number"
    raise ChoiceError(f"`{flag}` must be a name pattern, = and {what}, such as 'layer1.*=8'; got {word!r}.")


def variation_of(auto_augment: str | None, erase: float, mixup: float, cutmix: float) -> Variation:
    """What is done to training images beyond what is usual for them.

    Raises:
        DataError: If a number or the name of the policy is none.
    """
    from secateur.data.transforms import Augment

    Augment(auto_augment=auto_augment, erase=erase, mixup=mixup, cutmix=cutmix)  # Refused before anything is loaded.

    def varied(images: ImageData) -> ImageData:
        wanted = replace(images.augment, auto_augment=auto_augment, erase=erase, mixup=mixup, cutmix=cutmix)
        return replace(images, augment=wanted)

    return varied


def optimizer_of(name: OptimiserName, weight_decay: float | None) -> SGD | AdamW:
    """The optimizer of a name, with its usual weight decay unless another is given."""
    from secateur.train.config import SGD, AdamW

    kind = SGD if name is OptimiserName.SGD else AdamW
    return kind() if weight_decay is None else kind(weight_decay=weight_decay)


def precision_of(name: PrecisionName) -> Precision | None:
    """The number formats of a name; None for the best that the device has."""
    from secateur.train.device import Precision

    names = {
        PrecisionName.AUTO: None,
        PrecisionName.FLOAT32: Precision.FLOAT32,
        PrecisionName.BF16: Precision.BF16_MIXED,
    }
    return names[name]


def execution_of(compiled: bool) -> Execution:
    """How the networks of a training are run."""
    from secateur.train.device import Compiled, Eager

    return Compiled() if compiled else Eager()


def formats_of(text: str) -> tuple[Format, ...]:
    """Export formats from "onnx,pt2".

    Raises:
        ExportError: If one is unknown, or its library is not installed.
    """
    from secateur.export.formats import Format, check_formats

    known = {
        FormatName.ONNX: Format.ONNX,
        FormatName.PT2: Format.PT2,
        FormatName.OPENVINO: Format.OPENVINO,
        FormatName.EXECUTORCH: Format.EXECUTORCH,
        FormatName.INT8: Format.INT8,
    }
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in set(FormatName):
            raise ExportError(f"`--export` must name {' or '.join(known)}, separated by commas; got {word!r}.")
    formats = tuple(dict.fromkeys(known[FormatName(word)] for word in words))
    check_formats(formats)
    return formats


def numbers_of(text: str | None, name: str) -> tuple[float, ...] | None:
    """Numbers from "0.485,0.456,0.406".

    Raises:
        DataError: If they are not numbers.
    """
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError as error:
        raise DataError(f"`{name}` must be numbers separated by commas, such as 0.5,0.5,0.5; got {text!r}.") from error


def device_of(text: str) -> torch.device | None:
    """The device of a name; None for the accelerator if there is one.

    Raises:
        TrainingError: If this machine has no such device.
    """
    return None if text == "auto" else check_device("--device", text, instead="auto or cpu")


USUAL = {
    LossName.KD: 0.9,
    LossName.DKD: 1.0,
    LossName.DIST: 1.0,
    LossName.STANDARDIZED: 0.9,
    LossName.HINT: 1.0,
    LossName.ATTENTION: 500.0,
    LossName.VID: 1.0,
    LossName.RKD: 25.0,
    LossName.SP: 100.0,
    LossName.PKT: 100.0,
    LossName.CRD: 0.8,
    LossName.REVIEW: 1.0,
}
"""Weights where none is given: those of the papers as far as their scaling is ours (docs/distillation.md)."""

OF_LOGITS = (LossName.KD, LossName.DKD, LossName.DIST, LossName.STANDARDIZED)

OF_CLASSES = (LossName.DKD, LossName.CRD)
"""They need one class for each image."""


@dataclass(frozen=True, eq=False)
class Pair:
    """A student and its teacher, and what both are shown.

    Attributes:
        student: Learns.
        teacher: Is learned from.
        example: A few normalized images on the CPU.
        images: Number of training images.
    """

    student: nn.Module
    teacher: nn.Module
    example: Tensor
    images: int


def losses_of(words: Sequence[str] | None) -> dict[LossName, float]:
    """Weights by loss from "kd", "hint=10"; kd alone if nothing is said.

    Raises:
        TrainingError: If a loss is unknown, twice, or its weight no number.
    """
    found: dict[LossName, float] = {}
    for word in words or (LossName.KD.value,):
        name, equals, number = word.partition("=")
        if name not in set(LossName):
            raise TrainingError(f"`--loss` must be one of {', '.join(LossName)}; got {name!r}.")
        loss = LossName(name)
        try:
            weight = float(number) if equals else USUAL[loss]
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight > 0):
            raise TrainingError(f"`--loss` must have a positive weight, such as {name}=0.5; got {word!r}.")
        if loss in found:
            raise TrainingError(f"`--loss` must name each loss once; got {name!r} again.")
        found[loss] = weight
    return found


def check_mixable(losses: Mapping[LossName, float]) -> None:
    """Refuse losses that have no use for the labels of mixed images.

    Raises:
        TrainingError: If there is one.
    """
    for loss in losses:
        if loss in OF_CLASSES:
            raise TrainingError(
                f"`--loss` must go without --mixup and --cutmix for {loss}, which needs one class for each image; got "
                "both. Leave one of them out."
            )


def taps_of(words: Sequence[str] | None) -> dict[str, str]:
    """Pairs of modules from "STUDENT=TEACHER" words.

    Raises:
        TrainingError: If a word is not of this form.
    """
    found: dict[str, str] = {}
    for word in words or ():
        name, equals, other = word.partition("=")
        if not (name and equals and other):
            raise TrainingError(
                f"`--hints` must pair a module of the student with one of the teacher, such as layer2=layer2; got "
                f"{word!r}. `secateur inspect --tree` shows their names."
            )
        found[name] = other
    return found


def inferred_taps(pair: Pair) -> dict[str, str]:
    """The last modules at each resolution, side by side.

    Raises:
        TraceError: If a network cannot be traced.
        TrainingError: If a network has no such modules.
    """
    from secateur.distill.taps import paired_stages
    from secateur.graph.trace import trace

    return paired_stages(trace(pair.student, pair.example[:2]), trace(pair.teacher, pair.example[:2]))


def objective_of(
    losses: Mapping[LossName, float],
    pair: Pair,
    taps: Taps,
    *,
    temperature: float,
    label_weight: float,
    label_smoothing: float,
) -> Objective:
    """The losses as one objective.

    Args:
        losses: Of `score_candidates`.
        pair: Student and teacher.
        taps: Where losses of features listen; not used without such.
        temperature: Of kd.
        label_weight: Of the labels.
        label_smoothing: Of the labels.
    """
    from secateur.distill.objective import Objective

    terms = [
        term for name, weight in losses.items() if name is not LossName.KD for term in _terms(name, weight, pair, taps)
    ]
    kd_weight = losses.get(LossName.KD, 0.0)
    return Objective(kd_weight, label_weight, 0.0, temperature, label_smoothing, tuple(terms))


def hints_of(losses: Mapping[LossName, float], pair: Pair, taps: Taps) -> tuple[Term, ...]:
    """The losses of features alone, for a stage before everything else.

    Raises:
        TrainingError: If there are none.
    """
    found = [term for name, w in losses.items() if name not in OF_LOGITS for term in _terms(name, w, pair, taps)]
    if not found:
        raise TrainingError(
            "`--hint-epochs` must go with a loss of features; got none. Say --loss hint, or leave it out."
        )
    return tuple(found)


def _terms(name: LossName, weight: float, pair: Pair, taps: Taps) -> list[Term]:
    from secateur.distill.feature_losses import (
        attention_loss,
        hint_loss,
        pkt_loss,
        rkd_angle_loss,
        rkd_distance_loss,
        similarity_loss,
    )
    from secateur.distill.learned_losses import ContrastiveRepresentation, KnowledgeReview
    from secateur.distill.logit_losses import dist_loss, dkd_loss, standardized_kd_loss
    from secateur.distill.objective import MeanOverTaps, Term, features, select_labeled_feature, select_labeled_logits, logits

    def of_features(loss: Callable[..., Tensor]) -> Term:
        return Term(name.value, loss, features, weight, taps)

    def crd() -> Term:
        (student, *_), (teacher, *_) = _channels(pair, last)
        bank = min(pair.images, 16384)
        loss = ContrastiveRepresentation(student, teacher, size=bank, negatives=max(1, min(4096, bank // 2)))
        return Term(name.value, loss, select_labeled_feature, weight, last)

    last = dict(list(taps.items())[-1:])
    made: dict[LossName, Callable[[], list[Term]]] = {
        LossName.DKD: lambda: [Term(name.value, dkd_loss, select_labeled_logits, weight)],
        LossName.DIST: lambda: [Term(name.value, dist_loss, logits, weight)],
        LossName.STANDARDIZED: lambda: [Term(name.value, standardized_kd_loss, logits, weight)],
        LossName.HINT: lambda: [of_features(MeanOverTaps(hint_loss, _adaptors(pair, taps)))],
        LossName.ATTENTION: lambda: [of_features(MeanOverTaps(attention_loss))],
        LossName.VID: lambda: [of_features(MeanOverTaps(_vid(pair, taps)))],
        LossName.SP: lambda: [of_features(MeanOverTaps(similarity_loss))],
        LossName.RKD: lambda: [
            Term("rkd_distance", MeanOverTaps(rkd_distance_loss), features, weight, last),
            Term("rkd_angle", MeanOverTaps(rkd_angle_loss), features, 2 * weight, last),
        ],
        LossName.PKT: lambda: [Term(name.value, MeanOverTaps(pkt_loss), features, weight, last)],
        LossName.CRD: lambda: [crd()],
        LossName.REVIEW: lambda: [of_features(KnowledgeReview(*_channels(pair, taps)))],
    }
    return made[name]()


def _adaptors(pair: Pair, taps: Taps) -> dict[str, nn.Module]:
    from secateur.distill.taps import make_adaptors

    return dict(make_adaptors(pair.student, pair.teacher, taps, pair.example[:1]).items())


def _vid(pair: Pair, taps: Taps) -> list[Callable[[Tensor, Tensor], Tensor]]:
    from secateur.distill.learned_losses import VariationalInformation

    _, channels = _channels(pair, taps)
    return [
        VariationalInformation(adaptor, count)
        for adaptor, count in zip(_adaptors(pair, taps).values(), channels, strict=True)
    ]


def _channels(pair: Pair, taps: Taps) -> tuple[list[int], list[int]]:
    """Channels at the taps, of the student and of the teacher."""
    from secateur.distill.taps import compute_features

    students, teachers = compute_features(pair.student, pair.teacher, taps, pair.example[:1])
    return [_count(feature) for feature in students], [_count(feature) for feature in teachers]


def _count(feature: Tensor) -> int:
    """Tokens (batch, tokens, channels) have their channels last, all else second."""
    return feature.shape[2] if feature.ndim == 3 else feature.shape[1]


def pruning_of(
    score: WeightScoreName | None,
    allocation: AllocationName | None,
    schedule: WeightScheduleName | None,
    dense: Sequence[str] | None,
) -> WeightPruning | None:
    """How single weights are pruned; None if nothing is said of it."""
    from secateur import prune

    if score is allocation is schedule is None and not dense:
        return None
    usual = prune.WeightPruning()
    scores = {
        WeightScoreName.MAGNITUDE: prune.ByMagnitude(),
        WeightScoreName.TAYLOR: prune.ByTaylor(),
        WeightScoreName.SNIP: prune.BySnip(),
        WeightScoreName.MOVEMENT: prune.ByMovement(),
        WeightScoreName.RANDOM: prune.AtRandom(),
    }
    allocations = {
        AllocationName.GLOBAL: prune.Globally(),
        AllocationName.ERK: prune.ByERK(),
        AllocationName.EVEN: prune.Evenly(),
        AllocationName.TWO_OF_FOUR: prune.NOfM(2, 4),
        AllocationName.FOUR_OF_EIGHT: prune.NOfM(4, 8),
    }
    schedules = {
        WeightScheduleName.CUBIC: prune.Cubic,
        WeightScheduleName.ITERATIVE: prune.Iterative,
        WeightScheduleName.ONE_SHOT: prune.OneShot,
    }
    return replace(
        usual,
        score=usual.score if score is None else scores[score],
        allocation=usual.allocation if allocation is None else allocations[allocation],
        schedule=usual.schedule if schedule is None else schedules[schedule],
        exclude=tuple(dense or ()),
    )
