"""What an architecture costs, and the budget it must keep to."""

from secateur.cost._budget import Budget, Limit
from secateur.cost._cost import Cost, format_count
from secateur.cost._count import counted_macs, counted_params
from secateur.cost._model import CostModel

__all__ = ["Budget", "Cost", "CostModel", "Limit", "counted_macs", "counted_params", "format_count"]
