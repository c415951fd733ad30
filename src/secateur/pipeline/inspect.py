"""Report what can be cut from a model, without cutting anything."""

import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from secateur._caller_state import in_default_state
from secateur.cost.budget import Cost, format_cost
from secateur.cost.denormals import Denormals, count_denormals
from secateur.cost.macs import CostModel
from secateur.graph.graph import ChannelAxis, ChannelGraph
from secateur.graph.stages import Stage, find_stages
from secateur.graph.trace import Example
from secateur.pipeline.config import CutConfig
from secateur.prune.slice import prunable_parameter_fraction
from secateur.report.graph_layers import list_layers
from secateur.search.base import data_frame
from secateur.search.space import SearchSpace

_MOST_SHOWN = 14
"""Axes in a printed report."""


@dataclass(frozen=True, eq=False, repr=False)
class ModelReport:
    """What can be cut from a model, and the range of costs that a budget can ask for.

    Attributes:
        graph: Its channel graph.
        original: Cost of the whole model.
        smallest: Cost of the smallest widths of the space: the lower end of what a budget can ask for.
        shallowest: The same without all blocks that may be removed; only `RemoveBlocks` goes there.
        prunable_share: Fraction of the parameters that lies in tensors with at least one prunable dimension.
        prunable_macs_share: Fraction of the MACs of operations that have at least one prunable dimension.
        space: Which widths are allowed.
        stages: The parts of the model that hand on a single tensor, see `secateur.graph.find_stages`.
        denormals: Numbers among its weights that are so small that they make it slow.
    """

    graph: ChannelGraph
    original: Cost
    smallest: Cost
    shallowest: Cost
    prunable_share: float
    prunable_macs_share: float
    space: SearchSpace
    stages: tuple[Stage, ...]
    denormals: Denormals = Denormals({}, 0)  # noqa: RUF009 - frozen

    def __repr__(self) -> str:
        title, *axes = repr(self.graph).splitlines()
        costs = [
            f"  {field}: {format_cost(field, getattr(self.smallest, field))} to {format_cost(field, value)}"
            for field, value in self.original.to_json().items()
        ]
        more = ["  ..."] if len(axes) > _MOST_SHOWN else []
        more += [f"  {self.graph.uncounted_text}"] if self.graph.uncounted else []
        return "\n".join((title.replace("ChannelGraph", "ModelReport"), *costs, *axes[:_MOST_SHOWN], *more))

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with one row per axis, as `to_json` has them, without their sites.

        Raises:
            ImportError: If pandas is not installed.
        """
        rows = [self._axis_json(axis) for axis in self.graph.axes]
        names = ("name", "size", "smallest_width", "width_step", "frozen_because")
        return data_frame({name: [row[name] for row in rows] for name in names})

    @property
    def frozen(self) -> dict[str, list[str]]:
        """Names of frozen axes by the reason."""
        found: dict[str, list[str]] = {}
        for axis in self.graph.axes:
            if axis.frozen_because is not None:
                found.setdefault(axis.frozen_because, []).append(axis.name)
        return found

    def to_json(self) -> dict[str, object]:
        """Costs, shares, axes with their sites, blocks; stages and layers in order of execution. A JSON object."""
        return {
            "original": self.original.to_json(),
            "smallest": self.smallest.to_json(),
            "shallowest": self.shallowest.to_json(),
            "prunable_share": {"params": self.prunable_share, "macs": self.prunable_macs_share},
            "axes": [self._axis_json(axis) for axis in self.graph.axes],
            "blocks": [
                {"name": block.name, "tensors": list(block.tensors), "kept_because": block.kept_because}
                for block in self.graph.blocks
            ],
            "stages": [asdict(stage) for stage in self.stages],
            "layers": [asdict(place) for place in list_layers(self.graph)],
            "never_ran": list(self.graph.unseen),
            "denormals": self.denormals.to_json(),
            "uncounted": [asdict(operation) for operation in self.graph.uncounted],
        }

    def _axis_json(self, axis: ChannelAxis) -> dict[str, object]:
        widths = [axis.size] if axis.frozen_because is not None else self.space.widths(axis).tolist()
        return {
            "name": axis.name,
            "size": axis.size,
            "smallest_width": widths[0],
            "width_step": widths[1] - widths[0] if len(widths) > 2 else None,
            "frozen_because": axis.frozen_because,
            "sites": [{"tensor": site.tensor, "dim": site.dim, "role": site.role.value} for site in axis.sites],
        }


@in_default_state
def inspect_model(
    model: nn.Module,
    example: Example,
    *,
    cut: CutConfig = CutConfig(),  # noqa: B008 - frozen
) -> ModelReport:
    """Trace a model and find the range of costs that a budget can ask for.

    Args:
        model: Any model; not changed.
        example: One input or a batch of it.
        cut: What may be cut; only the fields about layers, attention, branches, rules and widths have an effect.

    Raises:
        TraceError: If the model cannot run the example.
        SelectionError: If a pattern matches nothing, or nothing is left to cut.
    """
    graph, space = cut.trace(model, example), cut.space
    costs = CostModel(graph)
    least = np.array([levels[0] for levels in space.levels(graph)], dtype=np.int64)
    fewer = costs.without(block.name for block in graph.removable)
    smallest, shallowest = (some.cost_of(least) for some in (costs, fewer))
    share = prunable_parameter_fraction(graph)
    assert math.isfinite(share)
    stages = find_stages(model, graph)
    denormals = count_denormals(model)
    return ModelReport(graph, costs.original, smallest, shallowest, share, _macs_share(graph), space, stages, denormals)


def _macs_share(graph: ChannelGraph) -> float:
    sizes = graph.sizes
    macs = [op.factor * math.prod(extent.at(sizes) for extent in op.extents) for op in graph.operations]
    prunable = [any(extent.terms for extent in op.extents) for op in graph.operations]
    return sum(itertools.compress(macs, prunable)) / max(sum(macs), 1.0)
