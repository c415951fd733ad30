"""The layers of a channel graph in order of execution: what each costs, and which axes it makes, carries and reads."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from secateur.architecture import Architecture
from secateur.graph.graph import Block, ChannelAxis, ChannelGraph, Role


@dataclass(frozen=True)
class GraphLayer:
    """A module that holds weights or computes multiply-accumulates itself, not through its children.

    Attributes:
        module: Its qualified name; "" is the model itself.
        params: Number of its own parameters; a shared one counts where it is named first.
        macs: Its own multiply-accumulates at batch 1.
        makes: Names of the axes of its outputs, in order of first appearance.
        carries: Names of the axes that it scales or shifts channel by channel (norms, depthwise convolutions).
        reads: Names of the axes of its inputs.
        channels_out: Length of the dimension that ``makes`` or ``carries`` lie on, or None if there is none.
        channels_in: Length of the dimension that ``reads`` lie on, or None if there is none.
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
        """Every axis of the layer once, those of the outputs first."""
        return tuple(dict.fromkeys((*self.makes, *self.carries, *self.reads)))


def list_layers(graph: ChannelGraph) -> tuple[GraphLayer, ...]:
    """List the layers of a graph in order of execution.

    Their ``params`` and ``macs`` add up to the cost of the whole model.
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
    found: list[GraphLayer] = []
    for module in _in_order(graph, dict.fromkeys((*map(_owner, graph.tensors), *params, *macs))):
        makes, reads, carries = (
            tuple(roles.get((module, role), ())) for role in (Role.OUTPUT, Role.INPUT, Role.VECTOR)
        )
        out = lengths.get((module, Role.OUTPUT), lengths.get((module, Role.VECTOR)))
        into = lengths.get((module, Role.INPUT))
        found.append(
            GraphLayer(module, params.get(module, 0), round(macs.get(module, 0.0)), makes, carries, reads, out, into)
        )
    return tuple(layer for layer in found if layer.params or layer.macs or layer.axes)


def macs_of_layers(graph: ChannelGraph, architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Return the multiply-accumulates of each layer in the whole model and in an architecture, in order of execution.

    They add up to the cost of both. A layer of a removed block has none left.

    Args:
        graph: Of the whole model.
        architecture: What is kept; axes that it does not name are whole.
    """
    widths = {**graph.sizes, **{name: len(kept) for name, kept in architecture.kept if name in graph.sizes}}
    removed = frozenset(architecture.removed_blocks)
    left: dict[str, float] = {}
    for operation in graph.operations:
        if removed.isdisjoint(operation.blocks):
            here = operation.factor * math.prod(extent.at(widths) for extent in operation.extents)
            left[operation.module] = left.get(operation.module, 0.0) + here
    return {layer.module: (layer.macs, round(left.get(layer.module, 0.0))) for layer in list_layers(graph)}


def axis_sizes_in_order(graph: ChannelGraph) -> dict[str, int]:
    """Return the full width of each prunable axis, in order of the first layer that has it.

    An untied branch comes where it is computed; the graph itself lists branches after everything else.
    """
    met = dict.fromkeys(axis for layer in list_layers(graph) for axis in (*layer.reads, *layer.axes))
    return {axis: graph.sizes[axis] for axis in dict.fromkeys((*met, *graph.sizes)) if axis in graph.sizes}


def layers_of_block(block: Block, layers: Iterable[GraphLayer]) -> tuple[GraphLayer, ...]:
    """Return the layers that are removed with a block."""
    return tuple(layer for layer in layers if block.replaces(layer.module))


def frozen_sentence(axis: ChannelAxis) -> str:
    """Say why an axis is frozen: ``Stays whole: reaches the model's output``."""
    return f"Stays whole: {(axis.frozen_because or '').removeprefix('kept whole: ')}"


def _roles(graph: ChannelGraph) -> Mapping[tuple[str, Role], dict[str, None]]:
    """Return the names of axes by module and role, in order."""
    found: dict[tuple[str, Role], dict[str, None]] = {}
    for axis in graph.axes:
        for site in axis.sites:
            found.setdefault((_owner(site.tensor), site.role), {})[axis.name] = None
    return found


def _in_order(graph: ChannelGraph, modules: Iterable[str]) -> list[str]:
    """Sort modules by their first operation; one without any follows the one before it in the state dict."""
    ran = {name: number for number, name in enumerate(dict.fromkeys((*graph.module_axes, *graph.activations)))}
    position, keyed = -1, list[tuple[int, int, str]]()
    for number, name in enumerate(modules):
        position = ran.get(name, position)
        keyed.append((position, number, name))
    return [name for *_, name in sorted(keyed)]


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]
