"""`untie` gives every branch of a residual stream its own axis, so that it can be narrower than the stream.

In a sum x + f(x) the channels of f's output are those of the stream, so `trace` puts them on one axis. But a branch
that computes only some of the channels is the same sum with zeros for the rest. It can therefore keep fewer channels
than the stream and be added to those.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from secateur._arrays import IntArray
from secateur.graph._record import ForwardRun, record_execution
from secateur.graph.blocks import CONSTANT, ZERO_PRESERVING, DataFlow, ModuleCall
from secateur.graph.graph import (
    Activation,
    ChannelAxis,
    ChannelDim,
    ChannelGraph,
    Extent,
    MixingCall,
    Operation,
    Role,
    Site,
)

BRANCH = "/branch"
"""The suffix of the name of a branch axis, after the module that produces the channels."""


def untie(model: nn.Module, graph: ChannelGraph) -> ChannelGraph:
    """Return a graph in which every branch that is added to a residual stream has its own axis.

    A branch is a module that produces channels of a stream which other modules produce too, and the norms after it
    that read its output and nothing else, if the output of the last of them is used once: as an operand of a sum,
    perhaps after steps that preserve zeros (an activation, a factor for each channel, a permutation). The new axis
    has the channels of the stream, the sites of these modules, and the stream's name as its ``residual_axis``. All else
    stays on the axis of the stream: the layers that read it, norms on it, and producers that are not added (a stem).
    The channels that an architecture keeps of a branch must be a subset of those that it keeps of the stream.

    For a model without such sums, such as DenseNet, the graph is returned unchanged.

    Args:
        model: The traced model; not modified. It runs once more on the example.
        graph: Its channel graph.
    """
    seen = record_execution(model, graph.example)
    branches = tuple(_BranchFinder(model, graph, seen).branches())
    return _split_branches(graph, branches) if branches else graph


@dataclass(frozen=True, eq=False)
class _Branch:
    """A sequence of modules whose output is added to a stream.

    Attributes:
        producer: The first module, which produces the channels.
        norms: The other modules, in order.
        axes: The sites that belong to the branch, by the axis of the stream. A stream can have several axes if some of
            its channels begin later than others.
        mixings: The numbers of the calls in the branch that combine channels.
        carriers: The modules that return tensors with the channels of the branch.
    """

    producer: str
    norms: tuple[str, ...]
    axes: Mapping[str, tuple[Site, ...]]
    mixings: frozenset[int]
    carriers: frozenset[str]

    @property
    def residual_output(self) -> str:
        """The last module, whose output is added."""
        return self.norms[-1] if self.norms else self.producer


class _BranchFinder:
    def __init__(self, model: nn.Module, graph: ChannelGraph, run: ForwardRun):
        self.graph = graph
        self.flow = run.flow
        self.mixings = run.mixings
        self.times = Counter(call.module for call in run.flow.calls)
        self.users = _read_by(run.flow)
        self.sites: dict[str, list[tuple[str, Site]]] = {}
        for axis in graph.prunable:
            for site in axis.sites:
                self.sites.setdefault(site.tensor.rpartition(".")[0], []).append((axis.name, site))
        # Only weights count: the bias of a depthwise convolution has the same role, but produces no channels.
        self.makers = {
            axis.name: {
                site.tensor.rpartition(".")[0]
                for site in axis.sites
                if site.role is Role.OUTPUT and len(graph.tensors[site.tensor]) > 1
            }
            for axis in graph.prunable
        }
        self.parameters = frozenset(graph.parameters)
        shared = _find_shared(model)
        owners = [call for call in run.flow.calls if call.module in self.sites]
        # By value: the innermost module with tensors of its own that returns it.
        self.returned = {
            call.output: call
            for call in owners
            if call.begin <= call.output < call.end
            and call.items is None
            and self.times[call.module] == 1
            and call.module in graph.activations
            and call.module not in shared
            and not any(call.begin <= other.begin and other.end <= call.end for other in owners if other is not call)
        }

    def branches(self) -> Iterator[_Branch]:
        """Yield every branch, in order of the sums."""
        for step, addition in self.flow.additions.items():
            # Both operands may be branches, as in the first block of a stage, whose shortcut is a convolution.
            for value in (addition.left, addition.right):
                branch = self._find_branch(value, step)
                if branch is not None:
                    yield branch

    def _find_branch(self, value: int, addition: int) -> _Branch | None:
        row: list[ModuleCall] = []
        value, users = self._skip_zero_preserving(value, addition)
        while True:
            call = self.returned.get(value)
            if call is None or not all(user in users for user in self.users[value]):
                return None
            # Walk back from the sum, through norms, to the module that produces the channels.
            row.insert(0, call)
            if any(call.module in makers for makers in self.makers.values()):
                break
            # Only norms may follow the producer: they neither mix channels nor read anything else.
            if any(site.role is Role.INPUT for _, site in self.sites[call.module]) or not self._reads_only(call):
                return None
            value, users = call.input, range(call.begin, call.end)
        return self._build_branch(row)

    def _skip_zero_preserving(self, value: int, user: int) -> tuple[int, range]:
        """Follow an operand of a sum back through steps that preserve zeros; return the value before, and its users."""
        while value >= 0 and value not in self.returned and self.users[value] == [user]:
            name, sources = self.flow.names[value], self.flow.sources[value]
            fed = [source for source in sources if source != CONSTANT and self.flow.from_input[source]]
            if len(fed) != 1 or not (name == "mul" or (name in ZERO_PRESERVING and fed[0] == sources[0])):
                break
            value, user = fed[0], value
        return value, range(user, user + 1)

    def _reads_only(self, call: ModuleCall) -> bool:
        """Return whether a module computes its output from one value and its own tensors only."""
        known = {CONSTANT, call.input, *range(call.begin, call.end)}
        return call.input >= 0 and all(known.issuperset(self.flow.sources[s]) for s in range(call.begin, call.end))

    def _build_branch(self, row: list[ModuleCall]) -> _Branch | None:
        producer, *norms = row
        own = self.sites[producer.module]
        # A stream that only this module produces has no other width to differ from.
        axes = {axis for axis, makers in self.makers.items() if producer.module in makers and len(makers) > 1}
        silent = {axis for axis, site in self.sites[row[-1].module] if site.tensor in self.parameters}
        # The reference zeros removed channels by the parameters of the last module, so it must have some for them.
        numbers = [number for number, axis in enumerate(self.graph.axes) if axis.name in axes]
        seen = single_channel_dim(self.graph.activations[row[-1].module], numbers) is not None
        if not axes or not axes <= silent or not seen or not self._is_unambiguous(producer.module, axes):
            return None
        mine = [(axis, site) for axis, site in own if site.role is not Role.INPUT]
        mine += [pair for call in norms for pair in self.sites[call.module]]
        steps = {step for call in row for step in range(call.begin, call.end)}
        narrow = {call.output for call in row[:-1]}
        return _Branch(
            producer.module,
            tuple(call.module for call in norms),
            {name: tuple(site for axis, site in mine if axis == name) for name in sorted(axes)},
            frozenset(number for number, step in self.mixings.items() if step in steps),
            frozenset(call.module for call in self.flow.calls if call.output in narrow),
        )

    def _is_unambiguous(self, producer: str, axes: Collection[str]) -> bool:
        """Return whether the output of a producer can be told from its input, which may be on the same axis."""
        # A producer may itself read the stream that it is added to.
        roles = {site.role for axis, site in self.sites[producer] if axis in axes}
        reads = Role.INPUT in roles
        if any(e.module == producer and _has_any_axis(e.extent, axes) for e in self.graph.edits):
            return False  # For example the groups of a convolution, which depend on its input as well.
        if reads and Role.VECTOR in roles:
            return False
        counted = [
            [extent for extent in operation.extents if _has_any_axis(extent, axes)]
            for operation in self.graph.operations
            if operation.module == producer
        ]
        counted = [extents for extents in counted if extents]
        # If both factors of a product are equal, it does not matter which one is the output.
        # One extent of the axis, or two if the producer also reads the stream.
        clear = all(len(extents) == 1 + reads and len(set(extents)) == 1 for extents in counted)
        return clear and (not reads or len(counted) == 1)


def single_channel_dim(activation: Activation, axes: Collection[int]) -> ChannelDim | None:
    """Return the dimension of a module's output that carries some axes (by index); None if it is not a single one."""
    main = ChannelDim(0, activation.dim, activation.axis, activation.channel)
    channel_dims = [one for one in (main, *activation.others) if np.isin(one.axis, list(axes)).any()]
    return channel_dims[0] if len(channel_dims) == 1 else None


