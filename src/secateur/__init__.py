"""Pruning shears for neural networks: a trained vision model and a budget go in, a smaller, verified one comes out.

    result = secateur.compress(model, data, budget="macs=50%", out="small")

Names are loaded when they are first used, so that ``secateur --help`` need not wait for torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.architecture import Architecture as Architecture
    from secateur.artifact import save as save
    from secateur.cost import Budget as Budget
    from secateur.cost import Cost as Cost
    from secateur.data import ImageData as ImageData
    from secateur.data import load_data as load_data
    from secateur.distill import AlignedFeatures as AlignedFeatures
    from secateur.distill import Objective as Objective
    from secateur.errors import SecateurError as SecateurError
    from secateur.export import export_onnx as export_onnx
    from secateur.export import export_pt2 as export_pt2
    from secateur.graph import ChannelGraph as ChannelGraph
    from secateur.graph import Choices as Choices
    from secateur.graph import HeadUnit as HeadUnit
    from secateur.graph import trace as trace
    from secateur.latency import OnnxRuntime as OnnxRuntime
    from secateur.latency import TorchCompiled as TorchCompiled
    from secateur.latency import TorchEager as TorchEager
    from secateur.latency import measure as measure
    from secateur.latency import measure_latency as measure_latency
    from secateur.latency import measure_pairs as measure_pairs
    from secateur.models import ModelSource as ModelSource
    from secateur.models import load_model as load_model
    from secateur.pipeline import Branches as Branches
    from secateur.pipeline import CompressResult as CompressResult
    from secateur.pipeline import Format as Format
    from secateur.pipeline import FromScratch as FromScratch
    from secateur.pipeline import Inherit as Inherit
    from secateur.pipeline import compress as compress
    from secateur.pipeline import load as load
    from secateur.pipeline import survey as survey
    from secateur.pipeline import verify as verify
    from secateur.search import SWP as SWP
    from secateur.search import TAS as TAS
    from secateur.search import AxisRule as AxisRule
    from secateur.search import GlobalImportance as GlobalImportance
    from secateur.search import Knapsack as Knapsack
    from secateur.search import PCASlimming as PCASlimming
    from secateur.search import SearchSpace as SearchSpace
    from secateur.search import Shallower as Shallower
    from secateur.search import Uniform as Uniform
    from secateur.search import search as search
    from secateur.sparsity import WeightPruning as WeightPruning
    from secateur.surgery import RecalibrateBatchNorm as RecalibrateBatchNorm
    from secateur.surgery import Refit as Refit
    from secateur.surgery import cut as cut
    from secateur.train import SGD as SGD
    from secateur.train import AdamW as AdamW
    from secateur.train import Schedule as Schedule
    from secateur.train import TensorBoard as TensorBoard
    from secateur.train import distill as distill
    from secateur.train import evaluate as evaluate

__version__ = "0.1.0"

_HOMES = {
    "architecture": ("Architecture",),
    "artifact": ("save",),
    "cost": ("Budget", "Cost"),
    "data": ("ImageData", "load_data"),
    "distill": ("AlignedFeatures", "Objective"),
    "errors": ("SecateurError",),
    "export": ("export_onnx", "export_pt2"),
    "graph": ("ChannelGraph", "Choices", "HeadUnit", "trace"),
    "latency": ("OnnxRuntime", "TorchCompiled", "TorchEager", "measure", "measure_latency", "measure_pairs"),
    "models": ("ModelSource", "load_model"),
    "pipeline": (
        "Branches",
        "CompressResult",
        "Format",
        "FromScratch",
        "Inherit",
        "compress",
        "load",
        "survey",
        "verify",
    ),
    "search": (
        "SWP",
        "TAS",
        "AxisRule",
        "GlobalImportance",
        "Knapsack",
        "PCASlimming",
        "SearchSpace",
        "Shallower",
        "Uniform",
        "search",
    ),
    "sparsity": ("WeightPruning",),
    "surgery": ("RecalibrateBatchNorm", "Refit", "cut"),
    "train": ("SGD", "AdamW", "Schedule", "TensorBoard", "distill", "evaluate"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secateur.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Face(ModuleType):
    """The package as its users see it.

    Two verbs share their name with a room: ``secateur.search`` and ``secateur.distill``. Python binds a room to the
    package when it is first imported; here the verb keeps the name. ``from secateur.search import ...`` works as ever.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
