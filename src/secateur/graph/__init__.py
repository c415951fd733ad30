"""The channel graph of a model: trace it once, know which channels belong together."""

from secateur.graph._channels import Activation, ChannelAxis, ChannelGraph, Extent, Operation, Role, Site, SizeEdit
from secateur.graph._record import shadow_of
from secateur.graph._trace import trace

__all__ = [
    "Activation",
    "ChannelAxis",
    "ChannelGraph",
    "Extent",
    "Operation",
    "Role",
    "Site",
    "SizeEdit",
    "shadow_of",
    "trace",
]
