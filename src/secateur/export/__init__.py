"""Artifacts and exported files: each is written, run, and compared with the model."""

from secateur.export._common import (
    PARITY_TOLERANCE,
    Parity,
    Runner,
    Samples,
    as_inputs,
    check_extra,
    check_parity,
    eval_copy,
)
from secateur.export.artifact import (
    MANIFEST_NAME,
    OWN_FILES,
    WEIGHTS_NAME,
    Artifact,
    Build,
    amend,
    is_artifact,
    load_artifact,
    read_manifest,
    refuse_foreign,
    save_artifact,
    weights_bytes,
)
from secateur.export.formats import Exporter, Format, check_formats, compare_file
from secateur.export.int8 import MIN_KEPT_ACCURACY, USUAL_KEPT_ACCURACY, Quantized, compare_int8_file, export_int8
from secateur.export.manifest import SCHEMA, Edit, Manifest, Recipe, TensorRecord, edits_between
from secateur.export.onnx import export_onnx, feed, onnx_bytes, open_session, session_runner
from secateur.export.onnx_config import OnnxConfig
from secateur.export.openvino import export_openvino
from secateur.export.torch_export import export_executorch, export_pt2

__all__ = [
    "MANIFEST_NAME",
    "MIN_KEPT_ACCURACY",
    "OWN_FILES",
    "PARITY_TOLERANCE",
    "SCHEMA",
    "USUAL_KEPT_ACCURACY",
    "WEIGHTS_NAME",
    "Artifact",
    "Build",
    "Edit",
    "Exporter",
    "Format",
    "Manifest",
    "OnnxConfig",
    "Parity",
    "Quantized",
    "Recipe",
    "Runner",
    "Samples",
    "TensorRecord",
    "amend",
    "as_inputs",
    "check_extra",
    "check_formats",
    "check_parity",
    "compare_file",
    "compare_int8_file",
    "edits_between",
    "eval_copy",
    "export_executorch",
    "export_int8",
    "export_onnx",
    "export_openvino",
    "export_pt2",
    "feed",
    "is_artifact",
    "load_artifact",
    "onnx_bytes",
    "open_session",
    "read_manifest",
    "refuse_foreign",
    "save_artifact",
    "session_runner",
    "weights_bytes",
]
