"""What could be cut from a model, before anything is."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from secateur.cost import Cost, CostModel
from secateur.graph import ChannelGraph, Choices, trace
from secateur.pipeline._plan import EVERYTHING, SPACE
from secateur.search import SearchSpace
from secateur.surgery import parameter_share


@dataclass(frozen=True, eq=False)
class Survey:
    """What a model offers to the shears.

    Attributes:
        graph: Its channel graph.
        original: Cost of the whole model.
        smallest: Cost of the smallest architecture of the space: the lower end of what a budget can ask for.
        prunable_share: Fraction of the parameters that lies in tensors with at least one prunable dimension.
        prunable_macs_share: Fraction of the MACs of operations that have at least one prunable dimension.
    """

    graph: ChannelGraph
    original: Cost
    smallest: Cost
    prunable_share: float
    prunable_macs_share: float

    @property
    def frozen(self) -> dict[str, list[str]]:
        """Names of frozen axes by the reason."""
        found: dict[str, list[str]] = {}
        for axis in self.graph.axes:
            if axis.frozen_because is not None:
                found.setdefault(axis.frozen_because, []).append(axis.name)
        return found


def survey(model: nn.Module, example: Tensor, *, choices: Choices = EVERYTHING, space: SearchSpace = SPACE) -> Survey:
    """Trace a model and find the range of costs that a budget can ask for.

    Args:
        model: Any; not changed.
        example: One input or a batch of it.
        choices: Which layers may be cut at all, by name patterns.
        space: Which widths are allowed, in general and for some axes.

    Raises:
        TraceError: If the model cannot run the example.
        ChoiceError: If a pattern matches nothing, or nothing is left to cut.
    """
    graph = choices.apply(trace(model, example))
    costs = CostModel(graph)
    least = np.array([[levels[0] for levels in space.levels(graph)]], dtype=np.int64).reshape(1, -1)
    macs, params = costs.of_widths(least)
    smallest = Cost(int(macs[0]), int(params[0]))
    share = parameter_share(graph)
    assert math.isfinite(share)
    return Survey(graph, costs.original, smallest, share, _macs_share(graph))


def _macs_share(graph: ChannelGraph) -> float:
    sizes = graph.sizes
    macs = [op.factor * math.prod(extent.at(sizes) for extent in op.extents) for op in graph.operations]
    prunable = [any(extent.terms for extent in op.extents) for op in graph.operations]
    return sum(itertools.compress(macs, prunable)) / max(sum(macs), 1.0)
