"""How good a classifier is on a split."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur._caller_state import in_default_state
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


@in_default_state
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
    low = high = torch.zeros((), dtype=torch.int64, device=device)
    n, classes = 0, 1
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
            check_logits(logits, len(images))
            labels = class_indices(labels, len(images))  # noqa: PLW2901 - as int64
            classes = logits.shape[1]
            low, high = torch.minimum(low, labels.min()), torch.maximum(high, labels.max())
            if n == 0:  # Looking at labels waits for the device: that is done for the first batch and at the end.
                check_range(low, high, classes)
            correct += (logits.argmax(1) == labels).sum()
            # A label out of range would stop a GPU for good, before it is refused.
            loss += F.cross_entropy(logits.float(), labels.clamp(0, classes - 1), reduction="sum")
            n += len(labels)
    check_range(low, high, classes)
    if fabric is not None and processes > 1:
        # In float64, where counts of images are exact.
        said = torch.stack([correct.double(), loss.double(), torch.tensor(float(n), device=device).double()])
        right, nats, images_of_all = (mean_over_processes(fabric, said) * processes).tolist()
        return Accuracy(top1=right / images_of_all, loss=nats / images_of_all, n=round(images_of_all))
    return Accuracy(top1=correct.item() / n, loss=loss.item() / n, n=n)


OWN_LOSS = (
    "For other targets train with a loss of your own, Objective(kd_weight=0, label_weight=0, terms=(Term(...),)), and "
    "without validation images, and measure with a metric of your own."
)
"""What to do with targets that are no classes, for messages."""


def check_logits(logits: object, images: int, name: str = "model") -> None:
    """Refuse a model that does not give logits.

    Args:
        logits: What it returned.
        images: Number of images it was given.
        name: The argument that the model is, for the message.

    Raises:
        TrainingError: If the shape is not (images, classes).
    """
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
    if shape is None or len(shape) != 2 or shape[0] != images:
        raise TrainingError(
            f"`{name}` must return logits of the shape (batch, classes), here ({images}, classes); "
            f"got {shape or type(logits).__name__}. Wrap the model so that its forward returns the logits alone. "
            "A loss of your own can be given all outputs: Objective(kd_weight=0, label_weight=0, terms=(Term(...),)), "
            "without validation images."
        )


def class_indices(labels: Tensor, images: int) -> Tensor:
    """Return labels that are class indices as int64, or refuse them; their values are not looked at.

    Raises:
        TrainingError: If they are not integers, one for each image.
    """
    if labels.shape != (images,) or labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise TrainingError(
            f"`labels` must be class indices, integers of the shape ({images},); got {_described(labels)}. {OWN_LOSS}"
        )
    return labels.long()


def _described(labels: Tensor) -> str:
    """Type and shape of labels, and what kind of target they seem to be."""
    found = f"{str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}"
    if labels.ndim != 2:
        return found
    if labels.shape[1] == 1:
        return f"{found}: one column" + ("" if labels.is_floating_point() else " (call .squeeze(1))")
    sums = labels.double().sum(1)
    return f"{found}, whose rows sum to {float(sums.min()):.4g}...{float(sums.max()):.4g}"


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are not classes of the model; waits for the device.

    Raises:
        TrainingError: If they are not one integer for each image, or one is negative or too high.
    """
    check_range(*torch.aminmax(class_indices(labels, len(labels))), classes)


def check_range(low: Tensor, high: Tensor, classes: int) -> None:
    """Refuse labels from ``low`` to ``high`` that are not classes of the model; waits for the device.

    Raises:
        TrainingError: If the lowest is negative or the highest too high.
    """
    lowest, highest = (int(bound) for bound in torch.stack((low, high)).tolist())
    if lowest < 0 or highest >= classes:
        raise TrainingError(
            f"`labels` must lie in 0...{classes - 1}, the model's classes; got {lowest}...{highest}. "
            "Use a model with as many classes as the data."
        )


_SUM_TOLERANCE = 1e-3
"""How far the probabilities of an image may be from 1 in sum: half precision has three digits."""


def check_targets(labels: Tensor, classes: int) -> None:
    """Refuse labels of training images that are neither class indices nor probabilities; waits for the device.

    Raises:
        TrainingError: See `check_labels`; or if there is not one probability for every class, or the probabilities of
            an image are negative or do not sum to 1.
    """
    if not labels.is_floating_point():
        check_labels(labels, classes)
        return
    if labels.ndim == 2 and labels.shape[1] > 1 and labels.shape[1] != classes:
        raise TrainingError(
            f"`labels` of mixed images must be probabilities of the model's {classes} classes; got the shape "
            f"{tuple(labels.shape)}. Use a model with as many classes as the data."
        )
    off = (labels.double().sum(-1) - 1).abs().amax() if labels.ndim == 2 else torch.inf
    # Written so that NaN is refused too.
    if labels.ndim != 2 or not float(off) <= _SUM_TOLERANCE or not float(labels.amin()) >= -_SUM_TOLERANCE:
        raise TrainingError(
            "`labels` must be class indices, integers of the shape (batch,), or probabilities of the shape "
            f"(batch, classes) whose rows sum to 1; got {_described(labels)}. {OWN_LOSS}"
        )


def count_correct(logits: Tensor, labels: Tensor) -> Tensor | None:
    """Count the images whose highest logit is the label's (of a mixed image, the likeliest label's), on the device.

    Returns:
        None if the labels are neither one class nor one row of probabilities for each image.
    """
    best = labels.argmax(1) if labels.is_floating_point() and labels.shape == logits.shape else labels
    if best.shape != logits.shape[:1] or best.is_floating_point():
        return None
    return (logits.argmax(1) == best).sum()
