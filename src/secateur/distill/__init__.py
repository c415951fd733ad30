"""Distillation losses: match a teacher's class probabilities and, channel by channel, its features."""

from secateur.distill._aligned import AlignedFeatures, FeatureWatch, Tap
from secateur.distill._logits import dist_loss, dkd_loss, standardised, standardised_kd_loss
from secateur.distill._losses import feature_loss, kd_loss, label_loss
from secateur.distill._objective import Objective

__all__ = [
    "AlignedFeatures",
    "FeatureWatch",
    "Objective",
    "Tap",
    "dist_loss",
    "dkd_loss",
    "feature_loss",
    "kd_loss",
    "label_loss",
    "standardised",
    "standardised_kd_loss",
]
