"""The channel graph of a model: trace it once, know which channels belong together."""

from secateur.graph._channels import Activation, ChannelAxis, ChannelGraph, Extent, Operation, Role, Site, SizeEdit
from secateur.graph._choices import Choices, check_meant, means
from secateur.graph._mixing import compute_over_kept_
from secateur.graph._record import shadow_of, undisturbed
from secateur.graph._trace import trace

__all__ = [
    "Activation",
    "ChannelAxis",
    "ChannelGraph",
    "Choices",
    "Extent",
    "Operation",
    "Role",
    "Site",
    "SizeEdit",
    "check_meant",
    "compute_over_kept_",
    "means",
    "shadow_of",
    "trace",
    "undisturbed",
]
