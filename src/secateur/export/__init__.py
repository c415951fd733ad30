"""Export: files for other runtimes, each run and compared with the model."""

from secateur.export._executorch import export_executorch
from secateur.export._extras import check_extra
from secateur.export._int8 import export_int8
from secateur.export._onnx import export_onnx, feed, onnx_bytes, open_session
from secateur.export._openvino import export_openvino
from secateur.export._parity import TOLERANCE, Parity
from secateur.export._program import eval_copy
from secateur.export._pt2 import export_pt2
from secateur.export._quantised import LEAST_KEPT, USUAL_KEPT, Quantised, compare_int8_file
from secateur.export._recheck import compare_file

__all__ = [
    "LEAST_KEPT",
    "TOLERANCE",
    "USUAL_KEPT",
    "Parity",
    "Quantised",
    "check_extra",
    "compare_file",
    "compare_int8_file",
    "eval_copy",
    "export_executorch",
    "export_int8",
    "export_onnx",
    "export_openvino",
    "export_pt2",
    "feed",
    "onnx_bytes",
    "open_session",
]
