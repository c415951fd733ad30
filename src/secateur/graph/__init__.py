"""The channel graph of a model: trace it once, know which channels belong together."""

from secateur.graph._channels import (
    Activation,
    Block,
    ChannelAxis,
    ChannelGraph,
    Extent,
    Operation,
    Replacement,
    Role,
    Site,
    SizeEdit,
    StandIn,
)
from secateur.graph._choices import Choices, check_meant, means
from secateur.graph._copying import copy_model
from secateur.graph._mixing import compute_over_kept_
from secateur.graph._record import shadow_of
from secateur.graph._running import undisturbed
from secateur.graph._stages import Stage, stages_of
from secateur.graph._trace import HeadUnit, trace
from secateur.graph._untie import untie
from secateur.graph._zeroed import zero_branches_

__all__ = [
    "Activation",
    "Block",
    "ChannelAxis",
    "ChannelGraph",
    "Choices",
    "Extent",
    "HeadUnit",
    "Operation",
    "Replacement",
    "Role",
    "Site",
    "SizeEdit",
    "Stage",
    "StandIn",
    "check_meant",
    "compute_over_kept_",
    "copy_model",
    "means",
    "shadow_of",
    "stages_of",
    "trace",
    "undisturbed",
    "untie",
    "zero_branches_",
]