def _read_by(flow: DataFlow) -> list[list[int]]:
    """Return for every value the steps that read it; the number of steps stands for the caller of the model."""
    users: list[list[int]] = [[] for _ in flow.names]
    for step, sources in enumerate(flow.sources):
        for source in set(sources) - {CONSTANT}:
            users[source].append(step)
    for value in flow.returned:
        users[value].append(len(flow.names))
    return users


def _find_shared(model: nn.Module) -> set[str]:
    """Return the modules that share a tensor with another module."""
    holders: dict[int, list[str]] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        holders.setdefault(id(tensor), []).append(name.rpartition(".")[0])
    return {name for names in holders.values() if len(names) > 1 for name in names}


def _has_any_axis(extent: Extent, axes: Collection[str]) -> bool:
    return any(name in axes for name, _ in extent.terms)


def _split_branches(graph: ChannelGraph, branches: Iterable[_Branch]) -> ChannelGraph:
    """Return the graph with a separate axis for each branch and each axis of its stream."""
    taken: dict[str, int] = {}
    for branch in branches:
        graph = _split_branch(graph, branch, taken)
    return graph


def _split_branch(graph: ChannelGraph, branch: _Branch, taken: dict[str, int]) -> ChannelGraph:
    names: dict[str, str] = {}
    for stream in branch.axes:
        taken[branch.producer] = taken.get(branch.producer, 0) + 1
        number = "" if taken[branch.producer] == 1 else f"#{taken[branch.producer]}"
        names[stream] = f"{branch.producer}{BRANCH}{number}"
    # Sites compare by identity, so this moves exactly the sites of the branch.
    moved = {site for sites in branch.axes.values() for site in sites}
    channel_dims = {(site.tensor, site.dim) for site in moved}
    axes = [replace(axis, sites=tuple(s for s in axis.sites if s not in moved)) for axis in graph.axes]
    made = {
        stream: ChannelAxis(
            name,
            old.size,
            branch.axes[stream],
            old.divisor,
            residual_axis=stream,
            residual_output=branch.residual_output,
        )
        for stream, name in names.items()
        for old in (graph.by_name[stream],)
    }
    position = {axis.name: number for number, axis in enumerate(axes)}
    # Branch axes are appended, so that the indices of all other axes stay valid.
    numbers = {position[stream]: len(axes) + count for count, stream in enumerate(made)}
    row = (branch.producer, *branch.norms)
    activations = {
        name: _renumber_activation(found, numbers) if name in branch.carriers else found
        for name, found in graph.activations.items()
    }
    return replace(
        graph,
        axes=(*axes, *made.values()),
        operations=tuple(_rename_operation(o, branch, names) for o in graph.operations),
        tensors={
            name: tuple(_rename_extent(e, names) if (name, dim) in channel_dims else e for dim, e in enumerate(extents))
            for name, extents in graph.tensors.items()
        },
        edits=tuple(replace(e, extent=_rename_extent(e.extent, names)) if e.module in row else e for e in graph.edits),
        activations=activations,
        module_axes={m: (*seen, *names.values()) if m in row else seen for m, seen in graph.module_axes.items()},
        mixings=tuple(_renumber_mixing(m, numbers) if m.number in branch.mixings else m for m in graph.mixings),
    )


