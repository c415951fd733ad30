"""The channel graph: which channels of which tensors must stay or go together.

Every name here is part of the public vocabulary (see docs): an *axis* is a set of channels shared by several
tensors, a *site* is one place where it appears, an *extent* is the number of channels along one dimension
written as a linear function of the widths.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np

from secateur._arrays import IntArray


class Role(Enum):
    """What a dimension of a parameter does with the channels of an axis."""

    OUTPUT = "output"
    """Produces them: dim 0 of a convolution or linear weight (dim 1 if transposed), and its bias."""
    INPUT = "input"
    """Consumes them: dim 1 of a convolution or linear weight (dim 0 if transposed)."""
    VECTOR = "vector"
    """One number per channel, elementwise: norm scales and shifts, running statistics, LayerScale."""


@dataclass(frozen=True, eq=False)
class Site:
    """One place where an axis appears.

    Attributes:
        tensor: Name of the parameter or buffer in the model's ``state_dict``.
        dim: The dimension of that tensor.
        index: (axis size, multiplicity): the positions along ``dim`` that belong to each channel. Multiplicity is
            above 1 where one channel owns several positions, as after a flatten (height x width positions).
        role: What the tensor does with the channels.
    """

    tensor: str
    dim: int
    index: IntArray
    role: Role


@dataclass(frozen=True, eq=False)
class ChannelAxis:
    """Channels that every tensor in ``sites`` must keep or lose together.

    Attributes:
        name: Unique and stable for a model: the parameter or module that produces the channels first.
        size: Number of channels in the traced model.
        sites: Where the channels live.
        divisor: Widths of this axis must be a multiple of it (1: any).
        frozen_because: None if channels may be removed, else the reason why not, as a sentence for a user.
        into: None, or the axis of the stream into whose channels these are added; see `untie`. What is kept of this
            axis is also kept of the stream: its channels are that axis' channels.
        residual_output: The module whose output is added to the stream; empty without ``into``.
    """

    name: str
    size: int
    sites: tuple[Site, ...]
    divisor: int = 1
    frozen_because: str | None = None
    into: str | None = None
    residual_output: str = ""


@dataclass(frozen=True)
class Extent:
    """A number of channels as a linear function of the widths: base + sum of multiplicity * width.

    Attributes:
        base: Channels that are always there (frozen ones).
        terms: (axis name, multiplicity) pairs, prunable axes only, sorted by name, no duplicates.
    """

    base: int
    terms: tuple[tuple[str, int], ...] = ()

    def at(self, widths: Mapping[str, int]) -> int:
        """The number of channels when each axis has ``widths[name]`` channels."""
        return self.base + sum(k * widths[name] for name, k in self.terms)

    def fixing(self, sizes: Mapping[str, int]) -> "Extent":
        """The same number where these axes are always whole."""
        if not any(name in sizes for name, _ in self.terms):
            return self
        base = self.base + sum(k * sizes[name] for name, k in self.terms if name in sizes)
        return Extent(base, tuple(term for term in self.terms if term[0] not in sizes))


class StandIn(Enum):
    """What takes the place of a module that is removed with a block."""

    PASS_THROUGH = "pass_through"
    """Returns its first tensor argument."""
    SILENCE = "silence"
    """Returns zeros of the shape of its first tensor argument."""


@dataclass(frozen=True)
class Replacement:
    """A module that a stand-in replaces when a block is removed.

    Attributes:
        module: Qualified module name.
        stand_in: What takes its place.
        items: Length of the tuple that the module returns, the tensor first (the rest becomes None); None if it
            returns a tensor.
    """

    module: str
    stand_in: StandIn
    items: int | None = None


@dataclass(frozen=True)
class Block:
    """A removable residual branch f of a sum x + f(x).

    The model without it computes what the original computes when the output of the branch is zero, for every input.

    Attributes:
        name: Unique: the module that adds it to its input, or the largest module in it.
        addition: How many sums come before the one that adds it, in the forward pass: sums of two tensors of equal
            shape that depend on the model's input.
        operand: Which operand of that sum is f(x): 0 or 1.
        replacements: The modules that go, and what takes their places.
        modules: Names of the modules that run in the branch, those that stay (without effect) too.
        tensors: Names of the parameters and buffers that go.
        kept_because: None if the block may be removed, else the reason why not, as a sentence for a user.
        follows: Name of the block directly before it on the residual stream, removable or not: its sum, or what the
            module that goes with it as a whole returns, is the very value x. None where anything else computes x.
    """

    name: str
    addition: int
    operand: int
    replacements: tuple[Replacement, ...]
    modules: tuple[str, ...]
    tensors: tuple[str, ...]
    kept_because: str | None = None
    follows: str | None = None

    def replaces(self, module: str) -> bool:
        """Whether a module goes with the block: it is replaced or lies in one that is."""
        return any(module == r.module or module.startswith(r.module + ".") for r in self.replacements)


@dataclass(frozen=True)
class Operation:
    """One multiply-accumulate operation of the forward pass, for counting.

    MACs at batch 1 = factor * product of the extents. A convolution has factor = kernel positions * output
    positions (/ groups, if the number of groups is constant) and two extents: output and input channels.

    Attributes:
        module: Qualified name of the module that ran it ("" is the model itself).
        kind: ATen name, such as ``convolution`` or ``addmm``.
        factor: Everything that widths do not change. Exact rational kept as a float; products are integers.
        extents: Channel counts multiplied together.
        blocks: Names of the blocks that it goes with: it runs if none of them is removed.
    """

    module: str
    kind: str
    factor: float
    extents: tuple[Extent, ...]
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Activation:
    """The channels of one module's (first) output tensor.

    Attributes:
        module: Qualified module name.
        shape: Shape of the output at the example input.
        dim: The dimension that carries channels; of several, the one with most that belong to an axis.
        axis: (shape[dim],) index into ``ChannelGraph.axes`` of the axis each position belongs to; -1 if none.
        channel: (shape[dim],) the channel of that axis.
        others: Further dimensions that carry channels, such as the tokens of a mixer.
    """

    module: str
    shape: tuple[int, ...]
    dim: int
    axis: IntArray
    channel: IntArray
    others: "tuple[ChannelDim, ...]" = ()


@dataclass(frozen=True, eq=False)
class ChannelDim:
    """The channels along one dimension of one tensor of a call.

    Attributes:
        tensor: Position among the tensors that the call reads, or returns.
        dim: The dimension that carries channels.
        axis: (length of the dimension,) index into ``ChannelGraph.axes`` of each position's axis; -1 if none.
        channel: (length of the dimension,) the channel of that axis.
    """

    tensor: int
    dim: int
    axis: IntArray
    channel: IntArray

    def kept(self, alive: Mapping[int, np.ndarray[Any, np.dtype[np.bool_]]]) -> IntArray:
        """Positions that remain, given which channels of which axes do; see `ChannelGraph.alive`."""
        return _kept_positions(self.axis, self.channel, alive)


@dataclass(frozen=True, eq=False)
class MixingCall:
    """One call that computes something over channels: a norm, a mean, a softmax.

    Attributes:
        number: How many calls of such kinds came before it in the forward pass.
        kind: Its ATen name.
        read: Channels of its input tensors.
        written: Channels of its output tensors.
    """

    number: int
    kind: str
    read: tuple[ChannelDim, ...]
    written: tuple[ChannelDim, ...]


@dataclass(frozen=True)
class SizeEdit:
    """A python int held by a module (``groups``, a pad amount, a split list) that must follow the widths.

    Attributes:
        module: Qualified module name.
        attribute: Attribute name.
        item: Position inside a tuple or list attribute, or None for a plain int.
        extent: The value it must have.
    """

    module: str
    attribute: str
    item: int | None
    extent: Extent


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """All channel axes of one traced model. Immutable.

    Attributes:
        axes: Every axis, prunable and frozen, in order of first appearance.
        operations: What costs multiply-accumulates.
        tensors: For every parameter and buffer: the extent of each of its dimensions.
        parameters: Names in ``tensors`` that are parameters (shared ones once).
        edits: Python ints to change in a cut model.
        activations: Module outputs with channels, by module name, in order of execution.
        stages: Module names whose outputs are the last at their spatial resolution, in order of execution.
        touching: Names of the axes seen by the operations of each module.
        example: The positional arguments the model was traced with, tensors at batch 1.
        mixings: The calls that compute over channels which may be removed, in order of execution.
        unseen: Parameters that took no part, neither in evaluation nor in training: a branch that the example did not
            take, or dead weight. They stay as they are, and may not fit a cut model that runs them after all.
        blocks: Residual branches that can be removed, and those that turned out not to be, in order of execution.
        calls: ATen names of all calls of the forward pass, in order.
    """

    axes: tuple[ChannelAxis, ...]
    operations: tuple[Operation, ...]
    tensors: Mapping[str, tuple[Extent, ...]]
    parameters: tuple[str, ...]
    edits: tuple[SizeEdit, ...]
    activations: Mapping[str, Activation]
    stages: tuple[str, ...]
    touching: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    example: tuple[Any, ...] = ()
    mixings: tuple[MixingCall, ...] = ()
    unseen: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    calls: tuple[str, ...] = ()

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of the first input tensor, batch 1."""
        return next((tuple(item.shape) for item in self.example if hasattr(item, "shape")), ())

    @cached_property
    def prunable(self) -> tuple[ChannelAxis, ...]:
        """The axes whose channels may be removed, in order."""
        return tuple(axis for axis in self.axes if axis.frozen_because is None)

    @cached_property
    def by_name(self) -> Mapping[str, ChannelAxis]:
        """Every axis by its name."""
        return {axis.name: axis for axis in self.axes}

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Full width of each prunable axis."""
        return {axis.name: axis.size for axis in self.prunable}

    @cached_property
    def removable(self) -> tuple[Block, ...]:
        """The blocks that may be removed, in order."""
        return tuple(block for block in self.blocks if block.kept_because is None)

    @cached_property
    def chains(self) -> tuple[tuple[Block, ...], ...]:
        """The longest runs of removable blocks that each follow the one before; a block that follows none begins one.

        Of several that follow the same block, the first to run goes on with its chain.
        """
        chains: list[list[Block]] = []
        for block in self.removable:
            chain = next((c for c in chains if block.follows == c[-1].name), None)
            if chain is None:
                chains.append([block])
            else:
                chain.append(block)
        return tuple(map(tuple, chains))

    @cached_property
    def blocks_by_name(self) -> Mapping[str, Block]:
        """Every block by its name."""
        return {block.name: block for block in self.blocks}

    def with_kept_blocks(self, reasons: Mapping[str, str]) -> "ChannelGraph":
        """The same graph with more blocks that have to stay.

        Args:
            reasons: Why, by block name. Blocks that had to stay before keep their first reason.
        """
        return replace(
            self, blocks=tuple(replace(b, kept_because=b.kept_because or reasons.get(b.name)) for b in self.blocks)
        )

    def removed_modules(self, removed_blocks: Iterable[str]) -> Callable[[str], bool]:
        """A test for the modules that go with some blocks: is this one replaced, or does it lie in one that is?"""
        blocks = [self.blocks_by_name[name] for name in removed_blocks]
        return lambda module: any(block.replaces(module) for block in blocks)

    def with_frozen(self, reasons: Mapping[str, str]) -> "ChannelGraph":
        """The same graph with more axes frozen.

        Args:
            reasons: Why, by axis name. Axes already frozen keep their first reason. The stream of a branch that must
                stay whole must stay whole too, for the same reason.
        """
        streams = {axis.into: reasons[axis.name] for axis in self.axes if axis.into and axis.name in reasons}
        reasons = {**streams, **reasons}
        new = {name: reason for name, reason in reasons.items() if self.by_name[name].frozen_because is None}
        sizes = {name: self.by_name[name].size for name in new}

        def fixed(extent: Extent) -> Extent:
            return extent.fixing(sizes)

        return replace(
            self,
            axes=tuple(replace(a, frozen_because=new.get(a.name, a.frozen_because)) for a in self.axes),
            operations=tuple(replace(o, extents=tuple(map(fixed, o.extents))) for o in self.operations),
            tensors={name: tuple(map(fixed, extents)) for name, extents in self.tensors.items()},
            edits=tuple(e for e in (replace(e, extent=fixed(e.extent)) for e in self.edits) if e.extent.terms),
        )

    def kept_positions(self, module: str, kept: Mapping[str, tuple[int, ...]]) -> IntArray:
        """Positions of a module's output channels that remain in a cut model, in order.

        ``original_output.index_select(dim, kept_positions)`` lies beside the cut model's output, channel by channel.

        Args:
            module: A key of ``activations``.
            kept: Kept channels by axis name; an axis that is not named is whole.
        """
        activation = self.activations[module]
        return _kept_positions(activation.axis, activation.channel, self.alive(kept))

    def alive(self, kept: Mapping[str, tuple[int, ...]]) -> dict[int, np.ndarray[Any, np.dtype[np.bool_]]]:
        """Which channels remain, by number of the axis; axes that ``kept`` does not name are whole and left out."""
        masks: dict[int, np.ndarray[Any, np.dtype[np.bool_]]] = {}
        for number, axis in enumerate(self.axes):
            if axis.name in kept:
                masks[number] = np.zeros(axis.size, dtype=bool)
                masks[number][list(kept[axis.name])] = True
        return masks


def _kept_positions(
    axis: IntArray, channel: IntArray, alive: Mapping[int, np.ndarray[Any, np.dtype[np.bool_]]]
) -> IntArray:
    keep = np.ones(axis.shape, dtype=bool)
    for number in set(axis.tolist()):
        mask = alive.get(number)
        if mask is not None:
            here = axis == number
            keep[here] = mask[channel[here]]
    return np.flatnonzero(keep)
