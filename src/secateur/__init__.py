"""Pruning shears for neural networks: a trained vision model and a budget go in, a smaller, verified one comes out.

    result = secateur.compress(model, data, budget="macs=50%", out="small")

Names are loaded when they are first used, so that ``secateur --help`` need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.architecture import Architecture as Architecture
    from secateur.cost.budget import Budget as Budget
    from secateur.cost.budget import Cost as Cost
    from secateur.cost.measure import measure as measure
    from secateur.cost.measure import measure_latency as measure_latency
    from secateur.cost.measure import measure_pairs as measure_pairs
    from secateur.cost.runtimes import OnnxRuntime as OnnxRuntime
    from secateur.cost.runtimes import TorchCompiled as TorchCompiled
    from secateur.cost.runtimes import TorchEager as TorchEager
    from secateur.data.dataset import ImageData as ImageData
    from secateur.data.load import load_data as load_data
    from secateur.distill.objective import Objective as Objective
    from secateur.distill.taps import AlignedFeatures as AlignedFeatures
    from secateur.errors import SecateurError as SecateurError
    from secateur.export.formats import Format as Format
    from secateur.export.onnx import export_onnx as export_onnx
    from secateur.export.onnx_config import OnnxConfig as OnnxConfig
    from secateur.export.torch_export import export_pt2 as export_pt2
    from secateur.graph.graph import ChannelGraph as ChannelGraph
    from secateur.graph.selection import Selection as Selection
    from secateur.graph.trace import HeadUnit as HeadUnit
    from secateur.graph.trace import trace as trace
    from secateur.models.source import ModelSource as ModelSource
    from secateur.models.source import load_model as load_model
    from secateur.nas.swp import SWP as SWP
    from secateur.nas.tas import TAS as TAS
    from secateur.pipeline.compare import Race as Race
    from secateur.pipeline.compare import compare as compare
    from secateur.pipeline.compress import compress as compress
    from secateur.pipeline.config import Branches as Branches
    from secateur.pipeline.config import CompressResult as CompressResult
    from secateur.pipeline.config import CutConfig as CutConfig
    from secateur.pipeline.config import KeepWeights as KeepWeights
    from secateur.pipeline.config import RecoveryConfig as RecoveryConfig
    from secateur.pipeline.config import Reinitialize as Reinitialize
    from secateur.pipeline.config import RunConfig as RunConfig
    from secateur.pipeline.inspect import inspect_model as inspect_model
    from secateur.pipeline.load import load as load
    from secateur.pipeline.save import save as save
    from secateur.pipeline.verify import verify as verify
    from secateur.prune.cut import cut as cut
    from secateur.prune.repair import RecalibrateBatchNorm as RecalibrateBatchNorm
    from secateur.prune.repair import Refit as Refit
    from secateur.prune.weight_pruning import WeightPruning as WeightPruning
    from secateur.search.base import search_architecture as search_architecture
    from secateur.search.candidates import Fastest as Fastest
    from secateur.search.depth import RemoveBlocks as RemoveBlocks
    from secateur.search.latency import WithinLatency as WithinLatency
    from secateur.search.pca import PCASlimming as PCASlimming
    from secateur.search.ranking import GlobalImportance as GlobalImportance
    from secateur.search.ranking import Knapsack as Knapsack
    from secateur.search.ranking import Uniform as Uniform
    from secateur.search.space import AxisRule as AxisRule
    from secateur.search.space import SearchSpace as SearchSpace
    from secateur.train.callbacks import TensorBoard as TensorBoard
    from secateur.train.config import SGD as SGD
    from secateur.train.config import AdamW as AdamW
    from secateur.train.config import TrainConfig as TrainConfig
    from secateur.train.evaluate import evaluate as evaluate
    from secateur.train.fit import train_with_teacher as train_with_teacher

__version__ = "0.2.0"

_MODULES = {
    "architecture": ("Architecture",),
    "cost.budget": (
        "Budget",
        "Cost",
    ),
    "cost.measure": (
        "measure",
        "measure_latency",
        "measure_pairs",
    ),
    "cost.runtimes": (
        "OnnxRuntime",
        "TorchCompiled",
        "TorchEager",
    ),
    "data.dataset": ("ImageData",),
    "data.load": ("load_data",),
    "distill.objective": ("Objective",),
    "distill.taps": ("AlignedFeatures",),
    "errors": ("SecateurError",),
    "export.formats": ("Format",),
    "export.onnx": ("export_onnx",),
    "export.onnx_config": ("OnnxConfig",),
    "export.torch_export": ("export_pt2",),
    "graph.graph": ("ChannelGraph",),
    "graph.selection": ("Selection",),
    "graph.trace": (
        "HeadUnit",
        "trace",
    ),
    "models.source": (
        "ModelSource",
        "load_model",
    ),
    "nas.swp": ("SWP",),
    "nas.tas": ("TAS",),
    "pipeline.compare": (
        "Race",
        "compare",
    ),
    "pipeline.compress": ("compress",),
    "pipeline.config": (
        "Branches",
        "CompressResult",
        "CutConfig",
        "KeepWeights",
        "RecoveryConfig",
        "Reinitialize",
        "RunConfig",
    ),
    "pipeline.inspect": ("inspect_model",),
    "pipeline.load": ("load",),
    "pipeline.save": ("save",),
    "pipeline.verify": ("verify",),
    "prune.cut": ("cut",),
    "prune.repair": (
        "RecalibrateBatchNorm",
        "Refit",
    ),
    "prune.weight_pruning": ("WeightPruning",),
    "search.base": ("search_architecture",),
    "search.candidates": ("Fastest",),
    "search.depth": ("RemoveBlocks",),
    "search.latency": ("WithinLatency",),
    "search.pca": ("PCASlimming",),
    "search.ranking": (
        "GlobalImportance",
        "Knapsack",
        "Uniform",
    ),
    "search.space": (
        "AxisRule",
        "SearchSpace",
    ),
    "train.callbacks": ("TensorBoard",),
    "train.config": (
        "AdamW",
        "SGD",
        "TrainConfig",
    ),
    "train.evaluate": ("evaluate",),
    "train.fit": ("train_with_teacher",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = list(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    return getattr(importlib.import_module(f"secateur.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
