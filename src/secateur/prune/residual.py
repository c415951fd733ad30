"""Narrow branches of a residual stream: their channels are put at their places in it, zeros at the other places."""

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
    """Runs a module and brings its output to the width of the stream that it is added into.

    The channels get ``missing`` zero channels behind them; then, unless ``order`` is empty, channel i of the result is
    channel order[i] of that. So where the branch has the first channels of the stream a pad is all.

    Args:
        inner: The narrow module; returns a tensor.
        dim: The dimension that carries channels.
        missing: Number of zero channels behind those of ``inner``.
        order: Which of them each channel of the stream is; empty: they are in order already.
    """

    def __init__(self, inner: nn.Module, dim: int, missing: int, order: Sequence[int] = ()):
        super().__init__()
        self.inner = inner
        self.dim = dim
        self.missing = missing
        index = torch.tensor(order) if order else None
        # Not in the state dict: it says what the module is, not what it has learned.
        self.register_buffer("index", index, persistent=False)

    @property
    def order(self) -> tuple[int, ...]:
        """What it was made with."""
        index: Any = self.index
        return () if index is None else tuple(index.tolist())

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What ``inner`` returns, as wide as the stream."""
        out: Tensor = self.inner(*args, **kwargs)
        out = F.pad(out, (0, 0) * (out.dim() - 1 - self.dim) + (0, self.missing))
        return out if self.index is None else out.index_select(self.dim, self.index)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """What it adds."""
        return f"dim={self.dim}, missing={self.missing}" + (f", order={self.order}" if self.order else "")


@dataclass(frozen=True)
class ChannelExpansion:
    """A module that is narrower than the stream it is added into; see `ExpandChannels`.

    Attributes:
        module: Its qualified name.
        dim: The dimension of its output that carries channels.
        missing: Number of zero channels to put behind its own.
        order: Which of them each channel of the stream is; empty if they are in order.
    """

    module: str
    dim: int
    missing: int
    order: tuple[int, ...] = ()


def check_branches(graph: ChannelGraph, architecture: Architecture) -> None:
    """Refuse branches that keep channels which their stream has lost.

    Raises:
        SurgeryError: If there is such a branch outside of the removed blocks.
    """
    kept = architecture.by_name
    for axis in _branch_axes(graph, architecture):
        stream = str(axis.into)
        more = set(_kept_channels(graph, axis.name, kept)).difference(_kept_channels(graph, stream, kept))
        if more:
            raise SurgeryError(
                f"`architecture` must keep of {axis.name!r} some of the channels that it keeps of {stream!r}, the "
                f"stream it is added into; got {sorted(more)[:5]} besides. Remove these from {axis.name!r} too "
                f"(`restrict_branches` does), or keep them in {stream!r}."
            )


def restrict_branches(graph: ChannelGraph, architecture: Architecture) -> Architecture:
    """The same architecture in which every branch keeps only what its stream keeps; nothing it costs becomes more.

    For searches that choose the channels of every axis by itself. A branch that would keep nothing keeps the first
    channel of its stream.
    """
    kept = dict(architecture.by_name)
    for axis in graph.axes:
        if axis.into is not None:
            stream = kept.get(axis.into, range(graph.by_name[axis.into].size))
            own = set(_kept_channels(graph, axis.name, kept))
            kept[axis.name] = tuple(channel for channel in stream if channel in own) or (stream[0],)
    return Architecture.of(kept, architecture.removed_blocks)


def branch_expansions(graph: ChannelGraph, architecture: Architecture) -> tuple[ChannelExpansion, ...]:
    """The modules that an architecture makes narrower than the stream they are added into."""
    outlets: dict[str, dict[int, int]] = {}
    position = {axis.name: number for number, axis in enumerate(graph.axes)}
    for axis in _branch_axes(graph, architecture):
        outlets.setdefault(axis.residual_output, {})[position[str(axis.into)]] = position[axis.name]
    alive = graph.alive(architecture.by_name)
    found: list[ChannelExpansion] = []
    for outlet, branches in outlets.items():
        # The graph gives the output of this module the channels of the stream, which it has in the cut model again.
        stream = single_channel_dim(graph.activations[outlet], branches)
        assert stream is not None, "untie takes no branch whose channels run along two dimensions"
        whole = np.ones(len(stream.axis), dtype=bool)
        there, mine = whole.copy(), whole.copy()
        for number in set(stream.axis.tolist()):
            here = stream.axis == number
            for mask, axis in ((there, number), (mine, branches.get(number, number))):
                if axis in alive:
                    mask[here] = alive[axis][stream.channel[here]]
        if (there != mine).any():
            found.append(_make_expansion(outlet, stream.dim, np.flatnonzero(mine[there]), int(there.sum())))
    return tuple(found)


def _make_expansion(module: str, dim: int, places: IntArray, channels: int) -> ChannelExpansion:
    """The module's channels lie at these places among the stream's."""
    own = np.arange(len(places))
    if (places == own).all():
        return ChannelExpansion(module, dim, channels - len(places))
    order = np.full(channels, len(places))
    order[places] = own
    return ChannelExpansion(module, dim, 1, tuple(order.tolist()))


def expand_branches_(model: nn.Module, widenings: Iterable[ChannelExpansion]) -> None:
    """Put `ExpandChannels` around modules of a model of ours.

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
        device = next((t.device for t in (*inner.parameters(), *inner.buffers())), None)
        setattr(model.get_submodule(path), leaf, wide.to(device).train(inner.training))


def find_expansions(model: nn.Module) -> tuple[ChannelExpansion, ...]:
    """The narrow branches that a cut model holds: what `expand_branches_` needs to make it again."""
    return tuple(
        ChannelExpansion(name, module.dim, module.missing, module.order)
        for name, module in model.named_modules()
        if isinstance(module, ExpandChannels)
    )


def original_names(small: nn.Module) -> dict[str, str]:
    """For every module of a cut model the name that it has in the original, where there is no `ExpandChannels`."""
    names: dict[str, str] = {}
    inner = "?"
    for name, module in small.named_modules():
        if isinstance(module, ExpandChannels):
            inner = f"{name}.inner"  # what lies in a module follows right behind it
        elif name == inner or name.startswith(f"{inner}."):
            names[name] = inner.removesuffix(".inner") + name[len(inner) :]
        else:
            names[name] = name
    return names


def original_module(model: nn.Module, name: str) -> nn.Module:
    """A module of a cut model by its name in the original; what `ExpandChannels` was put around, not `ExpandChannels`."""
    module = model.get_submodule(name)
    return module.inner if isinstance(module, ExpandChannels) else module


def _branch_axes(graph: ChannelGraph, architecture: Architecture) -> tuple[ChannelAxis, ...]:
    gone = graph.removed_modules(architecture.removed_blocks)
    return tuple(axis for axis in graph.axes if axis.into is not None and not gone(axis.residual_output))


def _kept_channels(graph: ChannelGraph, name: str, kept: Mapping[str, tuple[int, ...]]) -> Iterable[int]:
    return kept.get(name, range(graph.by_name[name].size))
