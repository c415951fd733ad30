"""`untie`: let every branch of a residual stream have a width of its own.

In a sum x + f(x) the channels of f's output are those of the stream: trace ties them. But a branch that computes only
some of them is the same sum with zeros for the rest, so it may as well keep fewer channels than the stream does, and be
added into those.
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
"""Ends the name of a branch axis; what comes before it is the module that produces the channels."""


def untie(model: nn.Module, graph: ChannelGraph) -> ChannelGraph:
    """A graph in which every branch that is added to a residual stream has an axis of its own.

    A branch is a module that produces channels of a stream which other modules produce too, and the norms behind it
    that read its output and nothing else, if the output of the last of them is used once: as an operand of a sum,
    perhaps after steps that leave zeros zero (an activation, a factor for each channel, a permutation). The new axis
    has the channels of the stream, the sites of these modules, and the stream's name in `ChannelAxis.into`. All else
    stays with the stream: the layers that read it, norms on it, producers that are not added (a stem). An architecture
    keeps of a branch some of the channels that it keeps of the stream.

    A model without such sums, DenseNet for example, has the same graph as before.

    Args:
        model: The traced model; not modified. It runs once more on the example.
        graph: Its channel graph.
    """
    seen = record_execution(model, graph.example)
    branches = tuple(_BranchFinder(model, graph, seen).branches())
    return _split_branches(graph, branches) if branches else graph


@dataclass(frozen=True, eq=False)
class _Branch:
    """Modules in a row whose output is added to a stream.

    Attributes:
        producer: The first one, which produces the channels.
        norms: The others, in order.
        axes: The stream's axes with the sites that are the branch's; of one stream there may be several, where some of
            its channels begin later than others.
        mixings: Numbers of the calls that compute over channels in it.
        carriers: Modules that return what is still as narrow as the branch.
    """

    producer: str
    norms: tuple[str, ...]
    axes: Mapping[str, tuple[Site, ...]]
    mixings: frozenset[int]
    carriers: frozenset[str]

    @property
    def residual_output(self) -> str:
        """The last one, whose output is added."""
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
        # A bias may be an output's too, that of a depthwise convolution, which makes no channels.
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
        # The innermost module with tensors of its own that returns a value; calls are in order of entry.
        self.returned = {
            call.given: call
            for call in owners
            if call.begin <= call.given < call.end
            and call.items is None
            and self.times[call.module] == 1
            and call.module in graph.activations
            and call.module not in shared
            and not any(call.begin <= other.begin and other.end <= call.end for other in owners if other is not call)
        }

    def branches(self) -> Iterator[_Branch]:
        """Every branch, in order of the sums."""
        for step, addition in self.flow.additions.items():
            for value in (addition.left, addition.right):
                branch = self._branch(value, step)
                if branch is not None:
                    yield branch

    def _branch(self, value: int, addition: int) -> _Branch | None:
        row: list[ModuleCall] = []
        value, users = self._begin(value, addition)
        while True:
            call = self.returned.get(value)
            if call is None or not all(user in users for user in self.users[value]):
                return None
            row.insert(0, call)
            if any(call.module in makers for makers in self.makers.values()):
                break
            if any(site.role is Role.INPUT for _, site in self.sites[call.module]) or not self._reads_only(call):
                return None
            value, users = call.taken, range(call.begin, call.end)
        return self._made(row)

    def _begin(self, value: int, user: int) -> tuple[int, range]:
        """What a module returns that becomes the operand of a sum by steps that leave zeros zero, and who uses it."""
        while value >= 0 and value not in self.returned and self.users[value] == [user]:
            name, sources = self.flow.names[value], self.flow.sources[value]
            fed = [source for source in sources if source != CONSTANT and self.flow.fed[source]]
            if len(fed) != 1 or not (name == "mul" or (name in ZERO_PRESERVING and fed[0] == sources[0])):
                break
            value, user = fed[0], value
        return value, range(user, user + 1)

    def _reads_only(self, call: ModuleCall) -> bool:
        """Whether a module computes its output from one value, and its own tensors."""
        known = {CONSTANT, call.taken, *range(call.begin, call.end)}
        return call.taken >= 0 and all(known.issuperset(self.flow.sources[s]) for s in range(call.begin, call.end))

    def _made(self, row: list[ModuleCall]) -> _Branch | None:
        producer, *norms = row
        own = self.sites[producer.module]
        axes = {axis for axis, makers in self.makers.items() if producer.module in makers and len(makers) > 1}
        silent = {axis for axis, site in self.sites[row[-1].module] if site.tensor in self.parameters}
        # Zeros can only be put in the place of removed channels where the last module has parameters for them.
        numbers = [number for number, axis in enumerate(self.graph.axes) if axis.name in axes]
        seen = single_channel_dim(self.graph.activations[row[-1].module], numbers) is not None
        if not axes or not axes <= silent or not seen or not self._is_clear(producer.module, axes):
            return None
        mine = [(axis, site) for axis, site in own if site.role is not Role.INPUT]
        mine += [pair for call in norms for pair in self.sites[call.module]]
        steps = {step for call in row for step in range(call.begin, call.end)}
        narrow = {call.given for call in row[:-1]}
        return _Branch(
            producer.module,
            tuple(call.module for call in norms),
            {name: tuple(site for axis, site in mine if axis == name) for name in sorted(axes)},
            frozenset(number for number, step in self.mixings.items() if step in steps),
            frozenset(call.module for call in self.flow.calls if call.given in narrow),
        )

    def _is_clear(self, producer: str, axes: Collection[str]) -> bool:
        """Whether it is clear what of a producer belongs to its output, should it read the same axis."""
        roles = {site.role for axis, site in self.sites[producer] if axis in axes}
        reads = Role.INPUT in roles
        if any(e.module == producer and _has_any_axis(e.extent, axes) for e in self.graph.edits):
            return False  # the groups of a convolution, say: they follow its input as well
        if reads and Role.VECTOR in roles:
            return False
        counted = [
            [extent for extent in operation.extents if _has_any_axis(extent, axes)]
            for operation in self.graph.operations
            if operation.module == producer
        ]
        counted = [extents for extents in counted if extents]
        # Of two equal factors of a product it does not matter which is the output.
        clear = all(len(extents) == 1 + reads and len(set(extents)) == 1 for extents in counted)
        return clear and (not reads or len(counted) == 1)


def single_channel_dim(activation: Activation, axes: Collection[int]) -> ChannelDim | None:
    """The dimension of a module's output along which some axes (by number) run; None if it is not a single one."""
    main = ChannelDim(0, activation.dim, activation.axis, activation.channel)
    lanes = [lane for lane in (main, *activation.others) if np.isin(lane.axis, list(axes)).any()]
    return lanes[0] if len(lanes) == 1 else None


