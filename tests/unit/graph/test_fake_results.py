"""Tracing skips most of the arithmetic, unless the values are read."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import ZOO

from secateur.errors import TraceError
from secateur.graph import trace
from secateur.graph._record import FAKE_RESULTS, FakeValueReadError, RecordingContext, make_fake_result, record_once
from secateur.graph.trace import positional_arguments

ATEN = torch.ops.aten
LAST = torch.channels_last
USUAL = [1, 1], [0, 0], [1, 1], False, [0, 0], 1


def image(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", list(ZOO))
def test_what_is_learned_is_the_same_with_every_number(name):
    """The calls, their order, their shapes and all that follows from them, in every net of the zoo."""
    model, example = ZOO[name]()
    example = positional_arguments(model, example)
    lean, full = RecordingContext({}, computed=False), RecordingContext({}, computed=True)
    try:
        ledger, attributes = record_once(model, example, lean, None)
    except FakeValueReadError:
        pytest.skip("its numbers are read")
    wanted, wanted_attributes = record_once(model, example, full, None)
    assert any(lean.flow.fake)
    assert (lean.flow.names, lean.flow.sources, lean.flow.returned) == (
        full.flow.names,
        full.flow.sources,
        full.flow.returned,
    )
    assert attributes == wanted_attributes
    assert [(call.module, call.output_shape) for call in lean.flow.calls] == [
        (call.module, call.output_shape) for call in full.flow.calls
    ]
    for mine, theirs in ((ledger.ties, wanted.ties), (ledger.freezes, wanted.freezes)):
        assert [str(item) for item in mine] == [str(item) for item in theirs]


def layout(found) -> list[tuple]:
    tensors = found if isinstance(found, tuple) else (found,)
    return [(t.shape, t.stride(), t.dtype) for t in tensors]


CONVOLUTIONS = [
    ((2, 4, 9, 8), (6, 4, 3, 3), [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
    ((1, 4, 9, 8), (6, 2, 3, 2), [2, 1], [0, 1], [2, 1], False, [0, 0], 2),
    ((1, 4, 1, 1), (6, 4, 1, 1), [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    ((1, 6, 9, 8), (6, 1, 3, 3), [1, 1], [1, 1], [1, 1], False, [0, 0], 6),
    ((1, 4, 5, 6), (4, 3, 3, 3), [2, 2], [1, 1], [1, 1], True, [1, 1], 2),
    ((1, 4, 7), (6, 4, 3), [2], [1], [1], False, [0], 1),
    ((1, 2, 5, 5, 5), (3, 2, 3, 3, 3), [1, 1, 1], [0, 0, 0], [1, 1, 1], False, [0, 0, 0], 1),
]


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_convolution_that_is_not_computed_has_its_shape_and_layout(case, biased, dtype):
    shape, weight, *rest = case
    channels = weight[1] * rest[-1] if rest[3] else weight[0]
    args = [image(*shape).to(dtype), image(*weight).to(dtype), image(channels).to(dtype) if biased else None, *rest]
    assert layout(make_fake_result(ATEN.convolution.default, args, {})) == layout(ATEN.convolution.default(*args))
    if len(shape) == 4:
        for position in (0, 1):
            args[position] = args[position].clone(memory_format=LAST)
            assert make_fake_result(ATEN.convolution.default, args, {}) is None


@pytest.mark.parametrize(
    ("product", "args"),
    [
        (ATEN.mm.default, (image(3, 4), image(5, 4).t())),
        (ATEN.addmm.default, (image(5), image(4, 3).t(), image(4, 5))),
        (ATEN.addmm.default, (image(3, 5), image(3, 4), image(4, 5))),
        (ATEN.bmm.default, (image(2, 3, 4), image(2, 5, 4).transpose(1, 2))),
        (ATEN.bmm.default, (image(3, 2, 4).transpose(0, 1), image(2, 4, 5))),
        (ATEN.native_batch_norm.default, (image(2, 3, 4, 5), *[image(3).abs()] * 4, False, 0.1, 1e-5)),
        (ATEN.native_batch_norm.default, (image(1, 3, 1, 1), *[image(3).abs()] * 4, False, 0.1, 1e-5)),
        (ATEN.native_batch_norm.default, (image(2, 3), None, None, *[image(3).abs()] * 2, False, 0.1, 1e-5)),
        (ATEN.add.Tensor, (image(2, 3, 4, 5), image(2, 3, 4, 5))),
        (ATEN.mul.Tensor, (image(1, 3, 1, 1), image(1, 3, 1, 1))),
        (ATEN._scaled_dot_product_flash_attention_for_cpu.default, [image(2, 3, 5, 8)] * 3),
        (
            ATEN._scaled_dot_product_flash_attention_for_cpu.default,
            [image(2, 5, 3, 8).transpose(1, 2), *[image(2, 3, 7, 8)] * 2],
        ),
        *[
            (operation, (image(*shape),))
            for operation in FAKE_RESULTS
            if operation._schema.name.split("::")[1] in {"relu", "silu", "gelu", "hardswish", "sigmoid"}
            for shape in ((2, 3, 4, 5), (1, 3, 1, 1), (4,))
        ],
    ],
)
def test_what_is_not_computed_has_its_shapes_and_layout(product, args):
    assert layout(make_fake_result(product, args, {})) == layout(product(*args))


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 6, 20, 16)])
def test_attention_with_a_bias_and_a_scale_stays_so(shape):
    operation = ATEN._scaled_dot_product_flash_attention_for_cpu.default
    args, kwargs = [image(*shape)] * 3, {"attn_mask": image(1, 1, shape[2], shape[2]), "scale": 0.3}
    assert layout(make_fake_result(operation, args, kwargs)) == layout(operation(*args, **kwargs))


def test_an_operation_in_place_returns_what_it_is_given():
    x = image(2, 3)
    before = x.clone()
    assert make_fake_result(ATEN.relu_.default, (x,), {}) is x
    assert make_fake_result(ATEN.add_.Tensor, (x, image(2, 3)), {"alpha": 2}) is x
    assert x.equal(before)


@pytest.mark.parametrize(
    ("product", "args"),
    [
        (ATEN.mm.default, (image(3, 4), image(5, 4))),
        (ATEN.mm.default, (image(3, 4), image(4, 5).double())),
        (ATEN.mm.default, (torch.ones(3, 4, dtype=torch.int64), torch.ones(4, 5, dtype=torch.int64))),
        (ATEN.mm.default, (image(0, 4), image(4, 5))),
        (ATEN.addmm.default, (image(1), image(3, 4), image(4, 5))),
        (ATEN.convolution.default, (image(1, 3, 2, 2), image(5, 3, 3, 3), None, *USUAL)),
        (ATEN.convolution.default, (image(1, 4, 9, 9), image(5, 3, 3, 3), None, *USUAL)),
        (ATEN.convolution.default, (image(1, 3, 9, 9).transpose(2, 3), image(5, 3, 3, 3), None, *USUAL)),
        (ATEN.native_batch_norm.default, (image(2, 3, 4, 5), *[image(3).abs()] * 4, True, 0.1, 1e-5)),
        (ATEN.native_batch_norm.default, (image(2, 3, 4, 5), *[image(4).abs()] * 4, False, 0.1, 1e-5)),
        (ATEN.relu.default, (image(3, 4).t(),)),
        (ATEN.add.Tensor, (image(3, 4), image(4))),
        (ATEN.add.Tensor, (image(3, 4), image(4, 3).t())),
        (ATEN.mul.Tensor, (image(3, 4), 2.0)),
        (ATEN.add_.Tensor, (image(3, 4), image(4))),
        (ATEN._scaled_dot_product_flash_attention_for_cpu.default, (*[image(2, 3, 5, 8)] * 3, 0.0, True)),
    ],
)
def test_an_unusual_or_impossible_call_is_left_to_torch(product, args):
    assert product in FAKE_RESULTS
    assert make_fake_result(product, args, {}) is None


class Reading(nn.Module):
    """Takes one of two ways, by the numbers of a convolution's result."""

    def __init__(self, read):
        super().__init__()
        self.read = read
        self.stem, self.further, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        nn.init.ones_(self.stem.weight)
        nn.init.zeros_(self.stem.bias)

    def forward(self, x):
        y = self.stem(x)
        if self.read(y):
            y = self.further(y)
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize(
    "read",
    [
        lambda y: y.max() > 0,
        lambda y: float(y.sum()) > 0,
        lambda y: y.tolist() != torch.zeros_like(y).tolist(),
        lambda y: y.detach().numpy().any(),
        lambda y: torch.equal(y, y.abs()),
        lambda y: y.data.max() > 0,
        lambda y: (y.data[:, 1:] + 1).max() > 1,
        lambda y: nn.Parameter(y).sum() > 0,
        lambda y: y.data.numpy().any(),
        lambda y: np.asarray(y).any(),
        lambda y: len(y.nonzero()) > 0,
        lambda y: len(y[y > 0]) > 0,
        lambda y: (y > 0)[0, 0, 0, 0],
        lambda y: len(torch.masked_select(y, torch.ones(1, dtype=torch.bool))) * 0 + y.max().item() > 0,
    ],
)
def test_numbers_that_are_read_are_right(read):
    """All inputs and weights are positive: with real numbers, a further layer runs."""
    model = Reading(read).eval()
    example = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    with pytest.raises(FakeValueReadError):
        record_once(model, (example,), RecordingContext({}, computed=False), None)
    assert [operation.module for operation in trace(model, example).operations] == ["stem", "further", "head"]


