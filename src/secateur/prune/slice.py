"""Make the smaller model of an architecture: slice every tensor, set every size, replace the modules of removed blocks.

`mask_removed` and `mask_readers` make full models that compute the same, as references. Nothing is verified or repaired
here; see `cut`.
"""

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import nn

from secateur._arrays import IntArray
from secateur._caller_state import in_default_state
from secateur._runtime import copy_model
from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph._size_records import set_number
from secateur.graph.channel_rules.layers import compute_over_kept_channels_
from secateur.graph.graph import ChannelGraph, Replacement, Role, SizeItem, StandIn
from secateur.prune.cut_record import CutRecord, record_cut_
from secateur.prune.masked_reference import zero_branches_
from secateur.prune.narrow_branches import branch_expansions, check_branches, expand_branches_


class PassThrough(nn.Module):
    """The module that replaces a removed one and returns its first tensor argument.

    Args:
        items: The length of the tuple to return, the tensor first and then None; None to return the tensor itself.
    """

    def __init__(self, items: int | None = None):
        super().__init__()
        self._items = items

    @property
    def items(self) -> int | None:
        """The length of the tuple that it returns; None if it returns a tensor."""
        return self._items

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first tensor among the arguments."""
        tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        return self._packed(tensor)

    def _packed(self, tensor: torch.Tensor) -> Any:
        return tensor if self._items is None else (tensor, *[None] * (self._items - 1))

    def extra_repr(self) -> str:
        """Return ``items`` as text, if it is set."""
        return "" if self._items is None else f"items={self._items}"


class ZeroOutput(PassThrough):
    """The module that replaces a removed one and returns zeros of the shape of its first tensor argument."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return zeros like the first tensor among the arguments."""
        tensor = next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        return self._packed(torch.zeros_like(tensor))


_CLASSES: dict[StandIn, type[PassThrough]] = {StandIn.PASS_THROUGH: PassThrough, StandIn.SILENCE: ZeroOutput}


def replace_modules_(model: nn.Module, replacements: Iterable[Replacement]) -> None:
    """Replace modules by their stand-ins in place, the outermost first; modules inside a replaced one are skipped.

    Raises:
        SurgeryError: If the model lacks one of the modules.
    """
    done: list[str] = []
    for replacement in sorted(replacements, key=lambda r: r.module.count(".")):
        name = replacement.module
        # The module disappeared together with an outer one.
        if any(name == outer or name.startswith(outer + ".") for outer in done):
            continue
        done.append(name)
        path, _, leaf = name.rpartition(".")
        try:
            model.get_submodule(name)
        except AttributeError as error:
            raise SurgeryError(f"`replacements` must name modules of the model; got {name!r}.") from error
        if not name:
            raise SurgeryError("`replacements` must name modules within the model; got the model itself.")
        setattr(model.get_submodule(path), leaf, make_stand_in(replacement).train(model.training))


def make_stand_in(replacement: Replacement) -> PassThrough:
    """Return a new module that takes the place of a removed one."""
    return _CLASSES[replacement.stand_in](replacement.items)


def find_replacements(model: nn.Module) -> tuple[Replacement, ...]:
    """Return the replacements that a cut model contains, from which `replace_modules_` can make them again."""
    kinds = {kind: stand_in for stand_in, kind in _CLASSES.items()}
    return tuple(
        Replacement(name, kinds[type(module)], module.items)
        for name, module in model.named_modules()
        if isinstance(module, PassThrough)
    )


def block_replacements(graph: ChannelGraph, removed_blocks: Iterable[str]) -> tuple[Replacement, ...]:
    """Return the replacements of some blocks."""
    return tuple(r for name in removed_blocks for r in graph.blocks_by_name[name].replacements)


KeptByDim = dict[int, IntArray]
"""The kept positions by dimension of a tensor."""


