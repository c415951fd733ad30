"""About thirty small networks, each the smallest that shows one way channels can be wired.

``ZOO[name]()`` returns a freshly built `ZooNet`: a model in eval mode and an example input of batch 2. Weights are
seeded and *loud*: no bias, norm statistic or LayerScale is left at its silent default, so that a channel that is
lost, swapped or kept by mistake changes the output. Building one leaves torch's global random state alone.

This module does not import secateur: it is what secateur is checked against.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import zoo_convolutional as nets
from torch import Tensor, nn
from zoo_attention import Attention, GroupedQueryAttention, Transformer


class ZooNet(NamedTuple):
    """A model in eval mode and an example input it accepts."""

    model: nn.Module
    example: Tensor


def randomize_all(model: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter and running statistic with seeded numbers that are not zero, one or equal."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * (1.6 / fan_in) ** 0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(0.6 + 0.8 * torch.rand(parameter.shape, generator=draw))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=draw))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=draw))
    return model.eval()


def _seeded(build: Callable[[], nn.Module], seed: int) -> Callable[[], ZooNet]:
    def make() -> ZooNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build()
            return ZooNet(randomize_all(model, seed), torch.randn(2, 3, 8, 8))

    return make


_BUILDERS: Mapping[str, Callable[[], nn.Module]] = {
    "plain": nets.Plain,
    "residual": nets.Residual,
    "preact_residual": nets.PreActResidual,
    "option_a_residual": nets.OptionAResidual,
    "dense": nets.Dense,
    "split": nets.Split,
    "gated_chunk": nets.Gated,
    "slice_halves": nets.SliceHalves,
    "few_groups": nets.FewGroups,
    "many_groups": nets.ManyGroups,
    "depthwise_separable": nets.DepthwiseSeparable,
    "depth_multiplier": nets.DepthMultiplier,
    "inverted_residual_se": nets.InvertedResidual,
    "flatten_linear": nets.FlattenLinear,
    "view_linear": nets.ViewLinear,
    "shared_weights": nets.SharedWeights,
    "tied_parameter": nets.TiedParameter,
    "shuffle_v1": nets.ShuffleV1,
    "shuffle_v2": nets.ShuffleV2,
    "pixel_shuffle": nets.PixelShuffle,
    "unused_layer": nets.UnusedLayer,
    "transposed": nets.Transposed,
    "inception": nets.Inception,
    "dropout": nets.DropoutNet,
    "norm_without_affine": nets.NormWithoutAffine,
    "bias_only": nets.BiasOnly,
    "layer_scale": nets.LayerScale,
    "layer_norm": nets.LayerNormNet,
    "activations": nets.Activations,
    "multi_branch_add": nets.MultiBranchAdd,
    "nested": nets.Nested,
    "functional": nets.Functional,
    "branching": nets.Branching,
    "frozen_output": nets.FrozenOutput,
    "mlp": nets.Mlp,
    "attention": lambda: Transformer(Attention()),
    "grouped_query_attention": lambda: Transformer(GroupedQueryAttention()),
}

ZOO: Mapping[str, Callable[[], ZooNet]] = {
    name: _seeded(build, seed) for seed, (name, build) in enumerate(_BUILDERS.items())
}
"""Factories by name. Every call builds the same model again."""

ATTENTION: frozenset[str] = frozenset({"attention", "grouped_query_attention"})
"""Nets that may be left whole by a tracer made for convolutional nets."""