def test_a_model_that_catches_what_reading_raises_is_traced_with_its_numbers():
    def read(y):
        try:
            return bool(y.max() > 0)
        except Exception:
            return False

    where = RecordingContext({}, computed=False)
    with pytest.raises(FakeValueReadError):
        record_once(Reading(read).eval(), (torch.rand(1, 3, 4, 4),), where, None)
    assert where.value_was_read


def test_what_does_not_depend_on_the_input_is_computed():
    """A table made from products, kept outside of the model, holds its real numbers after a trace."""
    tables: dict[int, Tensor] = {}

    class WithTable(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4)

        def forward(self, x):
            size = x.size(0)
            if size not in tables:
                tables[size] = torch.ones(size, 2) @ torch.ones(2, 6)
            return self.second(self.first(x) + tables[size])

    graph = trace(WithTable().eval(), image(1, 3))
    assert tables[1].tolist() == [[2.0] * 6]
    assert graph.by_name["first"].frozen_because is not None


@pytest.mark.parametrize("name", ["relu", "aten::relu"])
def test_an_operation_with_a_rule_of_the_users_own_gets_its_numbers(name):
    seen: list[float] = []

    def rule(call):
        seen.append(float(call.inputs[0].abs().max()))
        return [call.ids(call.inputs[0])]

    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    nn.init.ones_(model[0].bias)
    graph = trace(model, image(1, 3), rules={name: rule})
    assert seen[-1] > 0
    assert [axis.name for axis in graph.prunable] == ["0"]


def test_a_mistaken_example_is_refused_as_ever():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    for example in (image(1, 4, 9, 9), image(1, 3, 4, 4)):
        with pytest.raises(TraceError, match="cannot run the example input"):
            trace(model, example)


def test_an_index_of_its_own_needs_no_numbers():
    class Picking(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4)
            self.register_buffer("order", torch.tensor([2, 0, 1]))

        def forward(self, x):
            return self.second(F.relu(self.first(x))[:, self.order])

    where = RecordingContext({}, computed=False)
    ledger, _ = record_once(Picking().eval(), (image(1, 5, 3),), where, None)
    assert any(where.flow.fake)
    assert ledger.count > 0
