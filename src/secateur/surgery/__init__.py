"""Surgery: cut a model for real, prove the cut, heal it without training."""

from secateur.surgery._blocks import PassThrough, Silence, replace_, replacements_in, replacements_of, stand_in_of
from secateur.surgery._cut import Cut, Healer, Healing, OutputDistance, Wound, cut, output_distance
from secateur.surgery._recalibrate import RecalibrateBatchNorm
from secateur.surgery._refit import Refit
from secateur.surgery._slice import (
    apply_architecture,
    copy_with,
    declare_sizes,
    mask_removed,
    parameter_share,
    set_sizes,
)
from secateur.surgery._verify import Verification
from secateur.surgery._widen import (
    Widen,
    Widening,
    original_names,
    widen_,
    widenings_in,
    widenings_of,
    within_streams,
)

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
    "Widen",
    "Widening",
    "Wound",
    "apply_architecture",
    "copy_with",
    "cut",
    "declare_sizes",
    "mask_removed",
    "original_names",
    "output_distance",
    "parameter_share",
    "replace_",
    "replacements_in",
    "replacements_of",
    "set_sizes",
    "stand_in_of",
    "widen_",
    "widenings_in",
    "widenings_of",
    "within_streams",
]
