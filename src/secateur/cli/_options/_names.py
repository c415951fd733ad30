"""What flags can be set to, where that is one of a few words."""

from enum import StrEnum


class StrategyName(StrEnum):
    """Strategies by name; see `secateur.search`."""

    KNAPSACK = "knapsack"
    PCA = "pca"
    PCA_ACTIVATIONS = "pca-activations"
    GLOBAL = "global"
    UNIFORM = "uniform"
    TAS = "tas"
    SWP = "swp"


class SearchedName(StrEnum):
    """What a search that learns searches, by name; see `secateur.search.TAS` and `secateur.search.SWP`."""

    WIDTHS = "widths"
    DEPTHS = "depths"
    BOTH = "both"


class CombinationName(StrEnum):
    """How one candidate of every stage is chosen, by name; see `secateur.search.SWP`."""

    EXACT = "exact"
    EVOLUTION = "evolution"


class ImportanceName(StrEnum):
    """Importances by name; see `secateur.importance`."""

    RECONSTRUCTION = "reconstruction"
    L1 = "l1"
    L2 = "l2"
    FPGM = "fpgm"
    BN_SCALE = "bn-scale"
    TAYLOR = "taylor"
    LAMP = "lamp"
    RANDOM = "random"


class LossName(StrEnum):
    """Distillation losses by name; see `secateur.distill`."""

    KD = "kd"
    DKD = "dkd"
    DIST = "dist"
    STANDARDISED = "standardised"
    HINT = "hint"
    ATTENTION = "attention"
    VID = "vid"
    RKD = "rkd"
    SP = "sp"
    PKT = "pkt"
    CRD = "crd"
    REVIEW = "review"


class WeightScoreName(StrEnum):
    """Scores of single weights by name; see `secateur.sparsity.WeightScore`."""

    MAGNITUDE = "magnitude"
    TAYLOR = "taylor"
    SNIP = "snip"
    MOVEMENT = "movement"
    RANDOM = "random"


class AllocationName(StrEnum):
    """How many weights each layer keeps, by name; see `secateur.sparsity.Allocation`."""

    GLOBAL = "global"
    ERK = "erk"
    EVEN = "even"
    TWO_OF_FOUR = "2:4"
    FOUR_OF_EIGHT = "4:8"


class WeightScheduleName(StrEnum):
    """When weights go, by name; see `secateur.sparsity.SparsitySchedule`."""

    CUBIC = "cubic"
    ITERATIVE = "iterative"
    ONE_SHOT = "one-shot"


class OptimiserName(StrEnum):
    """Optimisers by name."""

    SGD = "sgd"
    ADAMW = "adamw"


class PrecisionName(StrEnum):
    """Number formats by name."""

    AUTO = "auto"
    FLOAT32 = "32"
    BF16 = "bf16"


class AttentionName(StrEnum):
    """What is kept or removed as one in attention; see `secateur.graph.HeadUnit`."""

    HEADS = "heads"
    DIMENSIONS = "dimensions"


class FormatName(StrEnum):
    """Files for other runtimes by name; see `secateur.Format`."""

    ONNX = "onnx"
    PT2 = "pt2"
    OPENVINO = "openvino"
    EXECUTORCH = "executorch"
    INT8 = "int8"
