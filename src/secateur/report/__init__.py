"""Reports: one run as one page that needs nothing else, and drawings of a channel graph."""

from secateur.report.comparison import ComparedRun, Comparison, Winner
from secateur.report.comparison_page import write_comparison
from secateur.report.figures import Figure, pareto_figure, report_figures
from secateur.report.graph_drawing import check_drawing, write_drawing
from secateur.report.graph_layers import (
    GraphLayer,
    axis_sizes_in_order,
    frozen_sentence,
    layers_of_block,
    list_layers,
)
from secateur.report.html import Page, PageTable, write_page, write_report
from secateur.report.run import (
    BlockFate,
    Check,
    ExportedFile,
    FlippedImage,
    FrozenAxis,
    LayerCost,
    LayerWidth,
    Measured,
    MeasuredLatency,
    RunReport,
    Step,
    TrainedEpoch,
    performance_efficiency,
)

__all__ = [
    "BlockFate",
    "Check",
    "ComparedRun",
    "Comparison",
    "ExportedFile",
    "Figure",
    "FlippedImage",
    "FrozenAxis",
    "GraphLayer",
    "LayerCost",
    "LayerWidth",
    "Measured",
    "MeasuredLatency",
    "Page",
    "PageTable",
    "RunReport",
    "Step",
    "TrainedEpoch",
    "Winner",
    "axis_sizes_in_order",
    "check_drawing",
    "frozen_sentence",
    "layers_of_block",
    "list_layers",
    "pareto_figure",
    "performance_efficiency",
    "report_figures",
    "write_comparison",
    "write_drawing",
    "write_page",
    "write_report",
]
