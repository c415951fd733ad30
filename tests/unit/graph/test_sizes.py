"""Python ints that count channels: which are edited, which need no edit, and which freeze their channels."""

import copy
import pickle
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cuts import apart, outputs, random_architecture
from torch import Tensor, nn
from zoo import ZOO

from secateur.architecture import Architecture
from secateur.graph import ChannelGraph, Extent, SizeEdit, trace
from secateur.graph._size_ints import (
    Arithmetic,
    Attribute,
    Literal,
    ShapeOf,
    SizeInt,
    SizeTuple,
    evaluate_expression,
    expression_of,
    expression_text,
    solve_for_attribute,
)
from secateur.prune import apply_architecture, cut, mask_removed

PLACE = Attribute("block", "groups")
WIDTH = Attribute("block", "sizes", 1)


def size(value: int, place: Attribute = PLACE) -> SizeInt:
    return SizeInt(value, place)


OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
}


@pytest.mark.parametrize("operator", OPERATIONS)
@pytest.mark.parametrize("pair", [(12, 5), (5, 12), (7, 7)])
def test_arithmetic_keeps_value_and_origin(operator, pair):
    act, (a, b) = OPERATIONS[operator], pair
    for left, right in ((size(a), b), (a, size(b)), (size(a), size(b, WIDTH))):
        result = act(left, right)
        assert isinstance(result, SizeInt)
        assert result == act(a, b)
        assert result.expression == Arithmetic(operator, expression_of(left), expression_of(right))


def test_negation_remembers():
    assert (-size(6)).expression == Arithmetic("-", Literal(0), PLACE)
    assert (-(0 - size(6))).expression == PLACE
    assert (-size(6), -(0 - size(6))) == (-6, 6)


def test_everything_else_is_plain_and_right():
    for result in (size(6) / 4, size(6) ** 0.5, 2.0 * size(6), size(6) // 4.0, abs(size(-6)), size(6) ** 2):
        assert not isinstance(result, SizeInt)
    assert (size(6) / 4, 2.0 * size(6), -size(6), divmod(size(7), 2)) == (1.5, 12.0, -6, (3, 1))
    assert size(6) == 6
    assert hash(size(6)) == hash(6)
    assert [0, 1, 2][size(1)] == 1
    assert list(range(size(2))) == [0, 1]


def test_size_ints_do_not_outlive_pickling_but_survive_copies():
    number = size(3)
    assert copy.deepcopy(number) is number
    assert copy.copy(number) is number
    assert type(pickle.loads(pickle.dumps(number))) is int


def test_shapes_keep_the_origin_of_their_elements():
    shape = SizeTuple((2, size(6), 4))
    assert shape == torch.Size([2, 6, 4])
    assert expression_of(shape[1]) == PLACE
    assert expression_of(shape[1:][0]) == PLACE
    assert expression_of((shape + shape)[4]) == PLACE
    assert shape.numel() == 48
    assert isinstance(shape.numel(), SizeInt)
    b, c, h = shape
    assert (b, c, h) == (2, 6, 4)


WIDE, HALF = Extent(0, (("a", 1),)), Extent(4, (("a", 2), ("b", 4)))


def found(expression, **edited: Extent) -> Extent | None:
    values = {Attribute("", name): extent.at({"a": 8, "b": 8}) for name, extent in edited.items()} | {PLACE: 3}
    attributes = {Attribute("", name): extent for name, extent in edited.items()}
    return evaluate_expression(expression, attributes=attributes, values=values, measure=lambda ids: Extent(len(ids)))


W, H = Attribute("", "wide"), Attribute("", "half")


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        (Literal(5), Extent(5)),
        (PLACE, Extent(3)),
        (W, WIDE),
        (Arithmetic("+", W, H), Extent(4, (("a", 3), ("b", 4)))),
        (Arithmetic("-", W, W), Extent(0)),
        (Arithmetic("*", Literal(3), W), Extent(0, (("a", 3),))),
        (Arithmetic("*", W, PLACE), Extent(0, (("a", 3),))),
        (Arithmetic("*", W, H), None),
        (Arithmetic("//", H, Literal(2)), Extent(2, (("a", 1), ("b", 2)))),
        (Arithmetic("//", W, Literal(2)), None),
        (Arithmetic("//", H, W), None),
        (Arithmetic("//", Literal(7), PLACE), Extent(2)),
        (Arithmetic("%", H, Literal(2)), Extent(0)),
        (Arithmetic("%", H, Literal(4)), None),
        (Arithmetic("//", H, Literal(0)), None),
        (Arithmetic("+", Arithmetic("*", W, H), Literal(1)), None),
    ],
    ids=expression_text,
)
def test_expressions_are_linear_functions_of_the_widths_or_nothing(expression, result):
    assert found(expression, wide=WIDE, half=HALF) == result


