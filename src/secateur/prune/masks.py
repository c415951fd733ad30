"""Pruning of single weights: which weights can be pruned, masks that hold them at zero, and their compact encoding.

A mask is a parametrization (`torch.nn.utils.parametrize`) that multiplies a weight by 0 or 1 whenever it is read.
`encode_sparse` stores a sparse array as one bit per element and the elements that are not zero.
"""

import difflib
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur._runtime import copy_model
from secateur.errors import SparsityError
from secateur.graph.blocks import enclosing_names

Weights = Mapping[str, Tensor]
"""Weights by name, with zeros where they are pruned."""

Scores = Mapping[str, Tensor]
"""The importance of each weight, in tensors of the shapes of the weights; the highest are kept."""

Counts = Mapping[str, int]
"""The number of weights to keep, by name of the tensor."""

Masks = Mapping[str, Tensor]
"""bool tensors of the shapes of the weights; True for kept weights."""

_SUGGESTIONS = 4


def prunable_weights(model: nn.Module, *, exclude: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the weights of a model that may be pruned one by one.

    These are all tensors of two or more dimensions whose own name ends in "weight": those of convolutions, linear
    layers, attention projections and embeddings, but not biases, tokens, position tables and one-dimensional norms.
    Tensors that several modules share are named once, by the first.

    Args:
        model: Not modified; it may have masks already.
        exclude: Name patterns in which ``*`` also matches dots. A tensor is left out if a pattern matches its name or
            that of a module around it: ``head`` or ``head.weight`` or ``*.downsample``.

    Returns:
        The tensors themselves, not copies, detached; masked weights are zero.

    Raises:
        SparsityError: If a pattern matches nothing (with the names nearest to it), or nothing is left.
    """
    found: dict[str, Tensor] = {}
    # Shared tensors have the same list of uses; take each list once.
    for place in {id(places): places[0] for places in weight_uses(model).values()}.values():
        tensor = getattr(place.module, place.own).detach()
        # The projections of attention are named `in_proj_weight` and the like.
        if place.own.endswith("weight") and tensor.ndim >= 2:
            found[place.name] = tensor
    known = dict.fromkeys(around for name in found for around in enclosing_names(name))
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
        if not any(fnmatchcase(around, pattern) for around in enclosing_names(name) for pattern in exclude)
    }
    if not kept:
        raise SparsityError(
            f"`model` must have weights to prune; got none of {len(found)} after exclude={list(exclude)}. Exclude less."
        )
    return kept


@dataclass(frozen=True)
class WeightUse:
    """A tensor and a module that uses it.

    Attributes:
        name: The qualified name of the tensor.
        module: The module.
        own: The tensor's name in the module.
    """

    name: str
    module: nn.Module
    own: str


def weight_uses(model: nn.Module) -> dict[str, list[WeightUse]]:
    """Return all uses of the same parameter, in order, by the name of the tensor.

    A parametrized tensor is represented by the result; the tensors inside of its parametrization are left out.
    """
    shared: dict[int, list[WeightUse]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue
        parameters: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        for own, inner in parametrizations_of(module).items():
            # The list's own parameter is the original tensor, by which shared weights are recognized under their masks.
            parameters |= {own: next(iter(inner.parameters(recurse=False)))}
        for own, parameter in parameters.items():
            shared.setdefault(id(parameter), []).append(WeightUse(f"{prefix}.{own}" if prefix else own, module, own))
    return {place.name: places for places in shared.values() for place in places}


def parametrizations_of(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Return the parametrizations of a module by the names of its tensors; empty if it has none."""
    if not parametrize.is_parametrized(module):
        return {}
    lists = cast("nn.ModuleDict", module.parametrizations)
    return {own: cast("parametrize.ParametrizationList", inner) for own, inner in lists.items()}


def check_density(name: str, density: float, *, dense: bool) -> None:
    """Refuse a kept fraction outside (0, 1); 1 is allowed if ``dense``."""
    if not (math.isfinite(density) and 0 < density <= 1) or (density == 1 and not dense):
        interval = "(0, 1]" if dense else "(0, 1)"
        raise SparsityError(
            f"`{name}` must be the fraction of weights kept, in {interval}; got {density}. "
            "0.2 keeps one weight in five."
        )


def check_same_names(name: str, given: Mapping[str, object], wanted: Mapping[str, object], of: str) -> None:
    """Refuse a mapping whose keys are not the wanted tensors."""
    if given.keys() != wanted.keys():
        unknown, missing = sorted(given.keys() - wanted.keys()), sorted(wanted.keys() - given.keys())
        raise SparsityError(
            f"`{name}` must name the tensors of {of}; got unknown {unknown[:_SUGGESTIONS]} and missing "
            f"{missing[:_SUGGESTIONS]}. Make both from the same `prunable_weights(model)`."
        )


_KEPT = re.compile(r"(?P<module>(.+\.)?)parametrizations\.(?P<own>[^.]+)\.\d+\.kept")
"""The name of a mask in a state dict."""


class Mask(nn.Module):
    """A parametrization that holds pruned weights at zero: weight * kept. Pruned weights get no gradient.

    Attributes:
        kept: bool, of the shape of the weight; in the state dict.
    """

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        # bool: a float mask would make steps of small layers 3 % faster, but a moving average of the weights would
        # average it.
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros where it is pruned."""
        # Not weight * kept: the strides of a product are not those of the weight where dimensions have size 1, and the
        # convolutions then convert between memory orders (MobileNet-v3-small, batch 32: 60 % more time per step).
        return weight.clone().mul_(self.kept)

    def extra_repr(self) -> str:
        """Return the shape and the fraction of the weights that are kept."""
        return f"{' x '.join(map(str, self.kept.shape))}, {float(self.kept.float().mean()):.1%} kept"


def apply_masks(model: nn.Module, masks: Masks) -> nn.Module:
    """Return a copy of a model in which pruned weights are zero, and stay zero during training.

    Parameters keep their values; the mask is applied whenever a module reads its weight. Modules that share a tensor
    share its mask. A model that has masks already keeps those for which there is no new one.

    Args:
        model: Not modified.
        masks: Masks of some or all of the `prunable_weights`, by name.

    Returns:
        The copy, in the mode of the model. Its state dict contains the masks.

    Raises:
        SparsityError: If a mask has no weight, or another shape or type than bool.
    """
    model = copy_model(model)
    places = weight_uses(model)
    for name, kept in masks.items():
        if name not in places:
            raise SparsityError(
                f"`masks` must name weights of the model; {name!r} is none. See `prunable_weights(model)`."
            )
        first = places[name][0]
        weight = getattr(first.module, first.own)
        _check_mask(name, kept, weight)
        # Uses of a shared weight share one mask, so that they stay equal.
        # Filled by `copy_`, so that the mask is on the device of the weight, and a mask that is there already stays the
        # same object.
        mask = _mask_at(first) or Mask(torch.ones_like(weight, dtype=torch.bool))
        mask.kept.copy_(kept)
        for place in places[name]:
            if _mask_at(place) is None:
                _unshare_class_(place.module)
                parametrize.register_parametrization(place.module, place.own, mask)
    return model


def get_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the masks of a model by the names of its weights; empty if it has none."""
    return {name: mask.kept.clone() for name, mask in _masks(model).items()}


def nonzero_params(model: nn.Module) -> int:
    """Return the number of a model's parameters that are neither zero nor masked, counting shared ones once.

    The number of all parameters is `secateur.cost.count_params`.
    """
    firsts = {places[0].name: places[0] for places in weight_uses(model).values()}
    kept = {
        id(parametrizations_of(place.module)[place.own].original): mask.kept
        for place in firsts.values()
        if (mask := _mask_at(place)) is not None
    }
    # Under a mask, the parameter is the original tensor, in which the pruned weights still have values.
    each = ((parameter.detach(), kept.get(id(parameter))) for parameter in model.parameters())
    return sum(int((tensor if mask is None else tensor * mask).count_nonzero()) for tensor, mask in each)


def set_masks_(model: nn.Module, masks: Masks) -> nn.Module:
    """Replace the masks of a model in place, as for the next step of a gradual schedule.

    Args:
        model: A model with masks; see `apply_masks`.
        masks: New values of all its masks, by the names of `get_masks`.

    Returns:
        The model.

    Raises:
        SparsityError: If the names are others, or a shape or type is wrong.
    """
    present = _masks(model)
    check_same_names("masks", masks, present, "the model's masks")
    # All masks are checked before any is changed.
    for name, kept in masks.items():
        _check_mask(name, kept, present[name].kept)
    for name, kept in masks.items():
        present[name].kept.copy_(kept)
    return model


def load_masked(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model with the state dict of a masked model, including the masks.

    Args:
        model: A model of the same architecture without masks; not modified.
        state: ``masked_model.state_dict()``, as loaded from a file.

    Raises:
        SparsityError: If a mask has no weight in the model.
        RuntimeError: By `torch.nn.Module.load_state_dict`, if other tensors differ.
    """
    masks = {f"{m['module']}{m['own']}": kept for key, kept in state.items() if (m := _KEPT.fullmatch(key))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # An empty mask was reported when it was made.
        model = apply_masks(model, masks)
    model.load_state_dict(state)
    return model


def make_permanent_(model: nn.Module) -> nn.Module:
    """Remove the masks in place and set the pruned weights to zero, which leaves an ordinary model.

    The parameters stay the same objects, so an optimizer continues with them (and may then change the zeros).

    Args:
        model: A model with or without masks.

    Returns:
        The model.

    Raises:
        SparsityError: If a masked weight has another parametrization beside its mask.
    """
    # Every use, because each module that shares a weight has a parametrization of its own.
    for place in {place.name: place for places in weight_uses(model).values() for place in places}.values():
        if _mask_at(place) is None:
            continue
        others = [
            type(one).__name__ for one in parametrizations_of(place.module)[place.own] if not isinstance(one, Mask)
        ]
        if others:
            raise SparsityError(
                f"`model` must have only masks on its weights; got {', '.join(others)} on {place.name!r} too. "
                "Remove it first with torch.nn.utils.parametrize.remove_parametrizations."
            )
        _unshare_class_(place.module)
        parametrize.remove_parametrizations(place.module, place.own)
        with torch.no_grad():
            # A mask turns negative weights into -0.0, whose bits are not zero: -0.0 + 0.0 = 0.0.
            # Stored by their bits, 90 % pruned weights would otherwise take 60 % of the dense file instead of 15 %.
            getattr(place.module, place.own).add_(0.0)
    return model


def _masks(model: nn.Module) -> dict[str, Mask]:
    """Return the masks by the first name of their weight."""
    firsts = {places[0].name: places[0] for places in weight_uses(model).values()}
    return {name: mask for name, place in firsts.items() if (mask := _mask_at(place)) is not None}


def _mask_at(place: WeightUse) -> Mask | None:
    inner = parametrizations_of(place.module).get(place.own, ())
    return next((one for one in inner if isinstance(one, Mask)), None)


def _check_mask(name: str, kept: Tensor, weight: Tensor) -> None:
    if kept.dtype is not torch.bool or kept.shape != weight.shape:
        raise SparsityError(
            f"`masks` must be bool tensors of the shapes of the weights; got {kept.dtype} {tuple(kept.shape)} for "
            f"{name!r} {tuple(weight.shape)}. Use `keep_largest` or a similar function."
        )
    if not bool(kept.any()):
        warnings.warn(f"the mask of {name!r} keeps no weight: its layer is reduced to its bias", stacklevel=3)


def _unshare_class_(module: nn.Module) -> None:
    """Give a parametrized module a class that no copy of the module shares.

    torch makes a class with properties for each parametrized module, but copies of the module share that class: adding
    or removing a property in one of them would break the others.
    """
    if parametrize.is_parametrized(module):
        kind = type(module)
        held = {name: value for name, value in vars(kind).items() if name not in {"__dict__", "__weakref__"}}
        module.__class__ = cast("type[nn.Module]", type(kind.__name__, kind.__bases__, held))


Arrays = dict[str, npt.NDArray[Any]]

BITS, VALUES, SHAPE, DENSE = "bits", "values", "shape", "dense"
"""The last parts of the names of encoded arrays."""


def encode_sparse(tensors: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Encode arrays so that every zero takes one bit.

    An array ``name`` becomes ``name/bits`` (uint8, one bit for each element in C order, most significant first, 1 where
    it is not zero), ``name/values`` (the others, in order, of its own type) and ``name/shape`` (int64); or
    ``name/dense``, as it is, where that is smaller. At 90 % zeros of float32: 1/32 + 1/10, 13 % of the dense bytes.
    Negative zeros and NaN are not zero. All arrays are of types that safetensors and numpy's own files hold.

    Args:
        tensors: Arrays of numbers by name.

    Returns:
        Contiguous arrays by name, from which `decode_sparse` restores the same bits.

    Raises:
        SparsityError: If an array holds something else than numbers.
    """
    encoded: Arrays = {}
    for name, given in tensors.items():
        array = np.asarray(given, order="C")
        if array.dtype.kind not in "biuf":
            raise SparsityError(f"`tensors` must hold numbers; got {array.dtype} in {name!r}. Leave it out.")
        # By bits, not by value: -0.0 == 0.0, but it must come back as -0.0.
        present = array.reshape(-1).view(f"u{array.itemsize}") != 0
        parts = {BITS: np.packbits(present), VALUES: array.reshape(-1)[present], SHAPE: np.array(array.shape, np.int64)}
        if sum(part.nbytes for part in parts.values()) >= array.nbytes:
            parts = {DENSE: array}
        encoded |= {f"{name}/{part}": value for part, value in parts.items()}
    return encoded


def decode_sparse(encoded: Mapping[str, npt.NDArray[Any]]) -> Arrays:
    """Return the arrays that `encode_sparse` encoded.

    Args:
        encoded: The result of `encode_sparse`, which may have been written to a file and read again.

    Raises:
        SparsityError: If arrays are missing or do not fit each other.
    """
    tensors: Arrays = {}
    for key in encoded:
        name, _, part = key.rpartition("/")
        if part == DENSE:
            tensors[name] = np.asarray(encoded[key])
        elif part == BITS:
            tensors[name] = _decode_array(name, encoded)
        elif part not in {VALUES, SHAPE} or f"{name}/{BITS}" not in encoded:
            raise SparsityError(f"`encoded` must be what `encode_sparse` gave; got the array {key!r} without its bits.")
    return tensors


def _decode_array(name: str, encoded: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    missing = [part for part in (VALUES, SHAPE) if f"{name}/{part}" not in encoded]
    if missing:
        raise SparsityError(f"`encoded` must be what `encode_sparse` gave; {name!r} has no {' and no '.join(missing)}.")
    bits, values, shape = (np.asarray(encoded[f"{name}/{part}"]) for part in (BITS, VALUES, SHAPE))
    size = int(np.prod(shape, dtype=np.int64))
    # The file may come from anywhere: check the parts against each other before using their sizes.
    sound = (
        bits.dtype == np.uint8 and bits.ndim == values.ndim == 1 and (shape >= 0).all() and len(bits) == -(-size // 8)
    )
    present = np.unpackbits(bits, count=size).astype(bool) if sound else np.zeros(0, bool)
    if not sound or int(present.sum()) != len(values):
        raise SparsityError(
            f"`encoded` must be what `encode_sparse` gave; the parts of {name!r} do not fit each other: "
            f"{len(bits)} bytes of bits and {len(values)} values for shape {shape.tolist()}. The file is damaged."
        )
    flat = np.zeros(size, values.dtype)
    flat[present] = values
    return flat.reshape(shape)
