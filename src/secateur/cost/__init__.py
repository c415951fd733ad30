"""What an architecture costs, measured and predicted, and the budget it must keep to."""

from secateur.cost.budget import Budget, Cost, Limit, amount_of, format_cost, format_count
from secateur.cost.latency_model import ALIGNMENTS, TERMS, LatencyModel, TimeGrid, alignment, ends_of, timeable
from secateur.cost.macs import CostModel, Modeled, counted_macs, counted_params
from secateur.cost.measure import (
    Cache,
    Latency,
    LatencyRecord,
    cache_folder,
    measure,
    measure_all,
    measure_each,
    measure_files,
    measure_latency,
    measure_pairs,
)
from secateur.cost.size import FileSize
from secateur.cost.targets import OnnxRuntime, Target, TorchCompiled, TorchEager
from secateur.cost.timing import ConvolutionShape, LayerShape, LinearShape, Quartiles

__all__ = [
    "ALIGNMENTS",
    "TERMS",
    "Budget",
    "Cache",
    "ConvolutionShape",
    "Cost",
    "CostModel",
    "FileSize",
    "Latency",
    "LatencyModel",
    "LatencyRecord",
    "LayerShape",
    "Limit",
    "LinearShape",
    "Modeled",
    "OnnxRuntime",
    "Quartiles",
    "Target",
    "TimeGrid",
    "TorchCompiled",
    "TorchEager",
    "alignment",
    "amount_of",
    "cache_folder",
    "counted_macs",
    "counted_params",
    "ends_of",
    "format_cost",
    "format_count",
    "measure",
    "measure_all",
    "measure_each",
    "measure_files",
    "measure_latency",
    "measure_pairs",
    "timeable",
]
