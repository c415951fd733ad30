"""Calibration batches: whether a model can run on them, and which images are held out.

A batch takes the forms that `secateur.trace` takes as an example: one input, a tuple of positional inputs, a mapping of
inputs by name, or a list of images as the one input of a detector.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from secateur._batches import AnyBatch, arguments_of, count_images, select_images
from secateur.errors import SurgeryError
from secateur.graph.trace import Example

FEWEST_TO_SPLIT = 8
"""With fewer calibration images, none is held out: two could not tell a good repair from a bad one."""
_EVERY = 4
"""Every fourth batch or image is held out: three quarters fit, one quarter judges."""


def check_batches(model: nn.Module, batches: Sequence[Example], argument: str) -> None:
    """Refuse batches that are no arguments of the model, such as pairs of images and labels.

    Args:
        model: The model that is to run them.
        batches: The batches.
        argument: The name of the argument that holds them, for the message.

    Raises:
        SurgeryError: For the first batch with too many or too few inputs, or without any tensor.
    """
    signature = inspect.signature(model.forward)
    for number, batch in enumerate(batches):
        positional, by_name = arguments_of(batch)
        try:
            signature.bind(*positional, **by_name)
        except TypeError as error:
            raise SurgeryError(
                f"`{argument}` must hold batches as the model's forward{signature} takes them; got {_form(batch)} "
                f"(batch {number}): {error}. Pass a tensor, a tuple of positional inputs, or a mapping by name, "
                "without labels."
            ) from error
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((positional, by_name))):
            raise SurgeryError(f"`{argument}` must hold tensors; got {_form(batch)} (batch {number}). Pass images.")


def _form(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping with {', '.join(map(str, cast(Mapping[Any, Any], batch))) or 'no names'}"
    return f"a tuple of {len(cast(tuple[Any, ...], batch))}" if isinstance(batch, tuple) else type(batch).__name__


@dataclass(frozen=True, eq=False)
class CalibrationSplit(Generic[AnyBatch]):
    """Calibration batches in two parts: to score and to repair with, and to judge the result by.

    Attributes:
        fit: Batches for scores and repairs.
        held_out: Batches that no score and no repair has seen.
        is_shared: Whether there were too few images to hold any out: then both parts are all batches.
    """

    fit: tuple[AnyBatch, ...]
    held_out: tuple[AnyBatch, ...]
    is_shared: bool = False


def split_calibration(batches: Sequence[AnyBatch]) -> CalibrationSplit[AnyBatch]:
    """Hold out a quarter of the calibration images, always the same ones for the same batches.

    Of four or more batches, every fourth one is held out; of fewer, every fourth image. Every fourth, not the last
    quarter, because images are often sorted by class.

    Args:
        batches: Batches in any form, see this module; (images, labels) pairs are split alike.

    Returns:
        The two parts. With fewer than `FEWEST_TO_SPLIT` images both are all batches, and ``is_shared`` says so.
    """
    batches = tuple(batches)
    counts = [count_images(batch) for batch in batches]
    if sum(counts) < FEWEST_TO_SPLIT:
        return CalibrationSplit(batches, batches, is_shared=True)
    if len(batches) >= _EVERY:
        fit = tuple(batch for number, batch in enumerate(batches) if number % _EVERY != _EVERY - 1)
        return CalibrationSplit(fit, batches[_EVERY - 1 :: _EVERY])
    parts: tuple[list[AnyBatch], list[AnyBatch]] = ([], [])
    begin = 0
    for batch, count in zip(batches, counts, strict=True):
        # The count goes on through the batches, so that small ones contribute as well.
        held = [i for i in range(count) if (begin + i) % _EVERY == _EVERY - 1]
        rest = sorted(set(range(count)) - set(held))
        for part, index in zip(parts, (rest, held), strict=True):
            if index:
                part.append(select_images(batch, index))
        begin += count
    return CalibrationSplit(tuple(parts[0]), tuple(parts[1]))
