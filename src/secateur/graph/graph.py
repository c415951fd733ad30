"""The channel graph: which channels of which tensors must be kept or removed together.

An *axis* is a set of channels that several tensors share, a *site* is one place where it appears, and an *extent* is
the number of channels along one dimension as a linear function of the widths. Everything here is immutable data.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np

from secateur._arrays import IntArray
from secateur._outputs import tensor_shapes
from secateur._text import html_text

_MOST_SHOWN, _MOST_FROZEN_SHOWN = 12, 5
"""Axes that `repr` lists: with the two lines that count the rest and the summary at most 20 lines."""
_MOST_ROWS = 20
"""Rows of the table in notebooks."""


class Role(Enum):
    """What a dimension of a parameter does with the channels of an axis."""

    OUTPUT = "output"
    """Produces them: dim 0 of a convolution or linear weight (dim 1 if transposed), and its bias."""
    INPUT = "input"
    """Consumes them: dim 1 of a convolution or linear weight (dim 0 if transposed)."""
    VECTOR = "vector"
    """One number per channel, elementwise: norm scales and shifts, running statistics, LayerScale."""


# Compared by identity: arrays have no single truth value, and `untie` moves exactly these sites.
@dataclass(frozen=True, eq=False)
class Site:
    """One place where an axis appears.

    Attributes:
        tensor: Name of the parameter or buffer in the model's ``state_dict``.
        dim: The dimension of that tensor.
        index: (axis size, multiplicity), the positions along ``dim`` that belong to each channel. The multiplicity
            is above 1 where one channel has several positions, as after a flatten (height x width positions).
        role: What the tensor does with the channels.
    """

    tensor: str
    dim: int
    index: IntArray
    role: Role


@dataclass(frozen=True, eq=False)
class ChannelAxis:
    """A set of channels that every tensor in ``sites`` must keep or remove together.

    Attributes:
        name: Unique and stable for a model: the parameter or module that produces the channels first.
        size: Number of channels in the traced model.
        sites: Where the channels live.
        divisor: Widths of this axis must be a multiple of it (1: any).
        frozen_because: None if channels may be removed, else the reason why not, as a sentence for a user.
        residual_axis: None, or the residual axis to whose channels these are added; see `untie`. Channel i of both is
            the same channel, and this axis may keep only channels that the residual axis keeps.
        residual_output: The module whose output is added; empty without ``residual_axis``.
    """

    name: str
    size: int
    sites: tuple[Site, ...]
    divisor: int = 1
    frozen_because: str | None = None
    residual_axis: str | None = None
    residual_output: str = ""

    def __repr__(self) -> str:
        parts = [f"{self.name!r}", f"size={self.size}", f"{len(self.sites)} sites"]
        parts += [f"divisor={self.divisor}"] if self.divisor != 1 else []
        parts += [f"residual_axis={self.residual_axis!r}"] if self.residual_axis is not None else []
        parts += [f"frozen_because={self.frozen_because!r}"] if self.frozen_because is not None else []
        return f"ChannelAxis({', '.join(parts)})"


@dataclass(frozen=True)
class Extent:
    """A number of channels as a linear function of the widths: base + sum of multiplicity * width.

    Attributes:
        base: The number of channels that cannot be removed.
        terms: (axis name, multiplicity) pairs, prunable axes only, sorted by name, no duplicates.
    """

    base: int
    terms: tuple[tuple[str, int], ...] = ()

    def at(self, widths: Mapping[str, int]) -> int:
        """Return the number of channels when each axis has ``widths[name]`` channels."""
        return self.base + sum(k * widths[name] for name, k in self.terms)

    def with_whole(self, sizes: Mapping[str, int]) -> "Extent":
        """Return the extent in which these axes are constants, because they keep all their channels."""
        if not any(name in sizes for name, _ in self.terms):
            return self
        base = self.base + sum(k * sizes[name] for name, k in self.terms if name in sizes)
        return Extent(base, tuple(term for term in self.terms if term[0] not in sizes))


class StandIn(Enum):
    """The kind of module that takes the place of one that is removed with a block."""

    PASS_THROUGH = "pass_through"
    """Returns its first tensor argument."""
    SILENCE = "silence"
    """Returns zeros of the shape of its first tensor argument."""


@dataclass(frozen=True)
class Replacement:
    """A module to replace when a block is removed.

    Attributes:
        module: Qualified module name.
        stand_in: What takes its place.
        items: The length of the tuple that the module returns, the tensor first (the rest becomes None); None if it
            returns a tensor.
    """

    module: str
    stand_in: StandIn
    items: int | None = None


@dataclass(frozen=True)
class Block:
    """A residual branch f of a sum x + f(x) that can be removed as a whole.

    Without the branch, the model computes what the original computes when the output of the branch is zero.

    Attributes:
        name: Unique: the module that adds it to its input, or the largest module in it.
        addition: The number of sums before the one that adds it, in the forward pass. Counted are sums of two tensors
            of equal shape that both depend on the model's input.
        operand: The position of f(x) in that sum: 0 or 1.
        replacements: The modules that are removed, and what takes their places.
        modules: Names of all modules that run in the branch, including those that stay but no longer have an effect.
        tensors: Names of the parameters and buffers that are removed.
        kept_because: None if the block may be removed, else the reason why not, as a sentence for a user.
        follows: The block directly before it on the residual stream, whose sum, or whose returned value, is x itself.
            None where anything else computes x.
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
        """Return whether a module is removed with the block: it is replaced, or lies inside a module that is."""
        return any(module == r.module or module.startswith(r.module + ".") for r in self.replacements)


