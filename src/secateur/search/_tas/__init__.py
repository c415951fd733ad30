"""Differentiable search of widths and depths."""

from secateur.search._tas._begin import Redrawn, Warm
from secateur.search._tas._candidates import Depths, Widths
from secateur.search._tas._engine import Adam
from secateur.search._tas._hand_on import OriginalWeights, SearchedWeights
from secateur.search._tas._strategy import TAS
from secateur.search._tas._temperature import Cosine, Linear

__all__ = [
    "TAS",
    "Adam",
    "Cosine",
    "Depths",
    "Linear",
    "OriginalWeights",
    "Redrawn",
    "SearchedWeights",
    "Warm",
    "Widths",
]
