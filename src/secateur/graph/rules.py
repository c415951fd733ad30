"""What operations do to channels: the parts that rules of your own are made of. See docs/rules.md.

A rule is a function from a `Call` to the channel ids of each output tensor: a mapping from dimension to the ids of its
positions. Pass it by name: ``trace(model, example, rules={"my_lib::my_op": pointwise})``.
"""

from secateur.graph._call import Call, Rule, merge, unknown
from secateur.graph._layers import convolution, group_norm, layer_norm, matrix_product
from secateur.graph._ledger import ChannelIds
from secateur.graph._movement import concatenate, movement
from secateur.graph._rules import RULES, normalised, per_channel, pointwise, reduction

__all__ = [
    "RULES",
    "Call",
    "ChannelIds",
    "Rule",
    "concatenate",
    "convolution",
    "group_norm",
    "layer_norm",
    "matrix_product",
    "merge",
    "movement",
    "normalised",
    "per_channel",
    "pointwise",
    "reduction",
    "unknown",
]
