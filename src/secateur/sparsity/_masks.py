"""Masks on a model: a factor of 0 or 1 in front of every weight, through `torch.nn.utils.parametrize`."""

import copy
import re
import warnings
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.errors import SparsityError
from secateur.sparsity._weights import Masks, Place, check_same_names, parametrised, places_of

_KEPT = re.compile(r"(?P<module>(.+\.)?)parametrizations\.(?P<own>[^.]+)\.\d+\.kept")
"""The name of a mask in a state dict."""


class Mask(nn.Module):
    """A parametrisation that holds pruned weights at zero: weight * kept. Pruned weights get no gradient.

    Attributes:
        kept: bool, of the shape of the weight; in the state dict.
    """

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, with zeros where it is pruned."""
        # Not weight * kept: the strides of a product are not those of the weight where dimensions have size 1, and the
        # convolutions then convert between memory orders (MobileNet-v3-small, batch 32: 60 % more time per step).
        return weight.clone().mul_(self.kept)


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of a model in which pruned weights are zero, whatever its training does.

    Parameters keep their values; the mask is applied whenever a module reads its weight. Modules that share a tensor
    share its mask. A model that is masked already keeps its masks where no new one is given.

    Args:
        model: Left as it is.
        masks: For some or all of `prunable`, by name.

    Returns:
        The copy, in the mode of the model. Its state dict holds the masks.

    Raises:
        SparsityError: If a mask has no weight, or another shape or type than bool.
    """
    model = copy.deepcopy(model)
    places = places_of(model)
    for name, kept in masks.items():
        if name not in places:
            raise SparsityError(f"`masks` must name weights of the model; {name!r} is none. See `prunable(model)`.")
        first = places[name][0]
        weight = getattr(first.module, first.own)
        _check(name, kept, weight)
        mask = _mask_at(first) or Mask(torch.ones_like(weight, dtype=torch.bool))
        mask.kept.copy_(kept)
        for place in places[name]:
            if _mask_at(place) is None:
                _own_class_(place.module)
                parametrize.register_parametrization(place.module, place.own, mask)
    return model


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a model by the names of its weights, as copies; empty if it has none."""
    return {name: mask.kept.clone() for name, mask in _masks(model).items()}


def nonzero_params(model: nn.Module) -> int:
    """The number of a model's parameters that are not zero, shared ones once; masked ones count as zero.

    The count of all of them is `secateur.cost.counted_params`.
    """
    firsts = {places[0].name: places[0] for places in places_of(model).values()}
    kept = {
        id(parametrised(place.module)[place.own].original): mask.kept
        for place in firsts.values()
        if (mask := _mask_at(place)) is not None
    }
    each = ((parameter.detach(), kept.get(id(parameter))) for parameter in model.parameters())
    return sum(int((tensor if mask is None else tensor * mask).count_nonzero()) for tensor, mask in each)


def set_masks_(model: nn.Module, masks: Masks) -> nn.Module:
    """Put other values into the masks of a model, in place: the next step of a gradual schedule.

    Args:
        model: Masked, see `masked`.
        masks: For all its masks, by the names of `masks_of`.

    Returns:
        The model.

    Raises:
        SparsityError: If the names are others, or a shape or type is wrong.
    """
    present = _masks(model)
    check_same_names("masks", masks, present, "the model's masks")
    for name, kept in masks.items():
        _check(name, kept, present[name].kept)
    for name, kept in masks.items():
        present[name].kept.copy_(kept)
    return model


def masked_like(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A masked copy of a model that holds a masked model's state dict, masks and all.

    Args:
        model: Of the same architecture, without masks; left as it is.
        state: ``masked_model.state_dict()``, as loaded from a file.

    Raises:
        SparsityError: If a mask has no weight in the model.
        RuntimeError: By `torch.nn.Module.load_state_dict`, if other tensors differ.
    """
    masks = {f"{m['module']}{m['own']}": kept for key, kept in state.items() if (m := _KEPT.fullmatch(key))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # An empty mask was reported when it was made.
        model = masked(model, masks)
    model.load_state_dict(state)
    return model


def make_permanent_(model: nn.Module) -> nn.Module:
    """Take the masks off and leave their zeros in the weights, in place: an ordinary model again.

    Parameters stay the objects they are, so an optimiser goes on with them (and may then make zeros non-zero).

    Args:
        model: Masked or not.

    Returns:
        The model.

    Raises:
        SparsityError: If a masked weight has another parametrisation beside its mask.
    """
    for place in {place.name: place for places in places_of(model).values() for place in places}.values():
        if _mask_at(place) is None:
            continue
        others = [type(one).__name__ for one in parametrised(place.module)[place.own] if not isinstance(one, Mask)]
        if others:
            raise SparsityError(
                f"`model` must have only masks on its weights; got {', '.join(others)} on {place.name!r} too. "
                "Remove it first with torch.nn.utils.parametrize.remove_parametrizations."
            )
        _own_class_(place.module)
        parametrize.remove_parametrizations(place.module, place.own)
        with torch.no_grad():
            # A mask makes -0.0 of negative weights, which is no zero to a file: -0.0 + 0.0 = 0.0.
            getattr(place.module, place.own).add_(0.0)
    return model


def _masks(model: nn.Module) -> dict[str, Mask]:
    """Masks by the first name of their weight."""
    firsts = {places[0].name: places[0] for places in places_of(model).values()}
    return {name: mask for name, place in firsts.items() if (mask := _mask_at(place)) is not None}


def _mask_at(place: Place) -> Mask | None:
    inner = parametrised(place.module).get(place.own, ())
    return next((one for one in inner if isinstance(one, Mask)), None)


def _check(name: str, kept: Tensor, weight: Tensor) -> None:
    if kept.dtype is not torch.bool or kept.shape != weight.shape:
        raise SparsityError(
            f"`masks` must be bool tensors of the shapes of the weights; got {kept.dtype} {tuple(kept.shape)} for "
            f"{name!r} {tuple(weight.shape)}. Use `keep_largest` or its like."
        )
    if not bool(kept.any()):
        warnings.warn(f"the mask of {name!r} keeps no weight: its layer is reduced to its bias", stacklevel=3)


def _own_class_(module: nn.Module) -> None:
    """Give a parametrised module a class that no copy of it shares.

    torch keeps a parametrised tensor as a property of a class made for the module, and copies of the module share
    that class: adding or removing a property in one would break the others.
    """
    if parametrize.is_parametrized(module):
        kind = type(module)
        held = {name: value for name, value in vars(kind).items() if name not in {"__dict__", "__weakref__"}}
        module.__class__ = cast("type[nn.Module]", type(kind.__name__, kind.__bases__, held))
