"""Branches that are narrower than their residual stream, and how their output is expanded to its channels.

A branch axis (see `graph.untie`) may keep fewer channels than its residual axis. In the cut model, the last module of
such a branch is wrapped in `ExpandChannels`, which inserts zeros for the channels that the branch does not compute.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur._arrays import IntArray
from secateur.architecture import Architecture
from secateur.errors import SurgeryError
from secateur.graph.graph import ChannelAxis, ChannelGraph
from secateur.graph.untie import single_channel_dim


class ExpandChannels(nn.Module):
    """A wrapper that expands the output of a module to the channels of the residual stream that it is added to.

    ``missing`` zero channels are appended; then, unless ``order`` is empty, channel i of the result is channel order[i]
    of those. If the branch has the first channels of the stream, padding is enough.

    Args:
        inner: The module with fewer channels; returns a tensor.
        dim: The dimension that carries channels.
        missing: The number of zero channels to append.
        order: The source of each channel of the stream; empty if they are in order already.
    """

    def __init__(self, inner: nn.Module, dim: int, missing: int, order: Sequence[int] = ()):
        super().__init__()
        self.inner = inner
        self.dim = dim
        self.missing = missing
        index = torch.tensor(order) if order else None
        # Not in the state dict, because it is part of the architecture, and not learned.
        self.register_buffer("index", index, persistent=False)

    @property
    def order(self) -> tuple[int, ...]:
        """The ``order`` that it was made with."""
        index: Any = self.index
        return () if index is None else tuple(index.tolist())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the output of ``inner`` with the channels of the stream."""
        out: Tensor = self.inner(*args, **kwargs)
        # `pad` takes pairs from the last dimension on, up to the one with the channels.
        out = F.pad(out, (0, 0) * (out.dim() - 1 - self.dim) + (0, self.missing))
        return out if self.index is None else out.index_select(self.dim, self.index)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Return the configuration as text."""
        return f"dim={self.dim}, missing={self.missing}" + (f", order={self.order}" if self.order else "")


@dataclass(frozen=True)
class ChannelExpansion:
    """A module with fewer channels than the stream that it is added to, and how to expand it; see `ExpandChannels`.

    Attributes:
        module: The qualified name of the module.
        dim: The dimension of its output that carries channels.
        missing: The number of zero channels to append.
        order: The source of each channel of the stream; empty if they are in order already.
    """

    module: str
    dim: int
    missing: int
    order: tuple[int, ...] = ()


def check_branches(graph: ChannelGraph, architecture: Architecture) -> None:
    """Refuse branches that keep channels which their residual axis does not keep.

    Raises:
        SurgeryError: If there is such a branch outside of the removed blocks.
    """
    kept = architecture.by_name
    for axis in _branch_axes(graph, architecture):
        stream = str(axis.residual_axis)
        more = set(_kept_channels(graph, axis.name, kept)).difference(_kept_channels(graph, stream, kept))
        if more:
            raise SurgeryError(
                f"`architecture` must keep in {axis.name!r} only channels that it keeps in its residual axis "
                f"{stream!r}; got {sorted(more)[:5]} besides. Remove these from {axis.name!r} too "
                f"(`restrict_branches` does), or keep them in {stream!r}."
            )


def restrict_branches(graph: ChannelGraph, architecture: Architecture) -> Architecture:
    """Return the architecture in which every branch keeps only channels that its residual axis keeps.

    This is for searches that choose the channels of every axis independently; the cost does not increase. A branch
    without any such channel keeps the first channel of its residual axis.
    """
    kept = dict(architecture.by_name)
    for axis in graph.axes:
        if axis.residual_axis is not None:
            stream = kept.get(axis.residual_axis, range(graph.by_name[axis.residual_axis].size))
            own = set(_kept_channels(graph, axis.name, kept))
            # An axis must keep at least one channel, even if its stream and its own choice have none in common.
            kept[axis.name] = tuple(channel for channel in stream if channel in own) or (stream[0],)
    return Architecture.of(kept, architecture.removed_blocks)


def branch_expansions(graph: ChannelGraph, architecture: Architecture) -> tuple[ChannelExpansion, ...]:
    """Return the expansions of the branches that an architecture makes narrower than their residual axis."""
    expanded: dict[str, dict[int, int]] = {}
    position = {axis.name: number for number, axis in enumerate(graph.axes)}
    for axis in _branch_axes(graph, architecture):
        expanded.setdefault(axis.residual_output, {})[position[str(axis.residual_axis)]] = position[axis.name]
    alive = graph.kept_masks(architecture.by_name)
    found: list[ChannelExpansion] = []
    for module, branches in expanded.items():
        # In the graph, the output of this module has the channels of the stream, as it has after the expansion.
        stream = single_channel_dim(graph.activations[module], branches)
        assert stream is not None, "untie takes no branch whose channels run along two dimensions"
        whole = np.ones(len(stream.axis), dtype=bool)
        there, mine = whole.copy(), whole.copy()
        # A stream can consist of several axes; each has its own branch axis, or none.
        for number in set(stream.axis.tolist()):
            here = stream.axis == number
            for mask, axis in ((there, number), (mine, branches.get(number, number))):
                if axis in alive:
                    mask[here] = alive[axis][stream.channel[here]]
        if (there != mine).any():
            found.append(_make_expansion(module, stream.dim, np.flatnonzero(mine[there]), int(there.sum())))
    return tuple(found)


def _make_expansion(module: str, dim: int, places: IntArray, channels: int) -> ChannelExpansion:
    """Return the expansion of a module whose channels are at these places among those of the stream."""
    own = np.arange(len(places))
    if (places == own).all():
        return ChannelExpansion(module, dim, channels - len(places))
    # Position len(places) is the one appended zero channel, which serves all missing channels.
    order = np.full(channels, len(places))
    order[places] = own
    return ChannelExpansion(module, dim, 1, tuple(order.tolist()))


def expand_branches_(model: nn.Module, widenings: Iterable[ChannelExpansion]) -> None:
    """Wrap modules in `ExpandChannels`, in place.

    Raises:
        SurgeryError: If the model lacks one of the modules.
    """
    for widening in widenings:
        path, _, leaf = widening.module.rpartition(".")
        try:
            inner = model.get_submodule(widening.module)
        except AttributeError as error:
            raise SurgeryError(f"`widenings` must name modules of the model; got {widening.module!r}.") from error
        if inner is model:
            raise SurgeryError("`widenings` must name modules within the model; got the model itself.")
        wide = ExpandChannels(inner, widening.dim, widening.missing, widening.order)
        # The order of the channels must lie where the module computes.
        device = next((t.device for t in (*inner.parameters(), *inner.buffers())), None)
        setattr(model.get_submodule(path), leaf, wide.to(device).train(inner.training))


def find_expansions(model: nn.Module) -> tuple[ChannelExpansion, ...]:
    """Return the expansions that a cut model contains, from which `expand_branches_` can make them again."""
    return tuple(
        ChannelExpansion(name, module.dim, module.missing, module.order)
        for name, module in model.named_modules()
        if isinstance(module, ExpandChannels)
    )


def original_names(small: nn.Module) -> dict[str, str]:
    """Return the name in the original of every module of a cut model, by its name; `ExpandChannels` has none."""
    names: dict[str, str] = {}
    inner = "?"
    for name, module in small.named_modules():
        if isinstance(module, ExpandChannels):
            inner = f"{name}.inner"  # `named_modules` visits the inside of a module right after it.
        elif name == inner or name.startswith(f"{inner}."):
            names[name] = inner.removesuffix(".inner") + name[len(inner) :]
        else:
            names[name] = name
    return names


def original_module(model: nn.Module, name: str) -> nn.Module:
    """Return a module of a cut model by its name in the original: the one inside of `ExpandChannels`, if wrapped."""
    module = model.get_submodule(name)
    return module.inner if isinstance(module, ExpandChannels) else module


def _branch_axes(graph: ChannelGraph, architecture: Architecture) -> tuple[ChannelAxis, ...]:
    gone = graph.removed_modules(architecture.removed_blocks)
    return tuple(axis for axis in graph.axes if axis.residual_axis is not None and not gone(axis.residual_output))


def _kept_channels(graph: ChannelGraph, name: str, kept: Mapping[str, tuple[int, ...]]) -> Iterable[int]:
    return kept.get(name, range(graph.by_name[name].size))
