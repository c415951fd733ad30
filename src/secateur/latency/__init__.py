"""Latency: how long a forward pass takes on a target, measured; and what it would take at other widths, predicted."""

from secateur.latency._cache import Cache, cache_folder
from secateur.latency._clock import Clock
from secateur.latency._layers import ConvolutionShape, LayerShape, LinearShape
from secateur.latency._measure import (
    Latency,
    LatencyRecord,
    measure,
    measure_all,
    measure_each,
    measure_files,
    measure_latency,
    measure_pairs,
)
from secateur.latency._predict import LatencyFit, fit_latency
from secateur.latency._targets import OnnxRuntime, Target, TorchCompiled, TorchEager
from secateur.latency._turns import Quartiles

__all__ = [
    "Cache",
    "Clock",
    "ConvolutionShape",
    "Latency",
    "LatencyFit",
    "LatencyRecord",
    "LayerShape",
    "LinearShape",
    "OnnxRuntime",
    "Quartiles",
    "Target",
    "TorchCompiled",
    "TorchEager",
    "cache_folder",
    "fit_latency",
    "measure",
    "measure_all",
    "measure_each",
    "measure_files",
    "measure_latency",
    "measure_pairs",
]
