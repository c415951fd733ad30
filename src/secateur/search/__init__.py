"""Find which channels to keep so that a model costs no more than a budget."""

from secateur.search._begin import Redrawn, Warm
from secateur.search._depth import Shallower
from secateur.search._describe import describe
from secateur.search._fit import Fit, fit
from secateur.search._hand_on import OriginalWeights, SearchedWeights
from secateur.search._knapsack import Knapsack
from secateur.search._pca import PCASlimming
from secateur.search._problem import Problem, Proposal, Strategy, keep_best
from secateur.search._ranking import (
    GlobalImportance,
    as_scored,
    by_axis_max,
    by_axis_mean,
    by_axis_norm,
    by_axis_rank,
)
from secateur.search._ratios import Depths, Widths
from secateur.search._remembered import Remembered
from secateur.search._search import Found, search
from secateur.search._sources import Activations, RawWeights, Source, Weights
from secateur.search._space import AxisRule, SearchSpace
from secateur.search._spectrum import Correlation, Covariance, Matrix, unexplained_variance
from secateur.search._swp import (
    SWP,
    Combination,
    Drawn,
    Evolution,
    Exact,
    InPlace,
    Labels,
    Nets,
    Sandwich,
    SoftLabels,
    Supervision,
)
from secateur.search._tas import TAS, Adam, Cosine, Linear
from secateur.search._uniform import Uniform

__all__ = [
    "SWP",
    "TAS",
    "Activations",
    "Adam",
    "AxisRule",
    "Combination",
    "Correlation",
    "Cosine",
    "Covariance",
    "Depths",
    "Drawn",
    "Evolution",
    "Exact",
    "Fit",
    "Found",
    "GlobalImportance",
    "InPlace",
    "Knapsack",
    "Labels",
    "Linear",
    "Matrix",
    "Nets",
    "OriginalWeights",
    "PCASlimming",
    "Problem",
    "Proposal",
    "RawWeights",
    "Redrawn",
    "Remembered",
    "Sandwich",
    "SearchSpace",
    "SearchedWeights",
    "Shallower",
    "SoftLabels",
    "Source",
    "Strategy",
    "Supervision",
    "Uniform",
    "Warm",
    "Weights",
    "Widths",
    "as_scored",
    "by_axis_max",
    "by_axis_mean",
    "by_axis_norm",
    "by_axis_rank",
    "describe",
    "fit",
    "keep_best",
    "search",
    "unexplained_variance",
]
