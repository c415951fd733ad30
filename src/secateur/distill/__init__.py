"""Distillation losses, each alone or as a weighted sum: on logits, on features, on relations between images."""

from secateur.distill._adaptors import Resize, adaptors_of
from secateur.distill._aligned import AlignedFeatures, FeatureWatch, Tap
from secateur.distill._contrast import ContrastiveRepresentation, contrastive_loss
from secateur.distill._ensemble import Ensemble
from secateur.distill._features import attention_loss, attention_map, hcl_loss, hint_loss, vid_loss
from secateur.distill._information import VariationalInformation
from secateur.distill._logits import dist_loss, dkd_loss, standardised, standardised_kd_loss
from secateur.distill._losses import feature_loss, kd_loss, label_loss
from secateur.distill._objective import Objective
from secateur.distill._pairs import paired_stages
from secateur.distill._relations import pkt_loss, rkd_angle_loss, rkd_distance_loss, similarity_loss
from secateur.distill._review import AttentionFusion, KnowledgeReview
from secateur.distill._taps import Features, Taps, TapWatch, tapped, watch_taps
from secateur.distill._terms import PerTap, Seen, Term, features, labelled_feature, labelled_logits, logits

__all__ = [
    "AlignedFeatures",
    "AttentionFusion",
    "ContrastiveRepresentation",
    "Ensemble",
    "FeatureWatch",
    "Features",
    "KnowledgeReview",
    "Objective",
    "PerTap",
    "Resize",
    "Seen",
    "Tap",
    "TapWatch",
    "Taps",
    "Term",
    "VariationalInformation",
    "adaptors_of",
    "attention_loss",
    "attention_map",
    "contrastive_loss",
    "dist_loss",
    "dkd_loss",
    "feature_loss",
    "features",
    "hcl_loss",
    "hint_loss",
    "kd_loss",
    "label_loss",
    "labelled_feature",
    "labelled_logits",
    "logits",
    "paired_stages",
    "pkt_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "similarity_loss",
    "standardised",
    "standardised_kd_loss",
    "tapped",
    "vid_loss",
    "watch_taps",
]
