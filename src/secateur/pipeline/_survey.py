"""What could be cut from a model, before anything is."""

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from secateur.cost import Cost, CostModel
from secateur.graph import ChannelGraph, trace
from secateur.pipeline._plan import SPACE
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
    """

    graph: ChannelGraph
    original: Cost
    smallest: Cost
    prunable_share: float

    @property
    def frozen(self) -> dict[str, list[str]]:
        """Names of frozen axes by the reason."""
        found: dict[str, list[str]] = {}
        for axis in self.graph.axes:
            if axis.frozen_because is not None:
                found.setdefault(axis.frozen_because, []).append(axis.name)
        return found


def survey(model: nn.Module, example: Tensor, *, space: SearchSpace = SPACE) -> Survey:
    """Trace a model and find the range of costs that a budget can ask for.

    Args:
        model: Any; not changed.
        example: One input or a batch of it.
        space: Which widths are allowed.

    Raises:
        TraceError: If the model cannot run the example.
    """
    graph = trace(model, example)
    costs = CostModel(graph)
    least = np.array([[levels[0] for levels in space.levels(graph)]], dtype=np.int64).reshape(1, -1)
    macs, params = costs.of_widths(least)
    smallest = Cost(int(macs[0]), int(params[0]))
    share = parameter_share(graph)
    assert math.isfinite(share)
    return Survey(graph, costs.original, smallest, share)
