"""`trace`: the public verb of this room."""

import math
from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType

import numpy as np
from torch import nn

from secateur.graph._call import Rule
from secateur.graph._channels import ChannelGraph
from secateur.graph._components import components
from secateur.graph._inputs import Example, check_model, positional
from secateur.graph._ledger import BoolArray, Ledger
from secateur.graph._record import record
from secateur.graph._solve import NOT_CONSUMED, solve


class HeadUnit(Enum):
    """What is kept or removed as one in attention."""

    DIMENSION = "dimension"
    """The same dimensions of every head, where that leaves the scale of the attention as it is; else whole heads."""
    HEAD = "head"
    """Whole heads."""


def trace(
    model: nn.Module,
    example: Example,
    *,
    heads: HeadUnit = HeadUnit.DIMENSION,
    rules: Mapping[str, Rule] = MappingProxyType({}),
) -> ChannelGraph:
    """Find which channels of which tensors must be kept or removed together.

    The model runs once, in eval mode, at batch 1, while every operation is recorded (index tracing): any python
    control flow is fine because the model simply runs. What does most of its arithmetic (such as convolutions) is
    computed only if somebody reads the numbers that follow from it. The model itself is not changed: a shadow that
    shares its parameters runs in its place, and random state is put back.

    Args:
        model: A trained network.
        example: One input, a tuple of positional inputs, or a mapping of inputs by name; of a batch, the first item is
            used.
        heads: What is kept or removed as one in attention. Where fewer dimensions per head would change the scale of
            the attention (`scaled_dot_product_attention` takes it from them unless told), it is whole heads always.
        rules: What further ATen or custom operations do to channels, by their name (``relu``, ``my_lib::my_op``);
            see docs/rules.md. They go before the built-in rules.

    Returns:
        The channel graph. Channels that cannot be removed safely are in it too, with the reason.

    Raises:
        TraceError: If the model cannot run the example, or must be unwrapped, loaded or the like before.
    """
    check_model(model)
    single = positional(model, example)
    ledger, attributes = record(model, single, rules)
    by_head = _by_head(ledger, heads)
    if by_head.any():
        ledger, attributes = record(model, single, rules, by_head=by_head)
    graph = solve(ledger, attributes, single)
    if not ledger.attended or not _is_entangled(graph):
        return graph
    ledger, attributes = record(model, single, rules, by_head=_by_head(ledger, HeadUnit.HEAD))
    return max(graph, solve(ledger, attributes, single), key=_freedom)


def _by_head(ledger: Ledger, heads: HeadUnit) -> BoolArray:
    """(ids,) which belong to attention that must be cut by whole heads."""
    marked = np.zeros(ledger.count, dtype=bool)
    if not ledger.attended:
        return marked
    root = components(ledger.count, ledger.ties)
    scaled = np.zeros(ledger.count, dtype=bool)
    for ids in ledger.scaled:
        scaled[root[ids]] = True
    for module, vectors in ledger.attended.items():
        roots = root[np.concatenate(vectors)] if vectors else np.zeros(0, np.int64)
        if heads is HeadUnit.HEAD or module in ledger.scaling or scaled[roots].any():
            marked[roots] = True
    return marked[root]


def _is_entangled(graph: ChannelGraph) -> bool:
    """Whether whole heads might leave more to choose than dimensions of heads.

    So where heads are divided in one way here and in another there, which ties all channels together, and where the
    dimensions of queries and keys meet each other alone, and no layer.
    """
    tied = (axis.size == 1 and any(site.index.size > 1 for site in axis.sites) for axis in graph.axes)
    return any(tied) or any(axis.frozen_because == NOT_CONSUMED for axis in graph.axes)


def _freedom(graph: ChannelGraph) -> int:
    """Parameters in tensors with at least one prunable dimension."""
    sizes = graph.sizes
    free = (extents for extents in graph.tensors.values() if any(extent.terms for extent in extents))
    return sum(math.prod(extent.at(sizes) for extent in extents) for extents in free)
