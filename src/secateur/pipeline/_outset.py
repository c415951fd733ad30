"""What is checked before any work begins: the output folder, and that model and data belong together."""

import copy
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.artifact import refuse_foreign
from secateur.data import ImageData
from secateur.errors import ArtifactError, ModelError


def check_output(folder: Path) -> None:
    """Refuse an output folder that could not be written at the end of the run.

    Args:
        folder: Where the artifact shall be.

    Raises:
        ArtifactError: If it is a file, holds something else than an artifact, or cannot be made there.
    """
    refuse_foreign(folder, "out")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ArtifactError(
            f"`out` must lie in a folder that can be written; got {folder}, and {above} cannot be. "
            "Choose another path, or change its permissions."
        )


def own_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a model in eval mode on a device.

    Raises:
        ModelError: If the model holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(model).to(device).eval()
    except Exception as error:
        raise ModelError(
            f"`model` must be copyable, because yours is never changed; copying {type(model).__name__} stopped with: "
            f"{error}. Remove what it holds beside parameters, buffers and plain values, such as open files or hooks' "
            "results."
        ) from error


def check_belongs(model: nn.Module, data: ImageData, images: Tensor) -> None:
    """Refuse a model that does not classify the data's images.

    Args:
        model: In any mode; a copy runs.
        data: For its name, sizes and classes.
        images: A few of its normalised images, on the model's device.

    Raises:
        ModelError: If the model cannot run the images, or its output is not finite logits for the data's classes.
    """
    size = "x".join(map(str, data.size))
    broken = [name for name, tensor in model.state_dict().items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise ModelError(
            f"`model` must have finite weights; got NaN or infinity in {len(broken)} tensor(s): {broken[:5]}. "
            "Load other weights: these come from a training that diverged, or a damaged file."
        )
    runner = copy.deepcopy(model).eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            logits = runner(images[:2])
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"`model` must run the images of {data.name} ({size}); {type(model).__name__} stopped with: {reason}. "
            "Choose the image size (--image-size) and channels that the model was made for."
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
    if shape != (len(images[:2]), len(data.classes)):
        got = type(logits).__name__ if shape is None else f"shape {shape}"
        raise ModelError(
            f"`model` must return one logit for each of the {len(data.classes)} classes of {data.name}, here shape "
            f"({len(images[:2])}, {len(data.classes)}); got {got}. Use a model with that many classes, and wrap one "
            "that returns more than its logits."
        )
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"`model` must give finite logits for the images of {data.name}; got NaN or infinity. "
            "Check its weights and the normalisation (--mean, --std)."
        )
