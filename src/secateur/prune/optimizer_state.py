"""The state of an optimizer across a cut: what it holds for each parameter is sliced as the parameter was."""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph.graph import ChannelGraph
from secateur.prune.narrow_branches import original_names
from secateur.prune.slice import KeptByDim, kept_positions_by_tensor

AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)
_OWN = frozenset({"state", "param_groups", "defaults"})


def slice_optimizer_state(
    optimizer: AnyOptimizer, original: nn.Module, small: nn.Module, graph: ChannelGraph, architecture: Architecture
) -> AnyOptimizer:
    """Return an optimizer of the cut model that goes on where one of the original was.

    Args:
        optimizer: An optimizer of the original's parameters; not changed. Parameters of other modules stay in it.
        original: The model that was cut.
        small: The cut model.
        graph: The graph that it was cut by.
        architecture: What was kept.

    Returns:
        An optimizer of the same class with the same groups and settings. State of the shape of its parameter, also
        where a dimension is 1, is a bit-equal slice; numbers, such as the count of steps, are copied. Parameters of
        removed blocks are left out.

    Raises:
        SurgeryError: If no parameter is one of the original's, or a state has a shape that cannot be sliced.
    """
    # Any name of a shared parameter leads to it in the cut model, but what is kept is listed by its first name.
    names = {id(parameter): name for name, parameter in original.named_parameters(remove_duplicate=False)}
    first_names = {id(parameter): name for name, parameter in original.named_parameters()}
    modules = original_names(small)
    ours = {
        f"{modules[path]}.{leaf}" if modules[path] else leaf: parameter
        for path, module in small.named_modules()
        if path in modules
        for leaf, parameter in module.named_parameters(recurse=False)
    }
    if not any(id(parameter) in names for group in optimizer.param_groups for parameter in group["params"]):
        raise SurgeryError(
            "`optimizer` must hold parameters of the model that was cut; got none of them. Pass the optimizer that "
            "trained the model given to `cut`, not one of a copy."
        )
    kept = kept_positions_by_tensor(graph, architecture)
    state: defaultdict[Any, Any] = defaultdict(dict)
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        parameters: list[Any] = []
        for old in group["params"]:
            if id(old) not in names:
                new, dims = old, {}
            elif (found := ours.get(names[id(old)])) is not None:
                new, dims = found, kept.get(first_names[id(old)], {})
            else:  # It went with a removed block.
                continue
            parameters.append(new)
            if old in optimizer.state:
                label = names.get(id(old), "a parameter of another module")
                state[new] = _sliced_state(optimizer.state[old], old, new, dims, label)
        groups.append({**copy.deepcopy({k: v for k, v in group.items() if k != "params"}), "params": parameters})
    return _like(optimizer, state, groups)


def _sliced_state(state: Mapping[str, Any], old: Tensor, new: Tensor, dims: KeptByDim, label: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            found[key] = copy.deepcopy(value)
            continue
        if value.dim() != old.dim() or any(
            size not in (1, full) for size, full in zip(value.shape, old.shape, strict=True)
        ):
            raise SurgeryError(
                f"`optimizer` must hold state of the shape of its parameters, of which a slice is known; got "
                f"{key!r} {tuple(value.shape)} for {label} {tuple(old.shape)}. Begin with a new optimizer."
            )
        part = value
        for dim, positions in dims.items():
            if value.size(dim) == old.size(dim):
                part = part.index_select(dim, torch.from_numpy(positions).to(part.device))
        assert all(size in (1, width) for size, width in zip(part.shape, new.shape, strict=True))
        # What was not sliced must not be shared with the old optimizer, which may go on.
        found[key] = part.clone(memory_format=torch.preserve_format) if part is value else part
    return found


def _like(optimizer: AnyOptimizer, state: defaultdict[Any, Any], groups: list[dict[str, Any]]) -> AnyOptimizer:
    """Return an optimizer of the same class, made as unpickling makes one: constructors take different arguments."""
    new = type(optimizer).__new__(type(optimizer))
    new.__dict__.update({k: v for k, v in vars(optimizer).items() if not k.startswith("_") and k not in _OWN})
    new.__setstate__({"state": state, "param_groups": groups, "defaults": copy.deepcopy(optimizer.defaults)})
    return new
