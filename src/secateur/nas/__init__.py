"""Architecture search with a supernet: TAS and SWP on any traced model."""

from secateur.nas.common import Depths, OriginalWeights, Pretrained, RandomInit, SupernetWeights, Widths
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
from secateur.nas.swp_table import Combination, StageChoice, StageTable
from secateur.nas.swp_train import (
    InPlace,
    Labels,
    RandomSampler,
    SandwichSampler,
    SoftLabels,
    SubnetSampler,
    Supervision,
)
from secateur.nas.tas import TAS
from secateur.nas.tas_train import AlphaOptimizer, CosineTemperature, LinearTemperature

__all__ = [
    "SWP",
    "TAS",
    "AlphaOptimizer",
    "Blending",
    "Combination",
    "CosineTemperature",
    "Depths",
    "Evolution",
    "Exact",
    "Fade",
    "Front",
    "InPlace",
    "Interpolate",
    "Labels",
    "LinearTemperature",
    "Mixture",
    "OriginalWeights",
    "Pretrained",
    "RandomInit",
    "RandomSampler",
    "SandwichSampler",
    "SoftLabels",
    "StageChoice",
    "StageTable",
    "Subnet",
    "SubnetSampler",
    "Supernet",
    "SupernetWeights",
    "Supervision",
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
