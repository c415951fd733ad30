"""What an architecture costs, and the budget it must keep to."""

from secateur.cost._budget import Budget, Limit, amount_of
from secateur.cost._cost import Cost, format_cost, format_count
from secateur.cost._count import counted_macs, counted_params, flop_counter
from secateur.cost._grid import ALIGNMENTS, TimeGrid, alignment
from secateur.cost._latency import TERMS, LatencyModel, ends_of, timeable
from secateur.cost._model import CostModel, Modelled
from secateur.cost._size import FileSize

__all__ = [
    "ALIGNMENTS",
    "TERMS",
    "Budget",
    "Cost",
    "CostModel",
    "FileSize",
    "LatencyModel",
    "Limit",
    "Modelled",
    "TimeGrid",
    "alignment",
    "amount_of",
    "counted_macs",
    "counted_params",
    "ends_of",
    "flop_counter",
    "format_cost",
    "format_count",
    "timeable",
]
