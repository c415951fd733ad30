"""Sizes as strangers write them: compared, looked up, rounded, held in configurations, numpy or tensors.

Each is followed, or freezes exactly the channels that it counts, with the reason. The cut keeps what was promised.
"""

import argparse
import collections
import functools
import math
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from resized_nets import IMAGES, Resized, kept_promises, net, reasons
from torch import Tensor, nn

from secateur.architecture import Architecture
from secateur.graph import trace
from secateur.prune import apply_architecture

Code = Callable[[nn.Module, Tensor], Tensor]


@dataclass
class Config:
    dim: int = 12
    parts: list[int] = field(default_factory=lambda: [5, 7])


@dataclass(frozen=True)
class FrozenConfig:
    dim: int = 12


class PlainConfig:
    def __init__(self) -> None:
        self.dim, self.inner = 12, {"dim": 12}


Parts = collections.namedtuple("Parts", "low high")


def refuses_others(m, x):
    if x.shape[1] != m.dim:
        raise ValueError(f"expected {m.dim} channels, got {x.shape[1]}")
    return x


def asserts(m, x):
    assert x.shape[1] == m.dim
    return x


def asserts_for_export(m, x):
    torch._assert(x.shape[1] == m.dim, "other channels")
    return x


def asserts_the_weight(m, x):
    assert x.shape[1] == m.head.in_channels == m.head.weight.shape[1]
    return x


def asserts_equal_shapes(m, x):
    y = m.other(x)
    assert y.shape == x.shape
    return torch.cat([x, y], 1)


def asserts_types(m, x):
    assert isinstance(x.shape[1], int)
    assert isinstance(x.shape, torch.Size)
    return x


def pads_if_narrow(m, x):
    y = m.small(x)
    if y.shape[1] < x.shape[1]:
        y = F.pad(y, (0, 0, 0, 0, 0, x.shape[1] - y.shape[1]))
    return x + y


def fills_up(m, x):
    y = m.small(x)
    return x + torch.cat([y, y.new_zeros(y.shape[0], x.shape[1] - y.shape[1], 8, 8)], 1)


def walks(m, x):
    pieces, start = [], 0
    for size in m.parts:
        pieces.append(x[:, start : start + size])
        start += size
    return torch.cat(pieces[::-1], 1)


def swaps(x: Tensor, at: int) -> Tensor:
    return torch.cat([x[:, at:], x[:, :at]], 1)


