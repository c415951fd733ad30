"""Training: one plain loop on Lightning Fabric, with exact resume; the best epoch is chosen on validation images."""

from secateur.train._batches import Batches, TrainingData
from secateur.train._chains import born_again, distill_chain
from secateur.train._checkpoint import Saved, load_checkpoint, save_checkpoint
from secateur.train._csv import CsvLog
from secateur.train._evaluate import Accuracy, evaluate, measure
from secateur.train._execution import Compiled, Eager, Execution
from secateur.train._fit import distill, fit
from secateur.train._group import open_group
from secateur.train._ledger import Ledger, diverged
from secateur.train._machine import (
    Precision,
    autocast,
    best_precision,
    channels_last,
    one_device,
    open_fabric,
    placed,
    precision_of,
    seeded,
    usable,
)
from secateur.train._parallel import average_gradients_, averaged, own_part
from secateur.train._partway import Partway, nothing
from secateur.train._progress import Meter, Progress, Silent, TerminalProgress
from secateur.train._record import EpochRecord, Trained
from secateur.train._redraw import check_redrawable, redraw_
from secateur.train._saving import Keeper, Saving, keeping
from secateur.train._schedule import SGD, AdamW, Schedule
from secateur.train._stages import distill_after_hints
from secateur.train._state import (
    average_decay,
    digest,
    finite,
    optimiser_tensors,
    tensors_of,
    write_optimiser_,
    write_tensors_,
)
from secateur.train._stop import Stopped, StopRequest, stoppable
from secateur.train._tensorboard import TensorBoard

__all__ = [
    "SGD",
    "Accuracy",
    "AdamW",
    "Batches",
    "Compiled",
    "CsvLog",
    "Eager",
    "EpochRecord",
    "Execution",
    "Keeper",
    "Ledger",
    "Meter",
    "Partway",
    "Precision",
    "Progress",
    "Saved",
    "Saving",
    "Schedule",
    "Silent",
    "StopRequest",
    "Stopped",
    "TensorBoard",
    "TerminalProgress",
    "Trained",
    "TrainingData",
    "autocast",
    "average_decay",
    "average_gradients_",
    "averaged",
    "best_precision",
    "born_again",
    "channels_last",
    "check_redrawable",
    "digest",
    "distill",
    "distill_after_hints",
    "distill_chain",
    "diverged",
    "evaluate",
    "finite",
    "fit",
    "keeping",
    "load_checkpoint",
    "measure",
    "nothing",
    "one_device",
    "open_fabric",
    "open_group",
    "optimiser_tensors",
    "own_part",
    "placed",
    "precision_of",
    "redraw_",
    "save_checkpoint",
    "seeded",
    "stoppable",
    "tensors_of",
    "usable",
    "write_optimiser_",
    "write_tensors_",
]
