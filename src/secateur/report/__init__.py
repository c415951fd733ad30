"""Reports: one run as one page that needs nothing else."""

from secateur.report._drawing import check_drawing, write_drawing
from secateur.report._efficiency import performance_efficiency
from secateur.report._page import Page, PageTable, write_page
from secateur.report._places import Place, inside, places, sentence_of, sizes_in_order
from secateur.report._report import write_report
from secateur.report._run import (
    BlockFate,
    Check,
    ExportedFile,
    FrozenAxis,
    JudgedStage,
    LayerWidth,
    Measured,
    MeasuredAccuracy,
    MeasuredLatency,
    RunReport,
    SearchedDepth,
    SearchedWidth,
    SearchEpoch,
    Step,
    TrainedEpoch,
)

__all__ = [
    "BlockFate",
    "Check",
    "ExportedFile",
    "FrozenAxis",
    "JudgedStage",
    "LayerWidth",
    "Measured",
    "MeasuredAccuracy",
    "MeasuredLatency",
    "Page",
    "PageTable",
    "Place",
    "RunReport",
    "SearchEpoch",
    "SearchedDepth",
    "SearchedWidth",
    "Step",
    "TrainedEpoch",
    "check_drawing",
    "inside",
    "performance_efficiency",
    "places",
    "sentence_of",
    "sizes_in_order",
    "write_drawing",
    "write_page",
    "write_report",
]