@dataclass(frozen=True)
class Operation:
    """One multiply-accumulate operation of the forward pass, for counting.

    MACs at batch 1 = factor * product of the extents. A convolution has factor = kernel positions * output
    positions (/ groups, if the number of groups is constant) and two extents: output and input channels.

    Attributes:
        module: Qualified name of the module that ran it ("" is the model itself).
        kind: ATen name, such as ``convolution`` or ``addmm``.
        factor: What the widths do not change: a rational number as a float, such that the whole product is an integer.
        extents: The channel counts to multiply.
        blocks: Names of the blocks that contain it: it runs if none of them is removed.
    """

    module: str
    kind: str
    factor: float
    extents: tuple[Extent, ...]
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True)
class UncountedOperation:
    """One operation of the forward pass that reads parameters, and of which no rule knows the multiply-accumulates.

    Attributes:
        module: Qualified name of the module that ran it ("" is the model itself).
        kind: Name of the operation with its namespace, such as ``my_lib::my_op``.
        parameters: Numbers of the parameters that it reads.
    """

    module: str
    kind: str
    parameters: int


@dataclass(frozen=True, eq=False)
class Activation:
    """The channels of one module's (first) output tensor.

    Attributes:
        module: Qualified module name.
        shape: Shape of the output at the example input.
        dim: The dimension that carries channels; of several, the one with the most channels that belong to an axis.
        axis: (shape[dim],) index into ``ChannelGraph.axes`` of the axis that each position belongs to; -1 for none.
        channel: (shape[dim],) the channel of that axis.
        others: The other dimensions that carry channels, such as the tokens of a mixer.
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
        axis: (length of the dimension,) index into ``ChannelGraph.axes`` of each position's axis; -1 for none.
        channel: (length of the dimension,) the channel of that axis.
    """

    tensor: int
    dim: int
    axis: IntArray
    channel: IntArray

    def kept(self, alive: Mapping[int, np.ndarray[Any, np.dtype[np.bool_]]]) -> IntArray:
        """Return the positions that remain, given the `ChannelGraph.kept_masks` of the axes."""
        return _kept_positions(self.axis, self.channel, alive)


@dataclass(frozen=True, eq=False)
class MixingCall:
    """One call that combines the values of several channels: a norm, a mean, a softmax.

    Attributes:
        number: The number of calls of such kinds before it in the forward pass.
        kind: Its ATen name.
        read: The channels of its input tensors.
        written: The channels of its output tensors.
    """

    number: int
    kind: str
    read: tuple[ChannelDim, ...]
    written: tuple[ChannelDim, ...]


SizeItem = int | str | tuple[int | str, ...] | None
"""Where an int is within an attribute: None for the attribute itself, a position in a sequence or in an int tensor, the
name of a dict's key or of an object's attribute, or a path of several of these."""


@dataclass(frozen=True)
class SizeEdit:
    """A Python int of a module (``groups``, a pad amount, an item of a split list) that depends on the widths.

    Attributes:
        module: Qualified module name.
        attribute: Attribute name.
        item: Where the int is within the attribute; None if the attribute itself is the int.
        extent: The value that it must have.
    """

    module: str
    attribute: str
    item: SizeItem
    extent: Extent


