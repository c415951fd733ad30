"""What an architecture costs, and the budget it must keep to."""

from secateur.cost._budget import Budget, Limit
from secateur.cost._cost import Cost, format_count
from secateur.cost._count import counted_macs, counted_params
from secateur.cost._grid import ALIGNMENTS, TimeGrid, alignment
from secateur.cost._latency import LatencyModel, ends_of, timeable
from secateur.cost._model import CostModel

__all__ = [
    "ALIGNMENTS",
    "Budget",
    "Cost",
    "CostModel",
    "LatencyModel",
    "Limit",
    "TimeGrid",
    "alignment",
    "counted_macs",
    "counted_params",
    "ends_of",
    "format_count",
    "timeable",
]
