"""Reports: one run as one page that needs nothing else, and drawings of a channel graph."""

from secateur.report.graph_drawing import (
    Place,
    check_drawing,
    inside,
    places,
    sentence_of,
    sizes_in_order,
    write_drawing,
)
from secateur.report.html import Page, PageTable, write_page, write_report
from secateur.report.run import (
    BlockFate,
    Check,
    ExportedFile,
    FrozenAxis,
    LayerWidth,
    Measured,
    MeasuredAccuracy,
    MeasuredLatency,
    RunReport,
    Step,
    TrainedEpoch,
    performance_efficiency,
)

__all__ = [
    "BlockFate",
    "Check",
    "ExportedFile",
    "FrozenAxis",
    "LayerWidth",
    "Measured",
    "MeasuredAccuracy",
    "MeasuredLatency",
    "Page",
    "PageTable",
    "RunReport",
    "Step",
    "TrainedEpoch",
    "WeightUse",
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
