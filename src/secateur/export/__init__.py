"""Export: files for other runtimes, each run and compared with the model, and the time they take."""

from secateur.export._latency import LatencyRecord, Quartiles, measure_latency
from secateur.export._onnx import export_onnx
from secateur.export._parity import TOLERANCE, Parity
from secateur.export._pt2 import export_pt2
from secateur.export._recheck import compare_file

__all__ = [
    "TOLERANCE",
    "LatencyRecord",
    "Parity",
    "Quartiles",
    "compare_file",
    "export_onnx",
    "export_pt2",
    "measure_latency",
]
