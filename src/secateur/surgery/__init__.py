"""Surgery: cut a model for real, prove the cut, heal it without training."""

from secateur.surgery._blocks import PassThrough, Silence, replace_, replacements_in, replacements_of
from secateur.surgery._cut import Cut, Healer, Healing, OutputDistance, Wound, cut, output_distance
from secateur.surgery._recalibrate import RecalibrateBatchNorm
from secateur.surgery._refit import Refit
from secateur.surgery._slice import apply_architecture, declare_sizes, mask_removed, parameter_share, set_sizes
from secateur.surgery._verify import Verification

__all__ = [
    "Cut",
    "Healer",
    "Healing",
    "OutputDistance",
    "PassThrough",
    "RecalibrateBatchNorm",
    "Refit",
    "Silence",
    "Verification",
    "Wound",
    "apply_architecture",
    "cut",
    "declare_sizes",
    "mask_removed",
    "output_distance",
    "parameter_share",
    "replace_",
    "replacements_in",
    "replacements_of",
    "set_sizes",
]
