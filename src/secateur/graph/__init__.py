"""The channel graph: trace a model once and know which channels belong together."""

from secateur.graph._record import shadow_copy
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
from secateur.graph.selection import Selection, check_matches, matches
from secateur.graph.stages import Stage, stages_of
from secateur.graph.trace import HeadUnit, trace
from secateur.graph.untie import untie

__all__ = [
    "Activation",
    "Block",
    "ChannelAxis",
    "ChannelGraph",
    "Extent",
    "HeadUnit",
    "Operation",
    "Replacement",
    "Role",
    "Selection",
    "Site",
    "SizeEdit",
    "Stage",
    "StandIn",
    "check_matches",
    "compute_over_kept_",
    "matches",
    "shadow_copy",
    "stages_of",
    "trace",
    "untie",
]
