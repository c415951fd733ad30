"""How much each channel matters."""

from secateur.importance._base import Evidence, Importance, checked_scores
from secateur.importance._batchnorm import BatchNormScale
from secateur.importance._filters import Filters, mean_over_producers, producers, tensors_of
from secateur.importance._reconstruction import Reconstruction
from secateur.importance._showing import channel_positions, readers, shown_along
from secateur.importance._taylor import Taylor
from secateur.importance._weights import L1, L2, LAMP, GeometricMedian, RandomImportance

__all__ = [
    "L1",
    "L2",
    "LAMP",
    "BatchNormScale",
    "Evidence",
    "Filters",
    "GeometricMedian",
    "Importance",
    "RandomImportance",
    "Reconstruction",
    "Taylor",
    "channel_positions",
    "checked_scores",
    "mean_over_producers",
    "producers",
    "readers",
    "shown_along",
    "tensors_of",
]
