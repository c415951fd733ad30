"""What an architecture costs, measured and predicted, and the budget it must keep to."""

from secateur.cost.budget import Budget, Cost, Limit, amount_of, format_cost, format_count
from secateur.cost.denormals import Denormals, count_denormals, flush_denormals_
from secateur.cost.latency_model import (
    ALIGNMENTS,
    TERMS,
    LatencyModel,
    TimeGrid,
    alignment,
    layer_extents,
    timeable_operations,
)
from secateur.cost.macs import CostModel, FieldModel, count_macs, count_params, flop_counter
from secateur.cost.measure import (
    Latency,
    LatencyCache,
    LatencyRecord,
    cache_folder,
    measure,
    measure_all,
    measure_each,
    measure_files,
    measure_latency,
    measure_pairs,
)
from secateur.cost.runtimes import OnnxRuntime, Target, TorchCompiled, TorchEager
from secateur.cost.size import FileSize
from secateur.cost.timing import ConvolutionShape, LayerShape, LinearShape, Quartiles

__all__ = [
    "ALIGNMENTS",
    "TERMS",
    "Budget",
    "ConvolutionShape",
    "Cost",
    "CostModel",
    "Denormals",
    "FieldModel",
    "FileSize",
    "Latency",
    "LatencyCache",
    "LatencyModel",
    "LatencyRecord",
    "LayerShape",
    "Limit",
    "LinearShape",
    "OnnxRuntime",
    "Quartiles",
    "Target",
    "TimeGrid",
    "TorchCompiled",
    "TorchEager",
    "alignment",
    "amount_of",
    "cache_folder",
    "count_denormals",
    "count_macs",
    "count_params",
    "flop_counter",
    "flush_denormals_",
    "format_cost",
    "format_count",
    "layer_extents",
    "measure",
    "measure_all",
    "measure_each",
    "measure_files",
    "measure_latency",
    "measure_pairs",
    "timeable_operations",
]
