"""The layers of a traced model: what each costs, and which axes it makes, carries and reads."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from secateur.graph import Block, ChannelAxis, ChannelGraph, Role


@dataclass(frozen=True)
class Place:
    """One module that holds weights or runs multiply-accumulates itself, not through its children.

    Attributes:
        module: Its qualified name; "" is the model itself.
        params: Parameters of its own; a shared one counts where it is named first.
        macs: Multiply-accumulates of its own at batch 1.
        makes: Names of the axes of its outputs, in order of first appearance.
        carries: Names of the axes that it scales or shifts channel by channel (norms, depthwise convolutions).
        reads: Names of the axes of its inputs.
        channels_out: Length of the dimension that ``makes`` or ``carries`` lie on, or None if there is none.
        channels_in: The same for ``reads``.
    """

    module: str
    params: int
    macs: int
    makes: tuple[str, ...] = ()
    carries: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    channels_out: int | None = None
    channels_in: int | None = None

    @property
    def axes(self) -> tuple[str, ...]:
        """Every axis here, once: those of the outputs first."""
        return tuple(dict.fromkeys((*self.makes, *self.carries, *self.reads)))


def places(graph: ChannelGraph) -> tuple[Place, ...]:
    """The layers of a graph in order of execution.

    The sum of their ``params`` and ``macs`` is the cost of the whole model.
    """
    sizes = graph.sizes
    shapes = {name: tuple(extent.at(sizes) for extent in extents) for name, extents in graph.tensors.items()}
    params: dict[str, int] = {}
    for name in graph.parameters:
        params[_owner(name)] = params.get(_owner(name), 0) + math.prod(shapes[name])
    macs: dict[str, float] = {}
    for operation in graph.operations:
        here = operation.factor * math.prod(extent.at(sizes) for extent in operation.extents)
        macs[operation.module] = macs.get(operation.module, 0.0) + here
    roles = _roles(graph)
    lengths: dict[tuple[str, Role], int] = {}
    for axis in graph.axes:
        for site in axis.sites:
            lengths.setdefault((_owner(site.tensor), site.role), shapes[site.tensor][site.dim])
    found: list[Place] = []
    for module in _in_order(graph, dict.fromkeys((*map(_owner, graph.tensors), *params, *macs))):
        makes, reads, carries = (
            tuple(roles.get((module, role), ())) for role in (Role.OUTPUT, Role.INPUT, Role.VECTOR)
        )
        out = lengths.get((module, Role.OUTPUT), lengths.get((module, Role.VECTOR)))
        into = lengths.get((module, Role.INPUT))
        found.append(
            Place(module, params.get(module, 0), round(macs.get(module, 0.0)), makes, carries, reads, out, into)
        )
    return tuple(place for place in found if place.params or place.macs or place.axes)


def sizes_in_order(graph: ChannelGraph) -> dict[str, int]:
    """Full width of each prunable axis, in order of the first layer that has it.

    An untied branch stands where it is computed; the graph itself names branches after everything else.
    """
    met = dict.fromkeys(axis for place in places(graph) for axis in (*place.reads, *place.axes))
    return {axis: graph.sizes[axis] for axis in dict.fromkeys((*met, *graph.sizes)) if axis in graph.sizes}


def inside(block: Block, layers: Iterable[Place]) -> tuple[Place, ...]:
    """The layers that go with a block."""
    return tuple(place for place in layers if block.replaces(place.module))


def sentence_of(axis: ChannelAxis) -> str:
    """Why a frozen axis stays whole: ``Stays whole: reaches the model's output``."""
    return f"Stays whole: {(axis.frozen_because or '').removeprefix('kept whole: ')}"


def _roles(graph: ChannelGraph) -> Mapping[tuple[str, Role], dict[str, None]]:
    """Names of the axes by module and role, in order."""
    found: dict[tuple[str, Role], dict[str, None]] = {}
    for axis in graph.axes:
        for site in axis.sites:
            found.setdefault((_owner(site.tensor), site.role), {})[axis.name] = None
    return found


def _in_order(graph: ChannelGraph, modules: Iterable[str]) -> list[str]:
    """Modules in order of their first operation; one that ran none stands behind the one before it in the state."""
    ran = {name: number for number, name in enumerate(dict.fromkeys((*graph.touching, *graph.activations)))}
    place, keyed = -1, list[tuple[int, int, str]]()
    for number, name in enumerate(modules):
        place = ran.get(name, place)
        keyed.append((place, number, name))
    return [name for *_, name in sorted(keyed)]


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]
