"""Tasks: what a model is trained for, the loss, the metric, and how two models' outputs are compared."""

from secateur.tasks.base import (
    Drawing,
    MeanMeter,
    Meter,
    Metric,
    Score,
    Task,
    main_output,
    normalized_difference,
)
from secateur.tasks.classification import Classification, MultiLabel
from secateur.tasks.dense import ImageToImage, Regression, Segmentation
from secateur.tasks.detection import Detection, DetectorOutputs
from secateur.tasks.imitation import DistanceMeter, Imitation

__all__ = [
    "Classification",
    "Detection",
    "DetectorOutputs",
    "DistanceMeter",
    "Drawing",
    "ImageToImage",
    "Imitation",
    "MeanMeter",
    "Meter",
    "Metric",
    "MultiLabel",
    "Regression",
    "Score",
    "Segmentation",
    "Task",
    "main_output",
    "normalized_difference",
]
