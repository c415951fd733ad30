"""The whole way from a trained network and a budget to a verified artifact with a report."""

from secateur.pipeline.compare import Race, compare
from secateur.pipeline.compress import compress
from secateur.pipeline.config import (
    DEFAULT_OBJECTIVE,
    DEFAULT_REPAIRS,
    DEFAULT_SPACE,
    DEFAULT_STRATEGY,
    DEFAULT_TRAIN_CONFIG,
    Branches,
    CompressResult,
    CutConfig,
    KeepWeights,
    RecoveryConfig,
    Reinitialize,
    RunConfig,
    StudentInit,
    TrainResult,
    default_blocks,
)
from secateur.pipeline.demo import Demo, demo
from secateur.pipeline.distill import HintStage, ModelSpec, distill_model
from secateur.pipeline.exports import export_files
from secateur.pipeline.inspect import ModelReport, inspect_model
from secateur.pipeline.load import LoadedModel, default_size, load, load_any
from secateur.pipeline.save import save
from secateur.pipeline.train import train_model
from secateur.pipeline.verify import Verified, verify
from secateur.pipeline.workspace import OnExisting, check_model_fits_data, check_output

__all__ = [
    "DEFAULT_OBJECTIVE",
    "DEFAULT_REPAIRS",
    "DEFAULT_SPACE",
    "DEFAULT_STRATEGY",
    "DEFAULT_TRAIN_CONFIG",
    "Branches",
    "CompressResult",
    "CutConfig",
    "Demo",
    "HintStage",
    "KeepWeights",
    "LoadedModel",
    "ModelReport",
    "ModelSpec",
    "OnExisting",
    "Race",
    "RecoveryConfig",
    "Reinitialize",
    "RunConfig",
    "StudentInit",
    "TrainResult",
    "Verified",
    "check_model_fits_data",
    "check_output",
    "compare",
    "compress",
    "default_blocks",
    "default_size",
    "demo",
    "distill_model",
    "export_files",
    "inspect_model",
    "load",
    "load_any",
    "save",
    "train_model",
    "verify",
]
