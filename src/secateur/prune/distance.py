"""How far the outputs of a cut model are from the original's, every output tensor in units of its own spread."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur._batches import call_model, count_images
from secateur._runtime import run_isolated
from secateur.errors import SurgeryError
from secateur.graph._record import shadow_copy
from secateur.graph.trace import Example

_Parts = list[list[Tensor]]
"""What one output is: for every batch its tensors, one or, where every image has a tensor of its own, several."""


def named_outputs(output: Any, images: int) -> dict[str, list[Tensor]]:
    """Return the floating-point tensors of a model's output by their place in it: ``""``, ``[0]``, ``.boxes``.

    Tuples, lists, mappings and dataclasses are looked into, at any depth. A list with one entry for each image (the
    detections of torchvision, for example) is one place, ``[*]``, with several tensors. Integers are left out.

    Args:
        output: What the model returned.
        images: The number of images that it ran on.
    """
    found: dict[str, list[Tensor]] = {}
    for place, tensor in _places(output, images, ""):
        found.setdefault(place, []).append(tensor)
    return found


def _places(value: Any, images: int, place: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield place, value
        return
    for name, part in _children(value, images):
        yield from _places(part, images, place + name)


def _children(value: Any, images: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in cast(Mapping[Any, Any], value).items():
            yield f".{name}", part
    elif isinstance(value, list | tuple):
        parts = cast(Sequence[Any], value)
        each = isinstance(value, list) and len(parts) == images and not all(_has_images(p, images) for p in parts)
        names = getattr(value, "_fields", None)
        for number, part in enumerate(parts):
            yield "[*]" if each else f"[{number}]" if names is None else f".{names[number]}", part
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield f".{field.name}", getattr(value, field.name)


def _has_images(part: Any, images: int) -> bool:
    """Whether an entry of a list is of the whole batch, such as a level of a pyramid of features."""
    tensors = [tensor for _, tensor in _places(part, 0, "")]
    return all(tensor.dim() > 0 and len(tensor) == images for tensor in tensors)


def spread_per_image(parts: Sequence[list[Tensor]], images: int, *, class_logits: bool = False) -> float:
    """Return the spread of an output, sum ||z - mean(z)||^2 / images, positive, in squared units of the output.

    Args:
        parts: The output's tensors by batch, see `named_outputs`.
        images: The number of images in all batches.
        class_logits: See `OutputDistance`.
    """
    wanted = _Wanted(list(parts), class_logits)
    return wanted.unit * max(wanted.rows, 1) / max(images, 1)


def _view(parts: _Parts, class_logits: bool) -> "_View":
    tensors = [tensor for batch in parts for tensor in batch]

    def fits(rows: Callable[[Tensor], Tensor | None]) -> bool:
        shapes = {None if view is None else view.shape[1] for view in map(rows, tensors)}
        return len(shapes) == 1 and None not in shapes

    # The first way in which all tensors have rows of one length, so that they can be compared.
    rows = next(filter(fits, (_by_image, _by_channel, _by_last)), _by_number)
    return _View(rows, class_logits and all(t.dim() == 2 and t.shape[1] > 1 for t in tensors))


def _by_image(tensor: Tensor) -> Tensor | None:
    return tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None] if tensor.dim() else None


def _by_channel(tensor: Tensor) -> Tensor | None:
    return tensor.movedim(1, -1).reshape(-1, tensor.shape[1]) if tensor.dim() > 2 and tensor.shape[1] else None


def _by_last(tensor: Tensor) -> Tensor | None:
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 and tensor.shape[-1] else None


def _by_number(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, 1)


@dataclasses.dataclass(frozen=True)
class _View:
    """How the tensors of one output are turned into (rows, features) of float64."""

    rows: Callable[[Tensor], Tensor | None]
    centered: bool

    def of(self, tensor: Tensor) -> Tensor | None:
        found = self.rows(tensor)
        if found is None:
            return None
        # In float64, because the difference of close outputs loses digits.
        found = found.double()
        return found - found.mean(1, keepdim=True) if self.centered else found


class _Wanted:
    """One output of the original on all batches, and the unit of its errors.

    Rows are images, if all tensors have the same shape but for those; otherwise (images of several sizes, lists of
    detections) they are what runs along the dimensions that carry no channels. The unit is the spread, mean
    ||z - mean(z)||^2 over the rows. An output that does not vary beyond its rounding, such as constant anchors, is
    measured by its size instead, mean ||z||^2, and one that is zero everywhere by 1. So the unit is always positive.
    """

    def __init__(self, parts: _Parts, class_logits: bool):
        self._parts = parts
        self._view = _view(parts, class_logits)
        self.rows, self.unit = self._unit()

    def _rows(self) -> Iterator[Tensor]:
        for batch in self._parts:
            for tensor in batch:
                rows = self._view.of(tensor)
                assert rows is not None, "the view was chosen by these tensors"
                # A few values that are not finite must not spoil the unit. In `error` they make the distance infinite.
                yield torch.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)

    def _unit(self) -> tuple[int, float]:
        count, total, squares = 0, cast(Any, 0.0), cast(Any, 0.0)
        for rows in self._rows():
            count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.square().sum()
        if not count:
            return 0, 1.0
        mean = total / count
        # A second pass, because the mean of squares less the square of the mean loses digits.
        spread = float(sum(float((rows - mean).square().sum()) for rows in self._rows()) / count)
        size = float(squares / count)
        rounding = 4 * max(torch.finfo(tensor.dtype).eps for batch in self._parts for tensor in batch)
        if spread > rounding**2 * size:
            return count, spread
        return count, (size if size > 0 else 1.0)

    def error(self, got: _Parts) -> float:
        """Return mean ||z' - z||^2 in units; a row that only one of the two has counts 1.

        Tensors that only the cut model has are left out: there is nothing to compare them with.
        """
        total, count, alone = cast(Any, 0.0), 0, 0
        for wanted, given in zip(self._parts, got, strict=True):
            pairs = zip(wanted, [*given, *([None] * (len(wanted) - len(given)))], strict=False)
            for tensor, other in pairs:
                want = cast(Tensor, self._view.of(tensor))
                have = None if other is None else self._view.of(other)
                if have is None or have.shape[1] != want.shape[1]:
                    # Nothing to compare with, so that all rows count as being alone.
                    have = want[:0]
                both, most = min(len(want), len(have)), max(len(want), len(have))
                total = total + _squares(want[:both], have[:both])
                count, alone = count + most, alone + most - both
        error = (float(total) / self.unit + alone) / max(count, 1)
        return math.inf if math.isnan(error) else error


def _squares(want: Tensor, have: Tensor) -> Tensor:
    """Return the sum of squared differences, where the original is finite: masked scores may be -inf."""
    difference = have - want
    if not bool(torch.isfinite(difference).all()):
        # What is not finite in the cut model alone stays so, and makes the distance infinite.
        difference = torch.where(torch.isfinite(want), difference, torch.zeros_like(difference))
    return difference.square().sum()


class OutputDistance:
    """The distance of cut models' outputs z' from the original's z, on the same images; it needs no labels.

    For each output tensor k by itself, in units of its own spread:

        d_k = mean ||z'_k - z_k||^2 / mean ||z_k - mean(z_k)||^2

    and d is the mean of d_k over the output tensors, each with equal weight, so that boxes in pixels do not hide class
    scores. Dimensionless: 0 for equal outputs, 1 for a model that always returns the mean output.

    An output that does not vary is measured in units of its size. Outputs of as many rows as there are detections are
    compared row by row; a row that only one of the models has counts 1. Integer outputs are left out.

    Args:
        original: The original model, which runs once.
        images: Batches on the device of the model, in any form that `secateur.trace` takes as an example.
        class_logits: Whether outputs of shape (n, classes) are class logits. Then the mean over the classes is taken
            out of every row, because softmax does not see it.

    Attributes:
        names: The places of the output tensors, such as ``""`` for the only one, ``[0]`` or ``.boxes``.

    Raises:
        SurgeryError: If no output is a floating-point tensor.
    """

    def __init__(self, original: nn.Module, images: Sequence[Example], *, class_logits: bool = False):
        self._images = tuple(images)
        outputs = _run(original, self._images)
        self.names: tuple[str, ...] = tuple(dict.fromkeys(name for found in outputs for name in found))
        if not self.names and self._images:
            raise SurgeryError("the model's output must hold a floating-point tensor to compare; it holds none.")
        self._wanted = [_Wanted([found.get(name, []) for found in outputs], class_logits) for name in self.names]

    def per_output(self, small: nn.Module) -> tuple[float, ...]:
        """Return the distance of each output tensor of one cut model, in the order of ``names``."""
        outputs = _run(small, self._images)
        pairs = zip(self.names, self._wanted, strict=True)
        return tuple(wanted.error([found.get(name, []) for found in outputs]) for name, wanted in pairs)

    def of(self, small: nn.Module) -> float:
        """Return the distance of one cut model: the mean over its output tensors."""
        distances = self.per_output(small)
        return sum(distances) / max(len(distances), 1)

    def worst(self, small: nn.Module) -> float:
        """Return the largest distance among the output tensors of one cut model."""
        return max(self.per_output(small), default=0.0)


def output_distance(original: nn.Module, small: nn.Module, images: Sequence[Example]) -> float:
    """Return the distance of one cut model's outputs from the original's; see `OutputDistance`."""
    return OutputDistance(original, images).of(small)


def _run(model: nn.Module, images: Sequence[Example]) -> list[dict[str, list[Tensor]]]:
    model = shadow_copy(model)
    outputs: list[dict[str, list[Tensor]]] = []
    with run_isolated(model), torch.no_grad():
        # Both models draw the same numbers, if they draw any.
        torch.manual_seed(0)
        for batch in images:
            outputs.append(named_outputs(call_model(model, batch), count_images(batch)))
    return outputs
