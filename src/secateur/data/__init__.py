"""Labeled images: three splits in normalized, augmented batches that depend only on seed, epoch, and image."""

from secateur.data.dataset import ImageData, MemorySplit, Split, draw_calibration
from secateur.data.images import FolderSplit
from secateur.data.load import load_data
from secateur.data.loaders import OwnData, own_data
from secateur.data.transforms import Augment, Normalization

__all__ = [
    "Augment",
    "FolderSplit",
    "ImageData",
    "MemorySplit",
    "Normalization",
    "OwnData",
    "Split",
    "draw_calibration",
    "load_data",
    "own_data",
]
