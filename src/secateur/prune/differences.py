"""How far the outputs of two models are apart: each output by its own spread, integers exactly."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from secateur._outputs import Leaf


@dataclass(frozen=True)
class Difference:
    """The largest difference of two outputs: absolute, relative, and the place of the output where it is."""

    absolute: float
    relative: float
    place: str


def largest_difference(
    want: Mapping[str, Leaf],
    got: Mapping[str, Leaf],
    floor: float = 0.0,
    unstable: Sequence[Mapping[str, Tensor | bool]] = (),
) -> Difference | None:
    """Return the largest difference of two models' outputs, each relative to its own spread.

    The spread of an element is the smallest range, largest minus smallest value, among the tensor and its slices
    through the element: rows, columns, channels. So neither another output nor another column with larger values, nor a
    large constant, can hide a difference. A tensor of equal values counts by its largest one. Integers, truth values,
    numbers and texts must be equal: any difference is infinite.

    Args:
        want: Every value that the reference returns, by its place.
        got: The same of the other model.
        floor: This part of a tensor's largest value is added to its spreads.
        unstable: Elements that are not compared, by place: those that differ when the inputs are changed by rounding
            only (the index of the larger of two equal numbers, and what is found by it).

    Returns:
        None if the places, the shapes or the types differ, or nothing can be compared.
    """
    if list(want) != list(got):
        return None
    largest, compared = Difference(0.0, 0.0, ""), False
    for place, first in want.items():
        left_out = _united([changes.get(place, True) for changes in unstable])
        if left_out is True:
            continue
        compared = True
        found = _difference(first, got[place], floor, left_out)
        if found is None:
            return None
        absolute, relative = found
        # Without any difference, the first place stands for all.
        if relative > largest.relative or (not largest.place and relative == largest.relative):
            largest = Difference(max(absolute, largest.absolute), relative, place)
        else:
            largest = replace(largest, absolute=max(absolute, largest.absolute))
    return largest if compared or not want else None


UNSTABLE = 1e-6
"""Part of its spread by which an unstable element changes when its inputs change by rounding steps."""


def changes_between(first: Mapping[str, Leaf], second: Mapping[str, Leaf]) -> dict[str, Tensor | bool]:
    """Return by place which elements differ in two runs of a model: a mask, True for all, or False for none."""
    return {place: _changed(leaf, second.get(place)) for place, leaf in first.items()}


def _changed(first: Leaf, second: Leaf) -> Tensor | bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return first != second
    if first.shape != second.shape:
        return True
    if first.is_floating_point() and first.numel():
        changed = (first - second).abs() > UNSTABLE * _spread(first)
    else:
        changed = first != second
    return changed if bool(changed.any()) else False


def _united(masks: Sequence[Tensor | bool]) -> Tensor | bool:
    """Return which elements any of the masks contains."""
    united: Tensor | bool = False
    for mask in masks:
        if mask is True:
            return True
        if isinstance(mask, Tensor) and isinstance(united, Tensor):
            if mask.shape != united.shape:
                return True
            united = united | mask
        else:
            united = mask if isinstance(mask, Tensor) else united
    return True if isinstance(united, Tensor) and bool(united.all()) else united


def _difference(first: Leaf, second: Leaf, floor: float, unstable: Tensor | bool) -> tuple[float, float] | None:
    """Return the absolute and the relative difference of two values; None if they are of another kind or shape."""
    if isinstance(first, float) and isinstance(second, float):
        first, second = torch.tensor(first, dtype=torch.float64), torch.tensor(second, dtype=torch.float64)
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return (0.0, 0.0) if type(first) is type(second) and first == second else (math.inf, math.inf)
    if first.shape != second.shape or first.is_floating_point() != second.is_floating_point():
        return None
    if not first.numel():
        return 0.0, 0.0
    if not first.is_floating_point():
        return (0.0, 0.0) if bool(((first == second) | unstable).all()) else (math.inf, math.inf)
    first, second = first.double(), second.double()
    error = (first - second).abs()
    if isinstance(unstable, Tensor):
        error = error.masked_fill(unstable, 0.0)
    most = float(first.abs().max())
    relative = error / (_spread(first) + floor * most)
    # 0 / 0: a value that is right, in a slice of zeros.
    worst = float(torch.where(error == 0, 0.0, relative).max())
    # NaN is not above any tolerance, so it must become a number that is.
    return float(error.max()), math.inf if math.isnan(worst) else worst


_FEWEST = 8
"""Slices with fewer elements have no spread of their own."""


def _spread(values: Tensor) -> Tensor:
    """Return the smallest range of the values and their slices through each element, broadcastable to the values."""
    whole = values.amax() - values.amin()
    if float(whole) == 0:
        return values.abs().amax()
    spread = whole
    for dim in range(values.dim()):
        others = [d for d in range(values.dim()) if d != dim]
        if values.size(dim) > 1 and values.numel() // values.size(dim) >= _FEWEST:
            ranges = values.amax(others, keepdim=True) - values.amin(others, keepdim=True)
            spread = torch.minimum(spread, ranges)
    return spread


def perturbed(example: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Return the example with all real numbers changed at random: by rounding steps, or in float64 by about 1e-10."""
    draw = torch.Generator().manual_seed(seed)

    def change(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        # Drawn on the CPU, so that the noise is the same on every device.
        noise = torch.randn(tensor.shape, generator=draw, dtype=torch.float64).to(tensor.device)
        size = max(4 * torch.finfo(tensor.dtype).eps, 1e-10)
        return (tensor.double() * (1 + size * noise)).to(tensor.dtype)

    return tree_map_only(Tensor, change, example)