def check_architecture(graph: ChannelGraph, architecture: Architecture) -> None:
    """Refuse an architecture that does not fit the graph.

    Raises:
        SurgeryError: For an unknown or frozen axis, a channel out of range, a block that may not be removed, or a
            branch that keeps channels which its residual axis does not keep.
    """
    for name in architecture.removed_blocks:
        block = graph.blocks_by_name.get(name)
        if block is None:
            known = ", ".join(b.name for b in graph.removable[:8]) or "none"
            raise SurgeryError(
                f"`architecture` removes the block {name!r}, which this model lacks. It has: {known}, ..."
            )
        if block.kept_because is not None:
            raise SurgeryError(f"`architecture` removes the block {name!r}, which must stay: {block.kept_because}.")
    for name, channels in architecture.kept:
        axis = graph.by_name.get(name)
        if axis is None:
            known = ", ".join(a.name for a in graph.prunable[:8])
            raise SurgeryError(f"`architecture` names the axis {name!r}, which this model lacks. It has: {known}, ...")
        if len(channels) < axis.size and axis.frozen_because is not None:
            raise SurgeryError(f"`architecture` cuts the axis {name!r}, which must stay whole: {axis.frozen_because}.")
        # Kept channels are increasing, so the last one is the highest.
        if channels[-1] >= axis.size:
            raise SurgeryError(f"`architecture` keeps channel {channels[-1]} of {name!r}, which has {axis.size}.")
    check_branches(graph, architecture)


def kept_positions_by_tensor(
    graph: ChannelGraph, architecture: Architecture, roles: Container[Role] = frozenset(Role)
) -> dict[str, KeptByDim]:
    """Return the kept positions of every dimension of every tensor that loses any.

    Args:
        graph: The channel graph of the original model.
        architecture: The channels to keep.
        roles: Only sites with these roles count. Those of the last module of a branch always do, because a sum reads
            its output, and a sum has no weights.
    """
    masks: dict[str, dict[int, np.ndarray[Any, np.dtype[np.bool_]]]] = {}
    kept: dict[str, KeptByDim] = {}
    for name, channels in architecture.kept:
        axis = graph.by_name[name]
        if len(channels) == axis.size:
            continue
        stays = np.zeros(axis.size, dtype=bool)
        stays[list(channels)] = True
        known: dict[int, IntArray] = {}
        for site in axis.sites:
            adds = axis.residual_axis is not None and site.tensor.rpartition(".")[0] == axis.residual_output
            if site.role not in roles and not adds:
                continue
            length = full_size(graph, site.tensor, site.dim)
            if site.index.size == length:  # No other axis is in this dimension. Many sites share their index.
                if id(site.index) not in known:
                    known[id(site.index)] = np.sort(site.index[stays], axis=None)
                kept.setdefault(site.tensor, {})[site.dim] = known[id(site.index)]
                continue
            # Several axes share this dimension, and each removes its own positions.
            mask = masks.setdefault(site.tensor, {}).setdefault(site.dim, np.ones(length, dtype=bool))
            mask[site.index[~stays].reshape(-1)] = False
    for tensor, dims in masks.items():
        kept.setdefault(tensor, {}).update((dim, np.flatnonzero(mask)) for dim, mask in dims.items())
    return kept


def kept_weights(
    graph: ChannelGraph, architecture: Architecture, roles: frozenset[Role] = frozenset(Role)
) -> dict[str, KeptByDim]:
    """Return `kept_positions_by_tensor` of the weights: of all parameters, and of buffers that layers multiply by.

    Networks that were converted from ONNX keep weights in buffers. Running statistics are no weights: a variance of
    zero would be meaningless.
    """
    kept = kept_positions_by_tensor(graph, architecture, roles)
    multiplied = kept_positions_by_tensor(graph, architecture, roles - {Role.VECTOR})
    parameters = set(graph.parameters)
    return {
        name: dims if name in parameters else multiplied[name]
        for name, dims in kept.items()
        if name in parameters or name in multiplied
    }


def full_size(graph: ChannelGraph, tensor: str, dim: int) -> int:
    """Return the length of a dimension in the traced model."""
    return graph.tensors[tensor][dim].at(graph.sizes)


