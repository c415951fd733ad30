"""From the words of the command line to objects."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from secateur.cli._options import ImportanceName, OptimiserName, PrecisionName, StrategyName
from secateur.errors import DataError, ExportError, TrainingError

if TYPE_CHECKING:
    import torch

    from secateur.importance import Importance
    from secateur.pipeline import Format
    from secateur.search import Strategy
    from secateur.train import SGD, AdamW, Precision


def strategy_of(name: StrategyName, importance: ImportanceName | None) -> Strategy:
    """The strategy of a name, with an importance or with its usual one."""
    from secateur.search import Activations, GlobalImportance, Knapsack, PCASlimming, Uniform

    usual: Knapsack | PCASlimming | GlobalImportance | Uniform = {
        StrategyName.KNAPSACK: Knapsack(),
        StrategyName.PCA: PCASlimming(),
        StrategyName.PCA_ACTIVATIONS: PCASlimming(source=Activations()),
        StrategyName.GLOBAL: GlobalImportance(),
        StrategyName.UNIFORM: Uniform(),
    }[name]
    return usual if importance is None else replace(usual, importance=importance_of(importance))


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


def formats_of(text: str) -> tuple[Format, ...]:
    """Export formats from "onnx,pt2".

    Raises:
        ExportError: If one is unknown.
    """
    from secateur.pipeline import Format

    known = {form.value: form for form in Format}
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise ExportError(f"`--export` must name {' or '.join(known)}, separated by commas; got {word!r}.")
    return tuple(dict.fromkeys(known[word] for word in words))


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
    import torch

    if text == "auto":
        return None
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
        raise TrainingError(
            f"`--device` must be one that this machine has; got {text!r} ({reason}). Say auto or cpu."
        ) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise TrainingError(f"`--device` must be auto, cpu, cuda, cuda:N or mps; got {text!r}.")
    return device
