"""From the words of the command line to objects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from secateur.cli._devices import check_device
from secateur.cli._options import (
    AttentionName,
    FormatName,
    ImportanceName,
    OptimiserName,
    PrecisionName,
)
from secateur.errors import ChoiceError, DataError, ExportError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from secateur.data import ImageData
    from secateur.graph import Choices, HeadUnit
    from secateur.importance import Importance
    from secateur.pipeline import Branches, Format, Start
    from secateur.search import AxisRule
    from secateur.train import SGD, AdamW, Execution, Precision, Progress, Saving

Words = Sequence[str] | None
"""What a repeatable flag gives."""
Number = TypeVar("Number", int, float)

_WIDEST = 2**20
"""Channels; larger numbers have no meaning for an axis."""
Variation = Callable[["ImageData"], "ImageData"]
"""Gives the same images with another augmentation."""


def importance_of(name: ImportanceName) -> Importance:
    """The importance of a name."""
    from secateur import importance

    return {
        ImportanceName.RECONSTRUCTION: importance.Reconstruction,
        ImportanceName.L1: importance.L1,
        ImportanceName.L2: importance.L2,
        ImportanceName.FPGM: importance.GeometricMedian,
        ImportanceName.BN_SCALE: importance.BatchNormScale,
        ImportanceName.TAYLOR: importance.Taylor,
        ImportanceName.LAMP: importance.LAMP,
        ImportanceName.RANDOM: importance.RandomImportance,
    }[name]()


def choices_of(include: Words, exclude: Words, whole: Words) -> Choices:
    """Which layers may be cut, from repeated patterns.

    Raises:
        ChoiceError: If a pattern is empty.
    """
    from secateur.graph import Choices

    for name, patterns in (("--include", include), ("--exclude", exclude), ("--keep-whole", whole)):
        if "" in (patterns or ()):
            raise ChoiceError(f"`{name}` must be a name pattern, such as 'layer1.*'; got ''.")
    return Choices(tuple(include or ()), tuple(exclude or ()), tuple(whole or ()))


def heads_of(name: AttentionName) -> HeadUnit:
    """What is cut as one in attention."""
    from secateur.graph import HeadUnit

    return {AttentionName.HEADS: HeadUnit.HEAD, AttentionName.DIMENSIONS: HeadUnit.DIMENSION}[name]


def branches_of(untied: bool) -> Branches:
    """Whether the branches of a residual stream may be narrower than it."""
    from secateur.pipeline import Branches

    return Branches.UNTIED if untied else Branches.TIED


def start_of(from_scratch: bool) -> Start:
    """What the recovery begins with."""
    from secateur.pipeline import FromScratch, Inherit

    return FromScratch() if from_scratch else Inherit()


def progress_of(quiet: bool, tensorboard: Path | None) -> Progress:
    """How searches and trainings are shown.

    Raises:
        TrainingError: If the folder or the package for TensorBoard is missing.
    """
    from secateur.train import Silent, TensorBoard, TerminalProgress

    shown = Silent() if quiet else TerminalProgress()
    return shown if tensorboard is None else TensorBoard(tensorboard, shown)


def saving_of(minutes: float, steps: int | None) -> Saving:
    """When checkpoints are written within epochs.

    Raises:
        TrainingError: If the time is not positive.
    """
    from secateur.train import Saving

    return Saving(60 * minutes, steps)


def rules_of(divisors: Words, min_widths: Words, min_kept: Words) -> tuple[AxisRule, ...]:
    """Other bounds for some axes, from "PATTERN=N" words.

    Raises:
        ChoiceError: If a word is not of this form.
        BudgetError: If a number is out of range.
    """
    from secateur.search import AxisRule

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
    from secateur.data import Augment

    Augment(auto_augment=auto_augment, erase=erase, mixup=mixup, cutmix=cutmix)  # Refused before anything is loaded.

    def varied(images: ImageData) -> ImageData:
        wanted = replace(images.augment, auto_augment=auto_augment, erase=erase, mixup=mixup, cutmix=cutmix)
        return replace(images, augment=wanted)

    return varied


def optimiser_of(name: OptimiserName, weight_decay: float | None) -> SGD | AdamW:
    """The optimiser of a name, with its usual weight decay unless another is given."""
    from secateur.train import SGD, AdamW

    kind = SGD if name is OptimiserName.SGD else AdamW
    return kind() if weight_decay is None else kind(weight_decay=weight_decay)


def precision_of(name: PrecisionName) -> Precision | None:
    """The number formats of a name; None for the best that the device has."""
    from secateur.train import Precision

    names = {
        PrecisionName.AUTO: None,
        PrecisionName.FLOAT32: Precision.FLOAT32,
        PrecisionName.BF16: Precision.BF16_MIXED,
    }
    return names[name]


def execution_of(compiled: bool) -> Execution:
    """How the networks of a training are run."""
    from secateur.train import Compiled, Eager

    return Compiled() if compiled else Eager()


def formats_of(text: str) -> tuple[Format, ...]:
    """Export formats from "onnx,pt2".

    Raises:
        ExportError: If one is unknown, or its library is not installed.
    """
    from secateur.pipeline import Format, check_formats

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