def test_expressions_are_said_in_words():
    shape = ShapeOf(np.arange(4))
    assert expression_text(Arithmetic("//", shape, WIDTH)) == "(x.shape[...] // block.sizes[1])"
    assert expression_text(Arithmetic("+", Attribute("", "low"), Literal(2))) == "(low + 2)"


def edits(graph: ChannelGraph) -> dict[tuple[str, str, int | None], Extent]:
    return {(e.module, e.attribute, e.item): e.extent for e in graph.edits}


@pytest.mark.parametrize("kind", [tuple, list])
def test_split_sizes_are_edited_and_keep_their_type(kind):
    model, example = ZOO["split"]()
    model.sizes = kind(model.sizes)
    graph = trace(model, example)
    assert edits(graph) == {
        ("", "sizes", 0): Extent(0, (("stem.0", 1),)),
        ("", "sizes", 1): Extent(0, (("stem.0#2", 1),)),
    }
    architecture = random_architecture(graph, 3)
    small = apply_architecture(model, graph, architecture)
    assert type(small.sizes) is kind
    assert small.sizes == kind([architecture.widths["stem.0"], architecture.widths["stem.0#2"]])
    assert all(type(number) is int for number in small.sizes)
    assert model.sizes == kind([8, 6])


def test_pad_amounts_are_edited_one_by_one():
    model, example = ZOO["option_a_residual"]()
    graph = trace(model, example)
    assert edits(graph) == {
        ("2.shortcut", "low", None): Extent(0, (("2.conv2", 1),)),
        ("2.shortcut", "high", None): Extent(0, (("2.conv2#2", 1),)),
        ("4.shortcut", "low", None): Extent(0, (("4.conv2", 1),)),
        ("4.shortcut", "high", None): Extent(0, (("4.conv2#2", 1),)),
    }


def test_groups_of_a_depthwise_convolution_are_edited():
    model, example = ZOO["depthwise_separable"]()
    assert ("1.0", "groups", None) in edits(trace(model, example))


@pytest.mark.parametrize("name", ["view_linear", "shuffle_v2", "gated_chunk", "flatten_linear", "pixel_shuffle"])
def test_sizes_computed_from_shapes_need_no_edit(name):
    model, example = ZOO[name]()
    graph = trace(model, example)
    assert {e.attribute for e in graph.edits} <= {"groups"}
    assert graph.prunable


class Resized(nn.Module):
    """The stem's 12 channels go through some code with sizes in it, and come out as 12 again."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor], arriving: int = 12, **sizes: object):
        super().__init__()
        for key, value in sizes.items():
            setattr(self, key, value)
        self.code = code
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.head = nn.Conv2d(arriving, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.code(self, self.stem(x).relu())).mean((2, 3))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def traced(model: nn.Module) -> ChannelGraph:
    graph = trace(model.eval(), IMAGES)
    for seed in range(2):
        made = cut(model, graph, random_architecture(graph, seed))
        assert made.verification.frozen == ()
        assert apart(outputs(mask_removed(model, graph, made.architecture), IMAGES), outputs(made.model, IMAGES)) < 1e-5
    return graph


def frozen(graph: ChannelGraph) -> list[str]:
    """Reasons of the axes of the stem's output channels that stay."""
    return [
        a.frozen_because
        for a in graph.axes
        if a.frozen_because and any(s.tensor == "stem.weight" and s.dim == 0 for s in a.sites)
    ]


