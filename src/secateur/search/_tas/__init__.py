"""Differentiable search of widths and depths."""

from secateur.search._tas._candidates import Depths, Widths
from secateur.search._tas._strategy import TAS
from secateur.search._tas._temperature import Cosine, Linear

__all__ = ["TAS", "Cosine", "Depths", "Linear", "Widths"]
