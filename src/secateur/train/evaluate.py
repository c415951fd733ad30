"""How good a classifier is on a split."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import TrainingError
from secateur.train.config import Batches
from secateur.train.device import Precision, autocast, channels_last, copy_to_device, default_device
from secateur.train.distributed import mean_over_processes

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Accuracy:
    """A classifier's result on n images.

    Attributes:
        top1: Fraction of images whose highest logit is the label's, in [0, 1].
        loss: Mean cross-entropy, in nats.
        n: Number of images.
    """

    top1: float
    loss: float
    n: int


def evaluate(
    model: nn.Module,
    split: Batches,
    *,
    batch_size: int = 250,
    precision: Precision = Precision.FLOAT32,
    device: torch.device | None = None,
) -> Accuracy:
    """Measure a classifier in eval mode, without augmentation.

    Args:
        model: Gives logits (batch, classes). A copy is measured; the model stays as it is.
        split: The images, read in their stored order.
        batch_size: Images per forward pass, >= 1.
        precision: Number formats; float32 unless told otherwise.
        device: Where to compute; None means the accelerator if there is one, else the CPU.

    Raises:
        TrainingError: If there are no images, or the model does not give logits of the labels' classes.
    """
    if batch_size < 1:
        raise TrainingError(f"`batch_size` must be at least 1; got {batch_size}. 250 is usual.")
    device = device or default_device()
    with torch.inference_mode(mode=False):
        copy = copy_to_device(model, device).eval()
    return measure_accuracy(copy, split, batch_size=batch_size, precision=precision, device=device)


def measure_accuracy(
    model: nn.Module,
    split: Batches,
    *,
    batch_size: int,
    precision: Precision,
    device: torch.device,
    fabric: "Fabric | None" = None,
) -> Accuracy:
    """Evaluate a model that is on the device and in eval mode already, see `evaluate`.

    With a Fabric of several processes each computes its part of every batch, and all return the result of the whole.
    """
    rank, processes = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
    if len(split) == 0:
        raise TrainingError("`split` must hold at least one image; got none. Check the data folder and its splits.")
    # Sums stay on the device: reading one for every batch would wait for it every time.
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), device=device)
    n = 0
    with (
        torch.inference_mode(),
        autocast(precision, device),
    ):
        for images, labels in split.batches(batch_size, device=device, seed=None):
            if processes > 1:
                images, labels = images[rank::processes], labels[rank::processes]  # noqa: PLW2901 - its part
                if len(labels) == 0:
                    continue
            logits = model(channels_last(images))
            if n == 0:  # Once is enough, and looking at labels waits for the device.
                check_logits(logits, len(labels))
                check_labels(labels, logits.shape[1])
            correct += (logits.argmax(1) == labels).sum()
            loss += F.cross_entropy(logits.float(), labels, reduction="sum")
            n += len(labels)
    if fabric is not None and processes > 1:
        # In float64, where counts of images are exact.
        said = torch.stack([correct.double(), loss.double(), torch.tensor(float(n), device=device).double()])
        right, nats, images_of_all = (mean_over_processes(fabric, said) * processes).tolist()
        return Accuracy(top1=right / images_of_all, loss=nats / images_of_all, n=round(images_of_all))
    return Accuracy(top1=correct.item() / n, loss=loss.item() / n, n=n)


def check_logits(logits: object, images: int) -> None:
    """Refuse a model that does not give logits.

    Raises:
        TrainingError: If the shape is not (images, classes).
    """
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
    if shape is None or len(shape) != 2 or shape[0] != images:
        raise TrainingError(
            f"`model` must return logits of the shape (batch, classes), here ({images}, classes); "
            f"got {shape or type(logits).__name__}. Wrap the model so that its forward returns the logits alone."
        )


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are not classes of the model; waits for the device.

    Raises:
        TrainingError: If a label is negative or too high.
    """
    low, high = (int(bound) for bound in torch.stack(torch.aminmax(labels)).tolist())
    if low < 0 or high >= classes:
        raise TrainingError(
            f"`labels` must lie in 0...{classes - 1}, the model's classes; got {low}...{high}. "
            "Use a model with as many classes as the data."
        )


def check_targets(labels: Tensor, classes: int) -> None:
    """Refuse labels of training images that do not fit the model: class numbers, or probabilities of mixed images.

    Raises:
        TrainingError: See `check_labels`; or if there is not one probability for every class.
    """
    if not labels.is_floating_point():
        check_labels(labels, classes)
    elif labels.ndim != 2 or labels.shape[1] != classes:
        raise TrainingError(
            f"`labels` of mixed images must be probabilities of the model's {classes} classes; got the shape "
            f"{tuple(labels.shape)}. Use a model with as many classes as the data."
        )


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the images whose highest logit is the label's (of a mixed image, the likeliest label's), on the device."""
    return (logits.argmax(1) == (labels.argmax(1) if labels.is_floating_point() else labels)).sum()