@in_default_state
def apply_architecture(model: nn.Module, graph: ChannelGraph, architecture: Architecture) -> nn.Module:
    """Return a new, smaller model: blocks removed, every tensor sliced, every size set. Kept weights are unchanged.

    A branch that keeps fewer channels than its residual axis is wrapped in `ExpandChannels`, which adds ``.inner`` to
    its names.

    Args:
        model: The traced model; not modified, and nothing is shared with the result.
        graph: Its channel graph.
        architecture: The channels to keep, and the blocks to remove.

    Raises:
        SurgeryError: If the architecture does not fit the graph.
    """
    check_architecture(graph, architecture)
    kept = kept_positions_by_tensor(graph, architecture)

    def sliced(name: str, tensor: torch.Tensor) -> torch.Tensor:
        for dim, positions in kept[name].items():
            tensor = tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))
        return tensor

    # Tensors before modules: sites are named by the modules of the original.
    small = copy_with_tensors(model, dict.fromkeys(kept, sliced))
    replace_modules_(small, block_replacements(graph, architecture.removed_blocks))
    gone = graph.removed_modules(architecture.removed_blocks)
    widths = {**graph.sizes, **architecture.widths}
    # Modules inside of replaced ones no longer exist.
    edits = [e for e in graph.edits if not gone(e.module)]
    set_size_attributes_(small, [(e.module, e.attribute, e.item, e.extent.at(widths)) for e in edits])
    # After the edits, because `in_channels` of a convolution is computed from its number of groups.
    update_declared_sizes_(small)
    names = {id(module): name for name, module in small.named_modules()}
    changed = [(e.module, e.attribute, e.item) for e in edits if e.extent.at(widths) != e.extent.at(graph.sizes)]
    earlier = CutRecord.of(model)
    record = CutRecord(architecture, ()) if earlier is None else earlier.then(graph, architecture)
    # Last, because it changes the names of the modules that it wraps.
    expand_branches_(small, branch_expansions(graph, architecture))
    record_cut_(small, names, changed, record)
    return small


@in_default_state
def mask_removed(model: nn.Module, graph: ChannelGraph, architecture: Architecture) -> nn.Module:
    """Return a copy of the full model in which the parameters of removed channels, and removed branches, are zero.

    It is the independent reference for `apply_architecture`: the value of a removed channel does not matter, because
    every weight that reads it is zero. Running statistics are not changed.
    """
    return _zero_parameters(model, graph, architecture, frozenset(Role))


@in_default_state
def mask_readers(model: nn.Module, graph: ChannelGraph, architecture: Architecture) -> nn.Module:
    """Return a copy of the full model in which only the weights that read removed channels, or add them, are zero.

    The channels themselves are computed as before. It is as good a reference as `mask_removed`, and stays finite
    where the model divides by something that is zero for a channel of zeros.
    """
    return _zero_parameters(model, graph, architecture, frozenset({Role.INPUT}))


def _zero_parameters(
    model: nn.Module, graph: ChannelGraph, architecture: Architecture, roles: frozenset[Role]
) -> nn.Module:
    check_architecture(graph, architecture)
    kept = kept_weights(graph, architecture, roles)

    def masked(name: str, tensor: torch.Tensor) -> torch.Tensor:
        zeroed = tensor.clone()
        for dim, positions in kept[name].items():
            gone = np.setdiff1d(np.arange(tensor.size(dim)), positions, assume_unique=True)
            zeroed.index_fill_(dim, torch.from_numpy(gone).to(tensor.device), 0)
        return zeroed

    full = copy_with_tensors(model, dict.fromkeys(kept, masked))
    # Norms of the cut model see only the kept channels, so those of the reference must as well.
    full = compute_over_kept_channels_(full, graph, architecture.by_name)
    if architecture.removed_blocks:
        zero_branches_(full, (graph.blocks_by_name[name] for name in architecture.removed_blocks))
    return full


def copy_with_tensors(
    model: nn.Module, changes: Mapping[str, Callable[[str, torch.Tensor], torch.Tensor]]
) -> nn.Module:
    """Return a copy of a model in which some tensors are replaced; tensors that modules share stay shared.

    Args:
        model: Not modified.
        changes: By name of a tensor, a function from (name, tensor) to its replacement.
    """
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            change = changes.get(name)
            if change is None:
                continue
            new = change(name, tensor.detach()).contiguous(memory_format=_memory_format(tensor))
            memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    # The copy takes what the memo holds wherever it meets a tensor, so that shared tensors stay shared.
    return copy_model(model, memo)


