"""A supernet by slicing: every subnet of a traced model is the same model, called with parts of its tensors."""

from secateur.supernet._calibrate import calibrated
from secateur.supernet._effects import stage_effects
from secateur.supernet._interpolate import interpolate_channels, interpolation_matrix
from secateur.supernet._mixture import Blending, Fade, Interpolate, Mixture
from secateur.supernet._order import best_first, inverse, order_digest, reordered
from secateur.supernet._stagewise import (
    calibrated_stages,
    carried_on,
    features,
    run_stages,
    stage_losses,
    stage_variances,
)
from secateur.supernet._supernet import Subnet, Supernet

__all__ = [
    "Blending",
    "Fade",
    "Interpolate",
    "Mixture",
    "Subnet",
    "Supernet",
    "best_first",
    "calibrated",
    "calibrated_stages",
    "carried_on",
    "features",
    "interpolate_channels",
    "interpolation_matrix",
    "inverse",
    "order_digest",
    "reordered",
    "run_stages",
    "stage_effects",
    "stage_losses",
    "stage_variances",
]
