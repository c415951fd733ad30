"""Reports: one run as one page that needs nothing else."""

from secateur.report._report import write_report
from secateur.report._run import (
    Check,
    FrozenAxis,
    LayerWidth,
    Measured,
    MeasuredAccuracy,
    MeasuredLatency,
    RunReport,
    Step,
    TrainedEpoch,
)

__all__ = [
    "Check",
    "FrozenAxis",
    "LayerWidth",
    "Measured",
    "MeasuredAccuracy",
    "MeasuredLatency",
    "RunReport",
    "Step",
    "TrainedEpoch",
    "write_report",
]