def regroups(m, x):
    b, c, h, w = x.shape
    return x.view(b, m.groups, c // m.groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def divides_by_the_deviation_of_groups(m, x):
    b, c, h, w = x.shape
    assert c % m.groups == 0
    pieces = x.reshape(b, m.groups, c // m.groups, h, w)
    return x / (pieces.std((2, 3, 4), keepdim=True) + 0.1).expand(pieces.shape).reshape(b, c, h, w)


def divides_with_rest(m, x):
    groups, rest = divmod(x.shape[1], 4)
    assert rest == 0
    return x.view(x.shape[0], 4, groups, 8, 8).flatten(1, 2)


def names_the_shape(m, x):
    assert f"{x.shape[1]:4d} {x.shape} {m.dim!r}" + "%d" % m.dim  # noqa: UP031
    return x.view(x.shape[0], m.dim, 8, 8)


def keeps_a_cache(m, x):
    if getattr(m, "cache", None) is None or m.cache.shape[1] != x.shape[1]:
        m.cache = torch.ones(1, x.shape[1], 1, 1)
    return x * m.cache


def from_a_tensor(m, x):
    shape = torch.tensor(x.shape)
    return x.reshape(shape[0].item(), shape[1].item(), -1).reshape(shape.tolist())


def from_joined_tensors(m, x):
    shape = torch.tensor(x.shape)
    flat = torch.cat([shape[:2], torch.tensor([-1])])
    return x.reshape(torch.Size(flat)).reshape(torch.Size(shape))


def from_computed_tensors(m, x):
    shape = torch.tensor(x.shape)
    half = torch.div(shape[1] + 1, 2, rounding_mode="trunc") * m.one
    shape[0] = -1
    return torch.cat([x[:, half:], x[:, :half]], 1).reshape(tuple(shape))


def depthwise_by_shape(m, x):
    return F.conv2d(x, m.kernel.repeat(x.shape[1], 1, 1, 1), groups=x.shape[1], padding=1)


FOLLOWED: dict[str, Callable[[], Resized]] = {
    "raise": net(refuses_others, dim=12),
    "assert": net(asserts, dim=12),
    "torch_assert": net(asserts_for_export, dim=12),
    "declared_sizes": net(asserts_the_weight),
    "equal_shapes": net(asserts_equal_shapes, 24, other=nn.Conv2d(12, 12, 1)),
    "types": net(asserts_types),
    "min_of_a_large_number": net(lambda m, x: x[:, : min(x.shape[1], 100)]),
    "list_of_the_shape": net(lambda m, x: x if list(x.shape)[1] == m.dim else x * 0, dim=12),
    "narrower_is_padded": net(pads_if_narrow, small=nn.Conv2d(12, 8, 1)),
    "narrower_is_filled_up": net(fills_up, small=nn.Conv2d(12, 8, 1)),
    "numpy_int": net(lambda m, x: x.view(x.shape[0], m.dim, 8, 8), dim=np.int64(12)),
    "numpy_int_item": net(lambda m, x: x.view(x.shape[0], m.dim.item(), 8, 8), dim=np.int32(12)),
    "numpy_int_compared": net(asserts, dim=np.int64(12)),
    "numpy_product": net(lambda m, x: x.reshape(-1, np.prod(x.size()[1:])).view(x.shape)),
    "numpy_arithmetic": net(lambda m, x: swaps(x, np.int64(3) + m.low - np.int64(3)), low=5),
    "difference": net(lambda m, x: swaps(x, m.whole - m.part), whole=12, part=5),
    "difference_in_split": net(
        lambda m, x: torch.cat(x.split([m.part, m.whole - m.part], 1)[::-1], 1), whole=12, part=5
    ),
    "running_sum": net(walks, parts=[3, 4, 5]),
    "dataclass": net(lambda m, x: x.view(x.shape[0], m.cfg.dim, 64).view(x.shape), cfg=Config()),
    "list_in_a_dataclass": net(lambda m, x: swaps(x, m.cfg.parts[0]), cfg=Config()),
    "frozen_dataclass": net(lambda m, x: x.view(x.shape[0], m.cfg.dim, 64).view(x.shape), cfg=FrozenConfig()),
    "namespace": net(lambda m, x: x.view(1, m.cfg.dim, 64).view(x.shape), cfg=types.SimpleNamespace(dim=12)),
    "parsed_arguments": net(lambda m, x: x.view(1, m.cfg.dim, 64).view(x.shape), cfg=argparse.Namespace(dim=12)),
    "object": net(lambda m, x: x.view(x.shape[0], m.cfg.inner["dim"], 64).view(x.shape), cfg=PlainConfig()),
    "dict": net(lambda m, x: x.view(x.shape[0], m.cfg["dim"], 64).view(x.shape), cfg={"dim": 12, "name": "a"}),
    "nested": net(lambda m, x: x.view(x.shape[0], m.cfg["a"][1], 64).view(x.shape), cfg={"a": [3, 12]}),
    "named_tuple": net(lambda m, x: swaps(x, m.parts.low), parts=Parts(5, 7)),
    "mixed_tuple": net(lambda m, x: swaps(x, m.parts[1]), parts=("a", 5, None)),
    "private": net(lambda m, x: x.view(x.shape[0], m._dim, 8, 8), _dim=12),
    "rounded_half": net(lambda m, x: swaps(x, round(x.shape[1] * 0.5))),
    "ceiling_of_half": net(lambda m, x: swaps(x, math.ceil(x.shape[1] / 2))),
    "shifted": net(lambda m, x: swaps(x, x.shape[1] >> 1)),
    "negative_bound": net(lambda m, x: torch.cat([x[:, -m.low :], x[:, : -m.low]], 1), low=5),
    "absolute": net(lambda m, x: x.view(x.shape[0], abs(x.shape[1]), 64).view(x.shape)),
    "regrouped": net(regroups, groups=3),
    "deviation_of_groups": net(divides_by_the_deviation_of_groups, groups=3),
    "deviation_of_many_groups": net(divides_by_the_deviation_of_groups, groups=6),
    "divided_with_rest": net(divides_with_rest),
    "literal_groups": net(lambda m, x: x.reshape(x.size(0), -1, 4, 8, 8).sum(2).repeat_interleave(4, 1)),
    "named": net(names_the_shape, dim=12),
    "truth": net(lambda m, x: x.view(x.shape[0], m.dim, 8, 8) if m.dim else x, dim=12),
    "cache": net(keeps_a_cache),
    "repeat": net(lambda m, x: x.mean(1, keepdim=True).repeat(1, m.dim, 1, 1) + x, dim=12),
    "repeat_twice": net(lambda m, x: x.repeat(1, 2, 1, 1), 24),
    "expand": net(lambda m, x: x.mean(1, keepdim=True).expand(-1, m.dim, -1, -1) + x, dim=12),
    "expand_as": net(lambda m, x: torch.cat([x.mean(1, keepdim=True).expand_as(x), x], 1), 24),
    "view_as": net(lambda m, x: x.flatten(1).view_as(x)),
    "zeros": net(lambda m, x: x + x.new_zeros(m.dim).view(1, -1, 1, 1), dim=12),
    "layer_norm": net(lambda m, x: F.layer_norm(x.movedim(1, -1), (m.dim,)).movedim(-1, 1), dim=12),
    "parameter": net(lambda m, x: x * m.factor, factor=nn.Parameter(torch.rand(1, 12, 1, 1))),
    "fixed_scale": net(lambda m, x: x * m.scale, scale=torch.tensor(12**-0.5)),
    "own_weight": net(lambda m, x: x.view(x.shape[0], m.stem.weight.shape[0], 8, 8)),
    "own_channels": net(lambda m, x: x.view(x.shape[0], m.stem.out_channels, 8, 8)),
    "depthwise_by_shape": net(depthwise_by_shape, kernel=torch.randn(1, 1, 3, 3)),
    "depthwise_by_attribute": net(
        lambda m, x: F.conv2d(x, m.kernel, groups=m.dim), dim=12, kernel=nn.Parameter(torch.randn(12, 1, 1, 1))
    ),
    "tensor_split": net(lambda m, x: torch.cat(torch.tensor_split(x, 3, 1)[::-1], 1)),
    "tensor_of_the_shape": net(from_a_tensor),
    "joined_tensors": net(from_joined_tensors),
    "computed_tensors": net(from_computed_tensors, one=torch.tensor(1)),
    "buffer_of_a_shape": net(
        lambda m, x: x.reshape(m.flat.tolist()).reshape(torch.Size(m.back)),
        flat=torch.tensor([1, 12, 64]),
        back=torch.tensor([1, 12, 8, 8]),
    ),
    "buffer_of_a_size": net(lambda m, x: x.view(x.shape[0], m.n.item(), 8, 8), n=torch.tensor(12)),
    "list_of_slices": net(lambda m, x: torch.cat([x[[slice(None), slice(m.low, None)]], x[:, : m.low]], 1), low=5),
}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("name", FOLLOWED)
def test_sizes_that_are_followed(name):
    graph = kept_promises(FOLLOWED[name]())
    assert reasons(graph) == []
    assert all(axis.size >= 2 for axis in graph.prunable)


@functools.lru_cache
def table(width: int) -> Tensor:
    return torch.ones(1, width, 1, 1)


def in_a_loop(m, x):
    return sum(row for row in x.unbind(1)).unsqueeze(1) * x


def depends_on_narrower(m, x):
    y = m.small(x)
    return torch.cat([x, y], 1) if y.shape[1] != x.shape[1] else x + y


FROZEN: dict[str, tuple[Callable[[], Resized], str]] = {
    "greater": (net(lambda m, x: x * 2 if x.shape[1] > 8 else x), r"`>` in the model itself tests .* > 8, which fewer"),
    "in_a_tuple": (net(lambda m, x: x * 2 if x.shape[1] in (12, 24) else x), "tests .* == 12, which fewer"),
    "in_a_dict": (net(lambda m, x: x * {12: 2.0}.get(x.shape[1], 1.0)), "a lookup in the model itself"),
    "not_in_a_dict": (net(lambda m, x: x * {6: 2.0}.get(x.shape[1], 1.0)), "a lookup in the model itself"),
    "in_a_set": (net(lambda m, x: x * (2.0 if x.shape[1] in {12, 24} else 1.0)), "a lookup in the model itself"),
    "in_a_cache": (net(lambda m, x: x * table(x.shape[1])), "a lookup in the model itself"),
    "remainder": (net(lambda m, x: x * 3 if x.shape[1] % 5 else x), r"tests \(.* % 5\) != 0"),
    "tuple": (net(lambda m, x: x if x.shape[1:] == (12, 8, 8) else x * 0), r"tests .* == 12"),
    "unequal": (net(depends_on_narrower, 20, small=nn.Conv2d(12, 8, 1)), r"tests .* != "),
    "maximum": (net(lambda m, x: x[:, : max(x.shape[1], 8)]), "tests .* 8, which"),
    "scale": (net(lambda m, x: x * x.shape[1] ** -0.5), "`mul` in"),
    "square_root": (net(lambda m, x: x / math.sqrt(x.shape[1])), "`float` in"),
    "root_of_a_quotient": (net(lambda m, x: x / math.sqrt(x.shape[1] / 2)), "a float in"),
    "numpy_root": (net(lambda m, x: x / np.sqrt(x.shape[1])), "`div` in"),
    "root_of_an_attribute": (
        net(lambda m, x: x.view(x.shape[0], m.dim, 8, 8) / math.sqrt(m.dim), dim=12),
        "`float` in the model itself needs dim as it is",
    ),
    "declared_scale": (net(lambda m, x: x / m.stem.out_channels), "`div` in"),
    "square": (net(lambda m, x: x / x.shape[1] ** 2), r"`\*\*` in"),
    "mean_by_hand": (net(lambda m, x: x - x.sum(1, keepdim=True) / x.shape[1]), "`div` in"),
    "added": (net(lambda m, x: x + x.shape[1]), "`add` in"),
    "threshold": (net(lambda m, x: x * (x > x.shape[1] / 100)), "`gt` in"),
    "made_an_int": (net(lambda m, x: x.view(int(x.shape[0]), int(x.shape[1]), 8, 8)), "`int` in"),
    "mapped_to_ints": (net(lambda m, x: x.view(*map(int, x.shape))), "`int` in"),
    "int_compared": (net(lambda m, x: x * (2 if int(x.shape[1]) == 12 else 1)), "`int` in"),
    "a_third": (net(lambda m, x: swaps(x, int(x.shape[1] * 0.34))), "`int` in"),
    "numpy_array": (net(lambda m, x: x if np.array(x.shape)[1] == 12 else x * 0), "`int` in"),
    "numpy_attribute": (net(lambda m, x: x.view(x.shape[0], m.dims[0], 8, 8), dims=np.array([12, 3])), "the size 12"),
    "interpolated_to": (net(lambda m, x: F.interpolate(x, size=(x.shape[1], 4))), "`interpolate` in"),
    "arange": (net(lambda m, x: x + torch.arange(m.dim).view(1, -1, 1, 1), dim=12), "does not follow"),
    "one_hot": (net(lambda m, x: x * F.one_hot(torch.tensor(3), m.dim).view(1, -1, 1, 1), dim=12), "does not follow"),
    "last_channel": (net(lambda m, x: x * x[:, x.shape[1] - 1].unsqueeze(1)), "picks single channels"),
    "loop": (net(in_a_loop), "picks single channels"),
    "slices_in_a_loop": (
        net(lambda m, x: torch.cat([x[:, i : i + 1] for i in range(m.dim)], 1), dim=12),
        "picks single channels",
    ),
    "literal_repeat": (net(lambda m, x: x.mean(1, keepdim=True).repeat(1, 12, 1, 1) + x), "does not follow"),
    "repeated_list": (net(lambda m, x: x * sum([1.0] * x.shape[1])), r"`\*` of a sequence in"),
    "tensor_compared": (net(lambda m, x: x * 2 if torch.tensor(x.shape)[1] == 12 else x), "tests .* == 12"),
    "length": (net(lambda m, x: x * len(m.stem.weight)), "`__len__` in"),
    "split_at": (net(lambda m, x: torch.cat(torch.tensor_split(x, (5,), 1)[::-1], 1)), "the size 5"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_sizes_that_freeze_what_they_count(name):
    make, reason = FROZEN[name]
    graph = kept_promises(make())
    assert reasons(graph)
    for found in reasons(graph):
        assert re.search(reason, found), found


def test_edited_configurations_belong_to_the_cut_model():
    config, listed = Config(), {"a": [3, 12]}
    model = Resized(lambda m, x: swaps(x, m.cfg.parts[0]).view(1, m.listed["a"][1], 8, 8), cfg=config, listed=listed)
    model.array = np.int64(12)
    model.code, code = (lambda m, x: code(m, x).view(1, m.array, 8, 8)), model.code
    graph = trace(model.eval(), IMAGES)
    small = apply_architecture(model, graph, Architecture.of({"stem": range(2), "stem#2": range(3)}))
    assert (small.cfg.parts, small.listed, small.array) == ([2, 7], {"a": [3, 5]}, 5)
    assert type(small.array) is np.int64
    assert (config.parts, listed, model.array) == ([5, 7], {"a": [3, 12]}, 12)
    for value in (small.cfg.parts[0], small.listed["a"][1], model.cfg.parts[0], model.listed["a"][1]):
        assert type(value) is int


def test_a_shared_configuration_is_edited_for_all_that_read_it():
    class Reader(nn.Module):
        def __init__(self, config: Config) -> None:
            super().__init__()
            self.config = config

        def forward(self, x: Tensor) -> Tensor:
            return x.view(x.shape[0], self.config.dim, 64).view(x.shape)

    config = Config()
    both = nn.ModuleList([Reader(config), Reader(config)])
    graph = kept_promises(Resized(lambda m, x: m.both[1](m.both[0](x)), both=both))
    assert [(edit.attribute, edit.item) for edit in graph.edits] == [("config", "dim")]
    assert reasons(graph) == []


def test_equal_tuples_of_two_modules_are_two():
    """Python may keep one object for both."""
    sizes = (5, 7)

    class Swap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sizes = sizes
            self.mix = nn.Conv2d(12, 12, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(torch.cat(x.split(self.sizes, 1)[::-1], 1))

    both = nn.Sequential(Swap(), Swap())
    graph = kept_promises(Resized(lambda m, x: m.both(x), both=both))
    assert {edit.module for edit in graph.edits} == {"both.0", "both.1"}
    assert reasons(graph) == []


def test_a_buffer_that_holds_a_shape_is_edited_in_the_cut_model():
    model = Resized(lambda m, x: x.reshape(m.flat.tolist()).view(x.shape), flat=torch.tensor([1, 12, 64])).eval()
    graph = trace(model, IMAGES)
    small = apply_architecture(model, graph, Architecture.of({"stem": range(5)}))
    assert small.flat.tolist() == [1, 5, 64]
    assert model.flat.tolist() == [1, 12, 64]


def test_the_graph_does_not_depend_on_what_ran_before():
    """A cache of the model's code may hold results of earlier runs, and sizes of earlier traces."""
    shapes: dict[object, object] = {}

    def cached(m, x):
        try:  # As einops does it for PyTorch's symbolic sizes.
            shape = shapes.setdefault(x.shape, x.shape)
        except TypeError:
            shape = x.shape
        return x.view(shape[0], shape[1], 64).view(x.shape)

    fresh = kept_promises(Resized(cached))
    with torch.no_grad():
        Resized(cached)(IMAGES)
    for _ in range(2):
        again = trace(Resized(cached).eval(), IMAGES)
        assert again.sizes == fresh.sizes
        assert "stem" in again.sizes


def test_what_is_compared_without_channels_freezes_nothing():
    def code(m, x):
        assert x.shape[2] == x.shape[3] == 8
        assert x.shape[0] in {1, 2, 3}
        return x[..., : max(x.shape[2], 3)] if m.kernel == 3 and m.kernel in {3, 5} else x

    assert reasons(kept_promises(Resized(code, kernel=3))) == []


class Shuffle(nn.Module):
    """A channel shuffle and a chunk, as converters of ONNX write them: all sizes are computed in tensors."""

    def __init__(self) -> None:
        super().__init__()
        for name, value in {"batch": 0, "axis": 1, "two": 2, "zero": 0}.items():
            self.register_buffer(name, torch.tensor([value]))
        self.register_buffer("split", torch.tensor([1, 2, 12, 8, 8]))

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(torch.Size(self.split)).transpose(1, 2)
        width = torch.tensor(x.shape)[self.axis] * torch.tensor(x.shape)[self.two]
        x = x.reshape(torch.Size(torch.cat([torch.tensor(x.shape)[self.batch], width, torch.tensor([8, 8])])))
        half = torch.div(torch.tensor(x.shape)[self.axis] + 1, self.two, rounding_mode="trunc") * torch.tensor([1])
        slices = [slice(None), slice(self.zero[0], half[0], 1)]
        return x[slices] + x[[slice(None), slice(half[0], (half * 2)[0], 1)]]


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_networks_that_were_converted_from_onnx_keep_their_axes():
    both = nn.Conv2d(12, 12, 1)
    graph = kept_promises(Resized(lambda m, x: m.shuffle(torch.cat([x, m.both(x)], 1)), both=both, shuffle=Shuffle()))
    assert reasons(graph) == []
    assert {"stem", "both"} & set(graph.sizes)


def test_weights_in_buffers_are_cut_and_checked_like_parameters():
    class Buffered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(4, 10), nn.Linear(6, 3)
            self.last = nn.Linear(3, 2)
            for name, shape in {"one": (10, 8), "shift": (8,), "two": (8, 6)}.items():
                self.register_buffer(name, torch.randn(shape, generator=torch.Generator().manual_seed(len(name))))

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.first(x).relu() @ self.one + self.shift)
            return self.last(self.head((x @ self.two).relu()).relu())

    graph = kept_promises(Buffered(), torch.randn(1, 4, generator=torch.Generator().manual_seed(0)))
    assert graph.sizes == {"one": 8, "first": 10, "two": 6, "head": 3}
