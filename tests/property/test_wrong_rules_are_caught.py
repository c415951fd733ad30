"""Whatever an operation does to the channels: if its rule is wrong, the cut that it spoils is caught."""

import copy
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from cuts import apart, outputs, zoo_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.graph import Site, trace
from secateur.graph.rules import per_channel, pointwise
from secateur.prune import cut, mask_removed

MISTAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "roll": lambda x: x.roll(1, 1),
    "flip": lambda x: x.flip(1),
    "mix": lambda x: x + 0.1 * x.roll(1, 1),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "largest": lambda x: x / (1 + x.abs().amax(1, keepdim=True)),
    "sorted": lambda x: x.sort(1).values,
    "first": lambda x: x * x[:, :1],
    "ramp": lambda x: x * torch.arange(x.shape[1], dtype=x.dtype).view(-1, *[1] * (x.dim() - 2)),
    "count": lambda x: x / x.shape[1] ** 0.5,
    "faint": lambda x: x + 1e-3 * x.roll(1, 1),
}
"""What the operation does to dimension 1, although its rule says that it treats every channel alike."""
NETS = ("plain", "residual", "dense", "split", "depthwise_separable", "inception", "dropout", "nested")
DEPENDENT = {"sorted", "largest"}
"""These may be right on one image and wrong on another: then no comparison on the one shows it."""


@torch.library.custom_op("mistaken::act", mutates_args=())
def act(x: Tensor, kind: str) -> Tensor:
    return MISTAKES[kind](x).clone()


class Mistaken(nn.Module):
    """An activation, a norm or a convolution followed by the mistake."""

    def __init__(self, inner: nn.Module, kind: str):
        super().__init__()
        self.inner, self.kind = inner, kind

    def forward(self, x: Tensor) -> Tensor:
        return act(self.inner(x), self.kind)


def with_mistakes(model: nn.Module, places: list[int], kind: str) -> nn.Module:
    """The model with the mistake after some of its convolutions, norms and activations."""
    model = copy.deepcopy(model)
    names = [n for n, m in model.named_modules() if n and isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU)]
    for place in {names[p % len(names)] for p in places} if names else ():
        path, _, leaf = place.rpartition(".")
        setattr(model.get_submodule(path), leaf, Mistaken(model.get_submodule(place), kind))
    return model.eval()


@pytest.mark.filterwarnings("ignore:The cut model is larger")
@pytest.mark.parametrize("kind", MISTAKES)
@settings(max_examples=3)
@given(
    name=st.sampled_from(
        ["plain", "residual", "dense", "split", "depthwise_separable", "inception", "dropout", "nested"]
    ),
    places=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    rule=st.sampled_from([pointwise, per_channel]),
    seed=st.integers(0, 3),
)
def test_an_operation_with_a_wrong_rule(kind, name, places, rule, seed):
    model, example = ZOO[name]()
    model = with_mistakes(model, places, kind)
    graph = trace(model, example, rules={"mistaken::act": rule})
    generator = torch.Generator().manual_seed(seed)
    kept = {a.name: torch.randperm(a.size, generator=generator)[: max(1, a.size // 2)].tolist() for a in graph.prunable}
    made = cut(model, graph, Architecture.of(kept))
    # By the true operation, what is cut is exact. Its channels were removed by the graph, so the masks say so as well.
    masked = mask_removed(model, made.graph, made.architecture)
    assert apart(outputs(masked, example[:1]), outputs(made.model, example[:1])) <= 1e-5
    if kind not in DEPENDENT:
        larger = torch.cat([example, example.flip(3)], 3)
        assert apart(outputs(masked, larger), outputs(made.model, larger)) <= 1e-5


def rolled(site: Site) -> Site:
    return replace(site, index=np.roll(site.index, 1, axis=0))


@pytest.mark.filterwarnings("ignore:The cut model is larger")
@settings(max_examples=6)
@given(data=st.data(), name=st.sampled_from(sorted(ZOO)))
def test_sites_in_wrong_places(data, name):
    """Sites are shifted by one channel; what stays cut equals the original, masked by the true graph."""
    model, example, graph = zoo_net(name)
    axes = data.draw(st.sets(st.sampled_from([a.name for a in graph.prunable]), min_size=1, max_size=2))
    wrong = graph
    for axis in sorted(axes):
        sites = list(graph.by_name[axis].sites)
        number = data.draw(st.integers(0, len(sites) - 1))
        sites[number] = rolled(sites[number])
        changed = (replace(a, sites=tuple(sites)) if a.name == axis else a for a in wrong.axes)
        wrong = replace(wrong, axes=tuple(changed))
    kept = {a.name: range(0, a.size, 2) for a in wrong.prunable}
    made = cut(model, wrong, Architecture.of(kept))
    want = outputs(mask_removed(model, graph, made.architecture), example)
    assert apart(want, outputs(made.model, example)) <= 1e-5
