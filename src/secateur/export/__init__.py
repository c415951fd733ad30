"""Export: files for other runtimes, each run and compared with the model."""

from secateur.export._onnx import export_onnx, feed, onnx_bytes, open_session
from secateur.export._parity import TOLERANCE, Parity
from secateur.export._program import eval_copy
from secateur.export._pt2 import export_pt2
from secateur.export._recheck import compare_file

__all__ = [
    "TOLERANCE",
    "Parity",
    "compare_file",
    "eval_copy",
    "export_onnx",
    "export_pt2",
    "feed",
    "onnx_bytes",
    "open_session",
]
