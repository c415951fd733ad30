"""Weight pruning: scores, budgets, schedules, masks that survive training, and storage in which zeros are small."""

from secateur.sparsity._allocation import density_of, erk, keep_globally, keep_largest, keep_n_of_m, per_layer
from secateur.sparsity._encoding import decode_sparse, encode_sparse
from secateur.sparsity._masks import Mask, make_permanent_, masked, masked_like, masks_of, nonzero_params, set_masks_
from secateur.sparsity._plan import Sparsify
from secateur.sparsity._pruning import (
    Allocation,
    AtRandom,
    ByERK,
    ByMagnitude,
    ByMovement,
    BySnip,
    ByTaylor,
    Evenly,
    Globally,
    NOfM,
    WeightPruning,
    WeightScore,
)
from secateur.sparsity._schedule import Cubic, Iterative, OneShot, SparsitySchedule
from secateur.sparsity._scores import magnitude, movement, random_scores, snip, taylor
from secateur.sparsity._weights import prunable

__all__ = [
    "Allocation",
    "AtRandom",
    "ByERK",
    "ByMagnitude",
    "ByMovement",
    "BySnip",
    "ByTaylor",
    "Cubic",
    "Evenly",
    "Globally",
    "Iterative",
    "Mask",
    "NOfM",
    "OneShot",
    "Sparsify",
    "SparsitySchedule",
    "WeightPruning",
    "WeightScore",
    "decode_sparse",
    "density_of",
    "encode_sparse",
    "erk",
    "keep_globally",
    "keep_largest",
    "keep_n_of_m",
    "magnitude",
    "make_permanent_",
    "masked",
    "masked_like",
    "masks_of",
    "movement",
    "nonzero_params",
    "per_layer",
    "prunable",
    "random_scores",
    "set_masks_",
    "snip",
    "taylor",
]