def _rename_extent(extent: Extent, names: Mapping[str, str]) -> Extent:
    return Extent(extent.base, tuple(sorted((names.get(name, name), times) for name, times in extent.terms)))


def _rename_operation(operation: Operation, branch: _Branch, names: Mapping[str, str]) -> Operation:
    """Rename the axis in all extents of a norm's operations, but only in the first one of the producer's."""
    if operation.module not in (branch.producer, *branch.norms):
        return operation
    extents = list(operation.extents)
    held = [number for number, extent in enumerate(extents) if _has_any_axis(extent, names)]
    # If a producer also reads the stream, its second extent is that of its input, which keeps the stream's width.
    for number in held[:1] if operation.module == branch.producer else held:
        extents[number] = _rename_extent(extents[number], names)
    return replace(operation, extents=tuple(extents))


def _renumber_activation(activation: Activation, numbers: Mapping[int, int]) -> Activation:
    others = tuple(replace(one, axis=_renumber(one.axis, numbers)) for one in activation.others)
    return replace(activation, axis=_renumber(activation.axis, numbers), others=others)


def _renumber_mixing(mixing: MixingCall, numbers: Mapping[int, int]) -> MixingCall:
    def channel_dims(found: Iterable[ChannelDim]) -> tuple[ChannelDim, ...]:
        return tuple(replace(one, axis=_renumber(one.axis, numbers)) for one in found)

    return replace(mixing, read=channel_dims(mixing.read), written=channel_dims(mixing.written))


def _renumber(axis: IntArray, numbers: Mapping[int, int]) -> IntArray:
    mapped = axis.copy()
    for old, new in numbers.items():
        mapped[axis == old] = new
    return mapped
