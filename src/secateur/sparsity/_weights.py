"""Which tensors of a model are pruned weight by weight, and what is said of each."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.errors import SparsityError

Weights = Mapping[str, Tensor]
"""Weights by name, masked ones as the model computes with them: pruned weights are 0."""

Scores = Mapping[str, Tensor]
"""What each weight is worth, in tensors of the shape of the weights. The highest are kept."""

Counts = Mapping[str, int]
"""How many weights of each tensor are kept."""

Masks = Mapping[str, Tensor]
"""bool tensors of the shapes of the weights: True is kept."""

_SUGGESTIONS = 4


def prunable(model: nn.Module, *, exclude: Sequence[str] = ()) -> dict[str, Tensor]:
    """The weights of a model that may be pruned one by one.

    All tensors of two dimensions or more whose own name ends in "weight": those of convolutions, linear layers,
    attention projections and embeddings; not biases, tokens, position tables, and norms of one dimension. Tensors that
    several modules share are named once, by the first.

    Args:
        model: Left as it is; it may be masked already.
        exclude: Name patterns; ``*`` also stands for dots. A tensor is left out if a pattern matches its name or that
            of a module around it: ``head`` or ``head.weight`` or ``*.downsample``.

    Returns:
        The tensors themselves, no copies, detached; what a mask holds at zero is zero.

    Raises:
        SparsityError: If a pattern matches nothing (with the names nearest to it), or nothing is left.
    """
    found: dict[str, Tensor] = {}
    for place in {id(places): places[0] for places in places_of(model).values()}.values():
        tensor = getattr(place.module, place.own).detach()
        if place.own.endswith("weight") and tensor.ndim >= 2:
            found[place.name] = tensor
    known = dict.fromkeys(around for name in found for around in _around(name))
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in known):
            near = difflib.get_close_matches(pattern, known, n=_SUGGESTIONS)
            meant = f" Did you mean {', '.join(near)}?" if near else ""
            raise SparsityError(
                f"`exclude` must match a weight or a module with weights; {pattern!r} matches none.{meant}"
            )
    kept = {
        name: tensor
        for name, tensor in found.items()
        if not any(fnmatchcase(around, pattern) for around in _around(name) for pattern in exclude)
    }
    if not kept:
        raise SparsityError(
            f"`model` must have weights to prune; got none of {len(found)} after exclude={list(exclude)}. Exclude less."
        )
    return kept


@dataclass(frozen=True)
class Place:
    """Where a module reads a tensor.

    Attributes:
        name: Qualified name of the tensor.
        module: The module.
        own: The tensor's name in the module.
    """

    name: str
    module: nn.Module
    own: str


def places_of(model: nn.Module) -> dict[str, list[Place]]:
    """By the name of a tensor, all places that share its parameter, the first one first.

    A parametrised tensor is the one the module computes with; the insides of its parametrisation are left out.
    """
    shared: dict[int, list[Place]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        parameters: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        for own, inner in parametrised(module).items():
            parameters |= {own: next(iter(inner.parameters(recurse=False)))}
        for own, parameter in parameters.items():
            shared.setdefault(id(parameter), []).append(Place(f"{prefix}.{own}" if prefix else own, module, own))
    return {place.name: places for places in shared.values() for place in places}


def parametrised(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrisations of a module by the names of its tensors; empty if it has none."""
    if not parametrize.is_parametrized(module):
        return {}
    lists = cast("nn.ModuleDict", module.parametrizations)
    return {own: cast("parametrize.ParametrizationList", inner) for own, inner in lists.items()}


def _around(name: str) -> list[str]:
    """A tensor's name and the names of the modules around it."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), 0, -1)]


def check_density(name: str, density: float, *, dense: bool) -> None:
    """Refuse a kept fraction outside of (0, 1); 1 is allowed if ``dense``."""
    if not (math.isfinite(density) and 0 < density <= 1) or (density == 1 and not dense):
        interval = "(0, 1]" if dense else "(0, 1)"
        raise SparsityError(
            f"`{name}` must be the fraction of weights kept, in {interval}; got {density}. "
            "0.2 keeps one weight in five."
        )


def check_same_names(name: str, given: Mapping[str, object], wanted: Mapping[str, object], of: str) -> None:
    """Refuse a mapping over other tensors than those wanted."""
    if given.keys() != wanted.keys():
        unknown, missing = sorted(given.keys() - wanted.keys()), sorted(wanted.keys() - given.keys())
        raise SparsityError(
            f"`{name}` must name the tensors of {of}; got unknown {unknown[:_SUGGESTIONS]} and missing "
            f"{missing[:_SUGGESTIONS]}. Make both from the same `prunable(model)`."
        )
