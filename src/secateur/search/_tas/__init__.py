"""Differentiable search of widths and depths."""

from secateur.search._tas._course import Adam
from secateur.search._tas._strategy import TAS
from secateur.search._tas._temperature import Cosine, Linear

__all__ = [
    "TAS",
    "Adam",
    "Cosine",
    "Linear",
]
