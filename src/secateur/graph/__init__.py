"""The channel graph: trace a model once and know which channels belong together."""

from secateur.graph._record import shadow_copy
from secateur.graph.channel_rules.layers import compute_over_kept_channels_
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
from secateur.graph.selection import Selection, check_patterns, matches_axis
from secateur.graph.stages import Stage, find_stages
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
    "check_patterns",
    "compute_over_kept_channels_",
    "find_stages",
    "matches_axis",
    "shadow_copy",
    "trace",
    "untie",
]
