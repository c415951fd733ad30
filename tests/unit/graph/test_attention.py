"""Attention as different libraries write it: scales by an attribute, biases for every head, parameters in reserve."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cuts import apart, one_channel, outputs, random_architecture
from torch import Tensor, nn
from torch.nn import functional

from secateur.graph import ChannelGraph, trace
from secateur.prune import cut

TOKENS, WIDTH, HEADS = 6, 24, 4
IMAGES = torch.randn(1, TOKENS, 10, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Attention with a stream whose width it takes for that of all heads together, if ``tied``."""

    def __init__(
        self, scale: Callable[[int], float] | None, *, bias: bool = False, tied: bool = False, fused: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.head_size = HEADS, WIDTH // HEADS
        self.scale, self.tied, self.fused = scale, tied, fused
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(torch.randn(TOKENS * TOKENS, HEADS)) if bias else None

    def divided(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_size).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.divided(layer(x)) for layer in (self.query, self.key, self.value))
        bias = None
        if self.table is not None:
            bias = self.table.view(TOKENS, TOKENS, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.scale is None or self.fused:
            scale = 0.4 if self.scale is None else 1 / self.scale(self.head_size)
            found = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        else:
            found = (query @ key.transpose(-1, -2) / self.scale(self.head_size)).softmax(-1) @ value
        found = found.transpose(1, 2).contiguous()
        return self.out(found.reshape(*x.shape[:-1], x.shape[-1] if self.tied else -1))


class Net(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(10, WIDTH), attention, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attention(x)).mean(1))


def traced(attention: Callable[[], nn.Module]) -> tuple[nn.Module, ChannelGraph]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net(attention()).eval()
    return model, trace(model, IMAGES)


SCALES = {
    "math.sqrt": (math.sqrt, False), "float": (float, False), "power": (lambda size: size**0.5, False),
    "tensor": (lambda size: torch.tensor(size).sqrt(), False), "numpy": (np.sqrt, False),
    "fused, math.sqrt": (math.sqrt, True), "fused, power": (lambda size: size**0.5, True),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_scale_by_an_attribute_leaves_whole_heads_to_cut(name: str, *, tied: bool) -> None:
    scale, fused = SCALES[name]
    model, graph = traced(lambda: Attention(scale, tied=tied, fused=fused))
    heads = graph.by_name["embed" if tied else "attention.query"]
    assert heads.frozen_because is None
    kept = [random_architecture(graph, 0), one_channel(graph), one_channel(graph, 1)]
    for architecture in kept:
        made = cut(model, graph, architecture)
        assert not made.verification.frozen
        small = made.model.attention
        # The scale is what it was, because every head that is left is whole.
        assert small.head_size == WIDTH // HEADS
        assert small.query.out_features % small.head_size == 0
    assert small.query.out_features == WIDTH // HEADS


def test_a_bias_for_every_head_leaves_the_dimensions_of_heads_to_cut() -> None:
    model, graph = traced(lambda: Attention(None, bias=True))
    assert "attention.query" in {axis.name for axis in graph.prunable}
    assert all(extent.terms == () for extent in graph.tensors["attention.table"])
    made = cut(model, graph, one_channel(graph, 2))
    assert not made.verification.frozen
    assert made.model.attention.value.out_features < WIDTH
    assert made.model.attention.table.shape == (TOKENS * TOKENS, HEADS)


def test_a_parameter_in_reserve_is_named_and_freezes_nothing() -> None:
    class Masked(Attention):
        def __init__(self) -> None:
            super().__init__(None)
            self.mask_token = nn.Parameter(torch.zeros(1, WIDTH))

        def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
            # A constant of this code is the empty string, which names no module.
            x = x if hidden is None else torch.where(hidden, self.mask_token, x)
            return super().forward(x) if x.device.type != "" else x

    model, graph = traced(Masked)
    assert graph.unseen == ("attention.mask_token",)
    assert graph.by_name["embed"].frozen_because is None
    made = cut(model, graph, random_architecture(graph, 2))
    assert made.verification.not_run == ("attention.mask_token",)
    assert apart(outputs(made.model, IMAGES), outputs(made.model, IMAGES)) == 0
