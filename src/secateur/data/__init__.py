"""Labelled images: three splits in normalised, augmented batches that depend on (seed, epoch) and nothing else."""

from secateur.data._augment import Augment
from secateur.data._folder import FolderSplit
from secateur.data._image_data import ImageData, calibration
from secateur.data._load import load_data
from secateur.data._memory import MemorySplit
from secateur.data._normalise import Normalisation
from secateur.data._split import Split

__all__ = ["Augment", "FolderSplit", "ImageData", "MemorySplit", "Normalisation", "Split", "calibration", "load_data"]