def _memory_format(tensor: torch.Tensor) -> torch.memory_format:
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def set_size_attributes_(model: nn.Module, sizes: Sequence[tuple[str, str, SizeItem, int]]) -> None:
    """Set ints that modules hold, given as (module, attribute, item or None, value), in place; see `SizeEdit`."""
    modules = dict(model.named_modules())
    for name, attribute, item, value in sizes:
        set_number(modules[name], attribute, item, value)


def update_declared_sizes_(model: nn.Module) -> None:
    """Set the sizes that torch's own layers declare (``out_channels``, ``num_features``) to those of their tensors."""
    for module in model.modules():
        _update_layer_sizes_(module)
        _update_norm_sizes_(module)
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            _update_recurrent_sizes_(module)


def _update_layer_sizes_(module: nn.Module) -> None:
    if isinstance(module, nn.modules.conv._ConvNd):  # pyright: ignore[reportPrivateUsage]
        # The second dimension of a grouped weight counts the channels of one group.
        first, second = module.weight.shape[:2]
        if module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = module.weight.shape
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif _is_deformable(module):
        module.out_channels, module.in_channels = module.weight.size(0), module.weight.size(1) * module.groups


def _update_norm_sizes_(module: nn.Module) -> None:
    if isinstance(module, nn.modules.batchnorm._NormBase):  # pyright: ignore[reportPrivateUsage]
        # Without affine parameters, only the statistics show the number of channels.
        vector = module.running_mean if _has_no_weight(module) else module.weight
        if vector is not None:
            module.num_features = vector.numel()
    elif isinstance(module, nn.GroupNorm) and not _has_no_weight(module):
        module.num_channels = module.weight.numel()
    elif isinstance(module, nn.LayerNorm) and not _has_no_weight(module):
        module.normalized_shape = tuple(module.weight.shape)


def _is_deformable(module: nn.Module) -> TypeGuard[Any]:
    """Return whether a module is torchvision's deformable convolution, without importing torchvision."""
    return type(module).__name__ == "DeformConv2d" and type(module).__module__.startswith("torchvision.")


def _update_recurrent_sizes_(module: nn.RNNBase | nn.RNNCellBase) -> None:
    layer = "_l0" if isinstance(module, nn.RNNBase) else ""
    of_input, of_state, of_projection = (_current(module, f"weight_{part}{layer}") for part in ("ih", "hh", "hr"))
    if of_input is not None:
        module.input_size = of_input.size(1)
    # With a projection, the state that the layer reads is narrower than its cells.
    if of_projection is not None:
        module.proj_size, module.hidden_size = of_projection.shape  # type: ignore[assignment]
    elif of_state is not None:
        module.hidden_size = of_state.size(1)
    if isinstance(module, nn.RNNBase) and of_input is not None and of_state is not None:
        # cuDNN wants the weights in one piece of memory.
        module.flatten_parameters()


def _current(module: nn.Module, name: str) -> torch.Tensor | None:
    """Return a weight of a module; None if it is quantized, or what a hook has computed from other parameters."""
    is_stored = name in dict(module.named_parameters(recurse=False))
    weight = getattr(module, name, None) if is_stored or nn.utils.parametrize.is_parametrized(module, name) else None
    return weight if isinstance(weight, torch.Tensor) else None


def _has_no_weight(module: nn.Module) -> bool:
    return getattr(module, "weight", None) is None


def prunable_parameter_fraction(graph: ChannelGraph) -> float:
    """Return the fraction of the parameters that are in tensors with at least one prunable dimension."""
    sizes = graph.sizes
    total = prunable = 0
    for name in graph.parameters:
        extents = graph.tensors[name]
        count = math.prod(extent.at(sizes) for extent in extents)
        total += count
        prunable += count if any(extent.terms for extent in extents) else 0
    return prunable / max(total, 1)