FOLLOWING: dict[str, Resized] = {
    "attribute": Resized(lambda m, x: x.view(x.shape[0], m.width, 64).view_as(x), width=12),
    "constant_pad": Resized(lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 2))[:, :-2]),
    "unflatten": Resized(lambda m, x: x.unflatten(1, (3, m.per)).transpose(1, 2).flatten(1, 2), per=4),
    "unflatten_minus_one": Resized(lambda m, x: x.unflatten(1, (3, -1)).flatten(1, 2)),
    "narrow": Resized(lambda m, x: torch.cat([x.narrow(1, 0, m.low), x.narrow(1, m.low, m.high)], 1), low=5, high=7),
    "narrow_by_name": Resized(
        lambda m, x: torch.cat([x.narrow(dim=1, start=0, length=m.low), x[:, m.low :]], 1), low=5
    ),
    "slice": Resized(lambda m, x: torch.cat([x[:, : m.low], x[:, m.low :]], 1), low=5),
    "slice_from_the_end": Resized(lambda m, x: torch.cat([x[:, : -m.last], x[:, -m.last :]], 1), last=5),
    "split_by_one_size": Resized(lambda m, x: torch.cat(x.split(m.each, 1), 1), each=4),
    "shape_slices": Resized(lambda m, x: x.reshape(*x.shape[:2], -1).view(x.shape)),
    "size_method": Resized(lambda m, x: x.view(x.size(0), x.size(1), -1).view(*x.size())),
    "half_the_shape": Resized(lambda m, x: x.view(x.shape[0], 2, x.shape[1] // 2, 8, 8).flatten(1, 2)),
    "expand": Resized(lambda m, x: x.mean((2, 3), keepdim=True).expand(-1, x.shape[1], 8, 8) + x),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_sizes_that_follow(name):
    graph = traced(FOLLOWING[name])
    assert frozen(graph) == []
    assert all(axis.size >= 2 for axis in graph.prunable)


FREEZING: dict[str, tuple[Resized, str]] = {
    "literal_view": (
        Resized(lambda m, x: x.view(-1, 12, 64).view_as(x)),
        r"`view` in the model itself takes the size 12",
    ),
    "literal_reshape": (
        Resized(lambda m, x: x.reshape((-1, 12, 8, 8))),
        r"`reshape` in .* takes the size 12, which cannot",
    ),
    "literal_slice": (
        Resized(lambda m, x: torch.cat([x[:, :5], x[:, 5:]], 1)),
        r"`__getitem__` in .* takes the size 5",
    ),
    "literal_split": (Resized(lambda m, x: torch.cat(x.split([5, 7], 1), 1)), r"`split` in .* takes the size [57]"),
    "literal_narrow": (
        Resized(lambda m, x: torch.cat([x.narrow(1, 0, 5), x.narrow(1, 5, 7)], 1)),
        r"`narrow` in .* takes the size [57]",
    ),
    "literal_unflatten": (
        Resized(lambda m, x: x.unflatten(1, (3, 4)).flatten(1, 2)),
        r"`unflatten` in .* takes the size 4",
    ),
    "literal_pad": (
        Resized(lambda m, x: x + F.pad(m.narrow(x), (0, 0, 0, 0, 2, 2)), narrow=nn.Conv2d(12, 8, 1)),
        r"`pad` in .* takes the size 2",
    ),
    "product": (
        Resized(lambda m, x: x.reshape(-1, 2 * m.half, 64).view_as(x), half=6),
        r"takes the size \(2 \* half\)",
    ),
}


@pytest.mark.parametrize("name", FREEZING)
def test_sizes_that_cannot_follow_freeze_what_they_count(name):
    model, reason = FREEZING[name]
    graph = traced(model)
    assert frozen(graph)
    assert graph.edits == ()
    for found_reason in frozen(graph):
        assert re.search(reason, found_reason), found_reason


class SlicedBias(nn.Module):
    """The middle third of a bias is set to zero by its length, as Swin v2 of torchvision does with that of the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 12)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.body.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        first, second, third = F.linear(x.mean((2, 3)), self.body.weight, bias).chunk(3, 1)
        return self.last(first * second + third)


def test_the_number_of_elements_follows():
    graph = traced(SlicedBias())
    assert graph.sizes == {"body": 4}


class TwoUses(nn.Module):
    """One attribute counts the channels of two independent convolutions."""

    def __init__(self, order: tuple[str, str]):
        super().__init__()
        self.width = 6
        self.order = order
        self.left = nn.Conv2d(3, 6, 1)
        self.right = nn.Conv2d(3, 6, 1)
        self.head_left = nn.Conv2d(6, 4, 1)
        self.head_right = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        made = {}
        for name in self.order:
            made[name] = getattr(self, name)(x).relu().view(x.shape[0], self.width, 64)
        left = self.head_left(made["left"].unflatten(2, (8, 8)))
        return (left * self.head_right(made["right"].unflatten(2, (8, 8)))).mean((2, 3))


@pytest.mark.parametrize("order", [("left", "right"), ("right", "left")])
def test_two_things_counted_by_one_attribute_are_tied(order):
    graph = traced(TwoUses(order))
    assert [(edit.attribute, edit.extent) for edit in graph.edits] == [("width", Extent(0, (("left", 1),)))]
    assert graph.sizes == {"left": 6}
    assert {s.tensor for s in graph.by_name["left"].sites} >= {"left.weight", "right.weight"}


class Parts(nn.Module):
    """A convolution split by arithmetic of two attributes, as SHViT and selective kernels write it."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.part, self.total, self.paths = 10, 4, 6, 2
        self.body = nn.Conv2d(3, 10, 1)
        self.first = nn.Conv2d(4, 4, 1)
        self.second = nn.Conv2d(6, 4, 1)
        self.wide = nn.Conv2d(3, 6, 1)
        self.last = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.body(x).split([self.part, self.dim - self.part], 1)
        left, right = self.wide(x).split(self.total // self.paths, 1)
        return (self.first(first) + self.second(second)).mean((1, 2, 3)) + self.last(left * right).mean((1, 2, 3))


def test_attributes_inside_arithmetic_follow():
    model = Parts().eval()
    graph = traced(model)
    assert graph.sizes["body"] == 4
    assert graph.sizes["body#2"] == 6
    small = apply_architecture(model, graph, Architecture.of({"body": [0, 2, 3], "body#2": [1, 5], "wide": [0]}))
    assert (small.part, small.dim, small.total, small.paths) == (3, 5, 2, 2)


def test_the_inverse_of_an_expression():
    a, b = Attribute("", "a"), Attribute("", "b")
    width = Extent(0, (("x", 2),))

    def known(expression):
        return {b: Extent(3), Literal(2): Extent(2), Literal(0): Extent(0)}.get(expression)

    assert solve_for_attribute(a, width, known) == (a, width)
    assert solve_for_attribute(Arithmetic("*", a, Literal(2)), width, known) == (a, Extent(0, (("x", 1),)))
    assert solve_for_attribute(Arithmetic("*", Literal(2), a), width, known) == (a, Extent(0, (("x", 1),)))
    assert solve_for_attribute(Arithmetic("*", a, b), width, known) is None
    assert solve_for_attribute(Arithmetic("*", a, Literal(0)), width, known) is None
    assert solve_for_attribute(Arithmetic("+", b, a), width, known) == (a, Extent(-3, (("x", 2),)))
    assert solve_for_attribute(Arithmetic("-", a, b), width, known) == (a, Extent(3, (("x", 2),)))
    assert solve_for_attribute(Arithmetic("-", b, a), width, known) is None
    assert solve_for_attribute(Arithmetic("//", a, b), width, known) == (a, Extent(0, (("x", 6),)))
    assert solve_for_attribute(Literal(2), width, known) is None


def test_an_attribute_also_used_for_something_fixed_is_not_edited():
    model = Resized(lambda m, x: x.view(-1, m.width, 64).unflatten(2, (8, 8))[..., : m.width], width=12)
    graph = traced(model)
    assert graph.edits == ()
    assert frozen(graph) == ["`__getitem__` in the model itself needs width as it is"]


def test_an_attribute_that_counts_the_same_axis_twice_is_edited_once():
    model = Resized(lambda m, x: x.view(-1, m.width, 64).reshape(-1, m.width, 8, 8), width=12)
    assert edits(traced(model)) == {("", "width", None): Extent(0, (("stem", 1),))}


@pytest.mark.parametrize("name", ["split", "option_a_residual", "depthwise_separable", "shuffle_v1"])
def test_edited_models_hold_plain_ints(name):
    model, example = ZOO[name]()
    graph = trace(model, example)
    small = apply_architecture(model, graph, random_architecture(graph, 0))
    for module in (*small.modules(), *model.modules()):
        for value in vars(module).values():
            items = value if isinstance(value, (tuple, list)) else [value]
            assert not any(isinstance(item, SizeInt) for item in items)


def test_edit_is_a_record():
    edit = SizeEdit("a.b", "sizes", 1, WIDE)
    assert edit == SizeEdit("a.b", "sizes", 1, Extent(0, (("a", 1),)))
