"""The graph that a run works on: traced, untied if that is wanted, with the user's choices."""

from collections.abc import Mapping
from enum import Enum

from torch import Tensor, nn

from secateur.graph import ChannelGraph, Choices, HeadUnit, trace, untie
from secateur.graph.rules import Rule


class Branches(Enum):
    """Which widths the branches of a residual stream may have."""

    TIED = "tied"
    """That of the stream: every branch keeps the channels that the stream keeps."""
    UNTIED = "untied"
    """Each its own: a narrower branch is added into its channels of the stream, see `secateur.graph.untie`."""


def traced(
    model: nn.Module,
    example: Tensor,
    *,
    choices: Choices,
    heads: HeadUnit,
    branches: Branches,
    rules: Mapping[str, Rule],
) -> ChannelGraph:
    """The channel graph of a model; see `compress` for the arguments."""
    graph = trace(model, example, heads=heads, rules=rules)
    return choices.apply(untie(model, graph) if branches is Branches.UNTIED else graph)
