"""Architecture search with a supernet: TAS and SWP on any traced model."""

from secateur.nas.common import (
    Depths,
    OriginalWeights,
    Pretrained,
    RandomInit,
    ReferenceDepths,
    SupernetWeights,
    Widths,
)
from secateur.nas.mixture import (
    Interpolate,
    Mixture,
    WidthExpansion,
    ZeroPad,
    interpolate_channels,
    interpolation_matrix,
)
from secateur.nas.stagewise import (
    measure_stage_batch_norms,
    run_remaining_stages,
    run_stages,
    stage_effects,
    stage_features,
    stage_losses,
    stage_variances,
)
from secateur.nas.supernet import (
    Subnet,
    Supernet,
    invert_order,
    measure_batch_norms,
    order_by_score,
    order_digest,
    reorder_channels,
)
from secateur.nas.swp import SWP
from secateur.nas.swp_evolution import Evolution
from secateur.nas.swp_knapsack import ExactKnapsack, ParetoFront, pareto_front
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
    "Combination",
    "CosineTemperature",
    "Depths",
    "Evolution",
    "ExactKnapsack",
    "InPlace",
    "Interpolate",
    "Labels",
    "LinearTemperature",
    "Mixture",
    "OriginalWeights",
    "ParetoFront",
    "Pretrained",
    "RandomInit",
    "RandomSampler",
    "ReferenceDepths",
    "SandwichSampler",
    "SoftLabels",
    "StageChoice",
    "StageTable",
    "Subnet",
    "SubnetSampler",
    "Supernet",
    "SupernetWeights",
    "Supervision",
    "WidthExpansion",
    "Widths",
    "ZeroPad",
    "interpolate_channels",
    "interpolation_matrix",
    "invert_order",
    "measure_batch_norms",
    "measure_stage_batch_norms",
    "order_by_score",
    "order_digest",
    "pareto_front",
    "reorder_channels",
    "run_remaining_stages",
    "run_stages",
    "stage_effects",
    "stage_features",
    "stage_losses",
    "stage_variances",
]
