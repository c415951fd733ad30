"""Stage-wise pruning: supernets of single stages, trained fairly, and the best combination of what they offer."""

from secateur.search._swp._evolve import Evolution
from secateur.search._swp._exact import Exact
from secateur.search._swp._front import Front, pareto
from secateur.search._swp._nets import Drawn, Nets, Sandwich
from secateur.search._swp._strategy import SWP
from secateur.search._swp._supervision import InPlace, Labels, SoftLabels, Supervision
from secateur.search._swp._table import Choice, Combination, Table

__all__ = [
    "SWP",
    "Choice",
    "Combination",
    "Drawn",
    "Evolution",
    "Exact",
    "Front",
    "InPlace",
    "Labels",
    "Nets",
    "Sandwich",
    "SoftLabels",
    "Supervision",
    "Table",
    "pareto",
]
