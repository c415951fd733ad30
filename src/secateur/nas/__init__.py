"""Architecture search with a supernet: TAS and SWP on any traced model."""

from secateur.nas.common import Depths, OriginalWeights, Redrawn, SearchedWeights, Warm, Widths
from secateur.nas.mixture import Blending, Fade, Interpolate, Mixture, interpolate_channels, interpolation_matrix
from secateur.nas.stagewise import (
    calibrated_stages,
    carried_on,
    features,
    run_stages,
    stage_effects,
    stage_losses,
    stage_variances,
)
from secateur.nas.supernet import Subnet, Supernet, best_first, calibrated, inverse, order_digest, reordered
from secateur.nas.swp import SWP
from secateur.nas.swp_evolution import Evolution
from secateur.nas.swp_knapsack import Exact, Front, pareto
from secateur.nas.swp_table import Choice, Combination, Table
from secateur.nas.swp_train import Drawn, InPlace, Labels, Nets, Sandwich, SoftLabels, Supervision
from secateur.nas.tas import TAS
from secateur.nas.tas_train import Adam, Cosine, Linear

__all__ = [
    "SWP",
    "TAS",
    "Adam",
    "Blending",
    "Choice",
    "Combination",
    "Cosine",
    "Depths",
    "Drawn",
    "Evolution",
    "Exact",
    "Fade",
    "Front",
    "InPlace",
    "Interpolate",
    "Labels",
    "Linear",
    "Mixture",
    "Nets",
    "OriginalWeights",
    "Redrawn",
    "Sandwich",
    "SearchedWeights",
    "SoftLabels",
    "Subnet",
    "Supernet",
    "Supervision",
    "Table",
    "Warm",
    "Widths",
    "best_first",
    "calibrated",
    "calibrated_stages",
    "carried_on",
    "features",
    "interpolate_channels",
    "interpolation_matrix",
    "inverse",
    "order_digest",
    "pareto",
    "reordered",
    "run_stages",
    "stage_effects",
    "stage_losses",
    "stage_variances",
]