@dataclass(frozen=True)
class CallShapes:
    """The shapes of all tensors that one call of a module took and returned."""

    taken: tuple[tuple[int, ...], ...]
    returned: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, args: Any, kwargs: Any, out: Any) -> "CallShapes":
        """Return those of a call with these arguments and this result, as a forward hook gets them."""
        return cls((*tensor_shapes(args), *tensor_shapes(kwargs)), tensor_shapes(out))


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """All channel axes of one traced model. Immutable.

    Attributes:
        axes: Every axis, prunable and frozen, in order of first appearance.
        operations: The operations that cost multiply-accumulates.
        tensors: The extent of each dimension of every parameter and buffer.
        parameters: The names in ``tensors`` that are parameters (shared ones once).
        edits: The Python ints to change in a cut model.
        activations: Module outputs with channels, by module name, in order of execution.
        stages: Module names whose outputs are the last at their spatial resolution, in order of execution.
        module_axes: Names of the axes that the operations of each module read or write.
        example: The positional arguments the model was traced with, tensors at batch 1.
        mixings: The calls that combine channels which may be removed, in order of execution.
        unseen: Parameters that no operation used, neither in evaluation nor in training mode, such as those of a branch
            that the example did not take. They stay as they are, and may not fit a cut model that runs them after all.
        blocks: Residual branches in order of execution, removable or not.
        calls: ATen names of all calls of the forward pass, in order.
        uncounted: The operations that read parameters and are missing in ``operations``, because no rule knows their
            multiply-accumulates. Budgets and costs in MACs leave them out.
        module_calls: The shapes that every module took and returned, by its name, in the order of its calls.
    """

    axes: tuple[ChannelAxis, ...]
    operations: tuple[Operation, ...]
    tensors: Mapping[str, tuple[Extent, ...]]
    parameters: tuple[str, ...]
    edits: tuple[SizeEdit, ...]
    activations: Mapping[str, Activation]
    stages: tuple[str, ...]
    module_axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    example: tuple[Any, ...] = ()
    mixings: tuple[MixingCall, ...] = ()
    unseen: tuple[str, ...] = ()
    blocks: tuple[Block, ...] = ()
    calls: tuple[str, ...] = ()
    uncounted: tuple[UncountedOperation, ...] = ()
    module_calls: Mapping[str, tuple[CallShapes, ...]] = field(default_factory=dict[str, tuple[CallShapes, ...]])

    def __repr__(self) -> str:
        frozen = [axis for axis in self.axes if axis.frozen_because is not None]
        lines = [f"  {axis.name}: {axis.size} channels" for axis in self.prunable[:_MOST_SHOWN]]
        lines += [f"  ... and {len(self.prunable) - _MOST_SHOWN} more"] if len(self.prunable) > _MOST_SHOWN else []
        lines += [f"  {axis.name}: {axis.size} channels, {axis.frozen_because}" for axis in frozen[:_MOST_FROZEN_SHOWN]]
        if len(frozen) > _MOST_FROZEN_SHOWN:
            lines.append(f"  ... and {len(frozen) - _MOST_FROZEN_SHOWN} more frozen axes")
        return "\n".join((f"ChannelGraph({self._summary()})", *lines))

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in self._table())
        rows = zip(*(column[:_MOST_ROWS] for column in self._table().values()), strict=True)
        body = "".join(
            "<tr>" + "".join(f"<td>{'' if cell is None else html_text(str(cell))}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        more = f"<p>... and {len(self.axes) - _MOST_ROWS} more axes</p>" if len(self.axes) > _MOST_ROWS else ""
        return f"<p>ChannelGraph: {html_text(self._summary())}</p><table><tr>{head}</tr>{body}</table>{more}"

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with one row per axis: name, channels, divisor, sites and why it is frozen.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            pandas: Any = importlib.import_module("pandas")
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas, which is not installed. Run: pip install pandas") from error
        return pandas.DataFrame(self._table())

    def _summary(self) -> str:
        shape = " x ".join(map(str, self.example_shape))
        text = f"input {shape}, {len(self.prunable)} of {len(self.axes)} axes prunable"
        return f"{text}, {len(self.removable)} of {len(self.blocks)} blocks removable" if self.blocks else text

    def _table(self) -> dict[str, list[Any]]:
        """Return the columns of a table with one row per axis."""
        return {
            "axis": [axis.name for axis in self.axes],
            "channels": [axis.size for axis in self.axes],
            "divisor": [axis.divisor for axis in self.axes],
            "sites": [len(axis.sites) for axis in self.axes],
            "residual_axis": [axis.residual_axis for axis in self.axes],
            "frozen_because": [axis.frozen_because for axis in self.axes],
        }

    @property
    def uncounted_text(self) -> str:
        """A sentence about the operations in ``uncounted``; empty if there are none."""
        if not self.uncounted:
            return ""
        kinds: dict[str, list[str]] = {}
        for operation in self.uncounted:
            kinds.setdefault(operation.kind, []).append(operation.module or "the model itself")
        where = "; ".join(
            f"{kind} in {', '.join(modules[:3])}{', ...' if len(modules) > 3 else ''}"
            for kind, modules in kinds.items()
        )
        total = sum(operation.parameters for operation in self.uncounted)
        return (
            f"Not counted in the MACs: {where}, with {total:,} parameters, because no rule knows what they cost. "
            "Budgets and shares of MACs are those of the counted operations."
        )

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of the first input tensor, at batch 1."""
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
        """The longest runs of removable blocks in which each follows the one before.

        Of several blocks that follow the same one, the first to run continues its chain; the others begin new chains.
        """
        chains: list[list[Block]] = []
        for block in self.removable:
            # Blocks are in order of execution, so a chain is always extended at its end.
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
        """Return the graph in which more blocks must be kept.

        Args:
            reasons: The reason by block name. Blocks that had to be kept before keep their first reason.
        """
        return replace(
            self, blocks=tuple(replace(b, kept_because=b.kept_because or reasons.get(b.name)) for b in self.blocks)
        )

    def removed_modules(self, removed_blocks: Iterable[str]) -> Callable[[str], bool]:
        """Return a function that tells whether a module, by name, is removed together with some blocks."""
        blocks = [self.blocks_by_name[name] for name in removed_blocks]
        return lambda module: any(block.replaces(module) for block in blocks)

    def with_frozen(self, reasons: Mapping[str, str]) -> "ChannelGraph":
        """Return the graph in which more axes are frozen.

        Args:
            reasons: The reason by axis name. Axes that are frozen already keep their first reason. If a branch is
                frozen, so is the residual axis that it is added to, for the same reason.
        """
        # Removing channels of a stream removes them from its branches, which is not possible if these are frozen.
        # A reason that is given for the stream itself takes precedence.
        streams = {a.residual_axis: reasons[a.name] for a in self.axes if a.residual_axis and a.name in reasons}
        reasons = {**streams, **reasons}
        new = {name: reason for name, reason in reasons.items() if self.by_name[name].frozen_because is None}
        sizes = {name: self.by_name[name].size for name in new}

        def fixed(extent: Extent) -> Extent:
            return extent.with_whole(sizes)

        return replace(
            self,
            axes=tuple(replace(a, frozen_because=new.get(a.name, a.frozen_because)) for a in self.axes),
            operations=tuple(replace(o, extents=tuple(map(fixed, o.extents))) for o in self.operations),
            tensors={name: tuple(map(fixed, extents)) for name, extents in self.tensors.items()},
            # An edit without terms would set the int to what it is.
            edits=tuple(e for e in (replace(e, extent=fixed(e.extent)) for e in self.edits) if e.extent.terms),
        )

    def with_inexact(self, reasons: Iterable[tuple[str, str]]) -> "ChannelGraph":
        """Return the graph in which these axes and blocks stay whole, given as (name, reason) pairs."""
        whole = dict(reasons)
        blocks = {name: reason for name, reason in whole.items() if name in self.blocks_by_name}
        axes = {name: reason for name, reason in whole.items() if name in self.by_name}
        return self.with_kept_blocks(blocks).with_frozen(axes)

    def kept_positions(self, module: str, kept: Mapping[str, tuple[int, ...]]) -> IntArray:
        """Return the positions of a module's output channels that remain in a cut model, in order.

        ``original_output.index_select(dim, kept_positions)`` has the channels of the cut model's output.

        Args:
            module: A key of ``activations``.
            kept: The kept channels by axis name; an axis that is not named keeps all of them.
        """
        activation = self.activations[module]
        return _kept_positions(activation.axis, activation.channel, self.kept_masks(kept))

    def kept_masks(self, kept: Mapping[str, tuple[int, ...]]) -> dict[int, np.ndarray[Any, np.dtype[np.bool_]]]:
        """Return a mask of the kept channels, (axis size,), by index of the axis, for the axes that ``kept`` names."""
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
        # Axes that are not in the mapping keep all channels.
        if mask is not None:
            here = axis == number
            keep[here] = mask[channel[here]]
    return np.flatnonzero(keep)
