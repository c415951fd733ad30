"""Training: one plain loop on Lightning Fabric, with exact resume; the best epoch is chosen on validation images."""

from secateur.train._batches import Batches, TrainingData
from secateur.train._evaluate import Accuracy, evaluate
from secateur.train._fit import distill, fit
from secateur.train._machine import Precision, best_precision, open_fabric, seeded
from secateur.train._progress import Meter, Progress, Silent, TerminalProgress
from secateur.train._record import EpochRecord, Trained
from secateur.train._schedule import SGD, AdamW, Schedule
from secateur.train._state import average_decay
from secateur.train._tensorboard import TensorBoard

__all__ = [
    "SGD",
    "Accuracy",
    "AdamW",
    "Batches",
    "EpochRecord",
    "Meter",
    "Precision",
    "Progress",
    "Schedule",
    "Silent",
    "TensorBoard",
    "TerminalProgress",
    "Trained",
    "TrainingData",
    "average_decay",
    "best_precision",
    "distill",
    "evaluate",
    "fit",
    "open_fabric",
    "seeded",
]
