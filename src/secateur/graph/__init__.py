"""The channel graph: trace a model once and know which channels belong together."""

from secateur.graph._record import shadow_of
from secateur.graph._rules_layers import compute_over_kept_
from secateur.graph.graph import (
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
from secateur.graph.selection import Choices, check_meant, means
from secateur.graph.stages import Stage, stages_of
from secateur.graph.trace import HeadUnit, trace
from secateur.graph.untie import untie

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
    "means",
    "shadow_of",
    "stages_of",
    "trace",
    "untie",
]