def _read_by(flow: DataFlow) -> list[list[int]]:
    """For every value, the steps that read it; the end for the caller."""
    users: list[list[int]] = [[] for _ in flow.names]
    for step, sources in enumerate(flow.sources):
        for source in set(sources) - {CONSTANT}:
            users[source].append(step)
    for value in flow.given:
        users[value].append(len(flow.names))
    return users


def _find_shared(model: nn.Module) -> set[str]:
    """Modules that share a tensor with another one."""
    holders: dict[int, list[str]] = {}
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in named:
        holders.setdefault(id(tensor), []).append(name.rpartition(".")[0])
    return {name for names in holders.values() if len(names) > 1 for name in names}


def _has_any_axis(extent: Extent, axes: Collection[str]) -> bool:
    return any(name in axes for name, _ in extent.terms)


def _split_branches(graph: ChannelGraph, branches: Iterable[_Branch]) -> ChannelGraph:
    """The graph with an axis of its own for each branch and each axis of its stream."""
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
    moved = {site for sites in branch.axes.values() for site in sites}
    places = {(site.tensor, site.dim) for site in moved}
    axes = [replace(axis, sites=tuple(s for s in axis.sites if s not in moved)) for axis in graph.axes]
    made = {
        stream: ChannelAxis(
            name, old.size, branch.axes[stream], old.divisor, into=stream, residual_output=branch.residual_output
        )
        for stream, name in names.items()
        for old in (graph.by_name[stream],)
    }
    position = {axis.name: number for number, axis in enumerate(axes)}
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
            name: tuple(_rename_extent(e, names) if (name, dim) in places else e for dim, e in enumerate(extents))
            for name, extents in graph.tensors.items()
        },
        edits=tuple(replace(e, extent=_rename_extent(e.extent, names)) if e.module in row else e for e in graph.edits),
        activations=activations,
        touching={m: (*seen, *names.values()) if m in row else seen for m, seen in graph.touching.items()},
        mixings=tuple(_renumber_mixing(m, numbers) if m.number in branch.mixings else m for m in graph.mixings),
    )


def _rename_extent(extent: Extent, names: Mapping[str, str]) -> Extent:
    return Extent(extent.base, tuple(sorted((names.get(name, name), times) for name, times in extent.terms)))


def _rename_operation(operation: Operation, branch: _Branch, names: Mapping[str, str]) -> Operation:
    """Every extent of a norm's operations, and the first one of the producer's that holds the axis."""
    if operation.module not in (branch.producer, *branch.norms):
        return operation
    extents = list(operation.extents)
    held = [number for number, extent in enumerate(extents) if _has_any_axis(extent, names)]
    for number in held[:1] if operation.module == branch.producer else held:
        extents[number] = _rename_extent(extents[number], names)
    return replace(operation, extents=tuple(extents))


def _renumber_activation(activation: Activation, numbers: Mapping[int, int]) -> Activation:
    others = tuple(replace(lane, axis=_renumber(lane.axis, numbers)) for lane in activation.others)
    return replace(activation, axis=_renumber(activation.axis, numbers), others=others)


def _renumber_mixing(mixing: MixingCall, numbers: Mapping[int, int]) -> MixingCall:
    def lanes(found: Iterable[ChannelDim]) -> tuple[ChannelDim, ...]:
        return tuple(replace(lane, axis=_renumber(lane.axis, numbers)) for lane in found)

    return replace(mixing, read=lanes(mixing.read), written=lanes(mixing.written))


def _renumber(axis: IntArray, numbers: Mapping[int, int]) -> IntArray:
    mapped = axis.copy()
    for old, new in numbers.items():
        mapped[axis == old] = new
    return mapped
