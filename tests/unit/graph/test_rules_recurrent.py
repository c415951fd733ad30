"""Recurrent layers: their inputs, units and projections are followed, cut exactly, and counted."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cuts import apart, blind_to_removed, outputs, random_architecture
from recurrent_nets import BATCH, CRNN, RECURRENT, STEPS, Between, CellLoop, With, seeded
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.architecture import Architecture
from secateur.cost import CostModel, count_macs, count_params
from secateur.graph import trace
from secateur.graph._record import FAKE_RESULTS, FakeValueReadError, RecordingContext, make_fake_result, record_once
from secateur.graph.channel_rules.recurrent import WholeCallMode
from secateur.graph.trace import positional_arguments
from secateur.prune import apply_architecture, cut, mask_removed

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
LAYERS: list[tuple[str, dict[str, Any]]] = [
    (kind, {"num_layers": layers, "bidirectional": both, "batch_first": first, "bias": bias, **more})
    for kind, more in [*((kind, {}) for kind in GATES), ("LSTM", {"proj_size": 3}), ("RNN", {"nonlinearity": "relu"})]
    for layers, both, first, bias in itertools.product((1, 2), (False, True), (False, True), (False, True))
]
IDS = ["-".join([kind, *(f"{name}={value}" for name, value in settings.items())]) for kind, settings in LAYERS]


def macs_by_hand(layer: nn.RNNBase, steps: int) -> int:
    """Every weight of every matrix once a step: gates * H * (I + R), and P * H with a projection, R = P or H."""
    gates, hidden = GATES[layer.mode.partition("_")[0]], layer.hidden_size
    directions, read = 1 + layer.bidirectional, layer.proj_size or layer.hidden_size
    total, entering = 0, layer.input_size
    for _ in range(layer.num_layers):
        total += directions * (gates * hidden * (entering + read) + layer.proj_size * hidden)
        entering = directions * read
    return steps * total


def rebuilt(kind: str, settings: dict[str, Any], layer: nn.RNNBase, kept: Sequence[Sequence[int]]) -> nn.RNNBase:
    """A new, narrower layer with the weights of some inputs, units and outputs of projections, picked by hand."""
    inputs, units, read = (np.array(positions) for positions in kept)
    sized = settings | ({"proj_size": len(read)} if layer.proj_size else {})
    small = getattr(nn, kind)(len(inputs), len(units), **sized)
    rows = np.concatenate([units + gate * layer.hidden_size for gate in range(GATES[kind])])
    both = np.concatenate(
        [read + way * (layer.proj_size or layer.hidden_size) for way in range(1 + layer.bidirectional)]
    )
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            columns = {"ih": inputs if "_l0" in name else both, "hh": read, "hr": units}[name.split("_")[1]]
            part = weight[read if "_hr_" in name else rows]
            small.get_parameter(name).copy_(part[:, columns] if weight.dim() == 2 else part)
    return small


@pytest.mark.parametrize(("kind", "settings"), LAYERS, ids=IDS)
def test_a_layer_of_any_kind_is_cut_to_the_one_that_was_rebuilt_by_hand(kind: str, settings: dict[str, Any]):
    model, (x,) = seeded(lambda: Between(getattr(nn, kind)(6, 8, **settings)))
    layer: Any = model.layer
    graph = trace(model, x)
    assert {axis.name: axis.size for axis in graph.prunable} == {
        "inner": 6, "layer": 8, **({"layer#2": 3} if layer.proj_size else {}),
    }  # fmt: skip
    inputs, units, read = (0, 2, 5), (1, 2, 4, 5, 7), ((0, 2) if layer.proj_size else (1, 2, 4, 5, 7))
    kept = {"inner": inputs, "layer": units} | ({"layer#2": read} if layer.proj_size else {})
    made = cut(model, graph, Architecture.of(kept))
    assert not made.verification.frozen

    small: Any = made.model.layer
    assert (small.input_size, small.hidden_size, small.proj_size) == (3, 5, 2 if layer.proj_size else 0)
    by_hand = rebuilt(kind, settings, layer, (inputs, units, read))
    assert {n: t.shape for n, t in small.state_dict().items()} == {n: t.shape for n, t in by_hand.state_dict().items()}
    assert all(torch.equal(t, by_hand.state_dict()[n]) for n, t in small.state_dict().items())
    y = torch.randn(STEPS, BATCH, 3, generator=torch.Generator().manual_seed(0))
    assert apart(outputs(by_hand, y), outputs(small, y)) <= 1e-6
    assert apart(outputs(mask_removed(model, graph, made.architecture), x), outputs(made.model, x)) <= 1e-5
    assert apart(outputs(blind_to_removed(model, graph, made.architecture), x), outputs(made.model, x)) <= 1e-5

    costs = CostModel(graph)
    for each, count in ((model, costs.original), (made.model, costs.cost(made.architecture))):
        of_linears = STEPS * (each.inner.weight.numel() + each.outer.weight.numel())
        assert count.macs == macs_by_hand(each.layer, STEPS) + of_linears == count_macs(each, x)
        assert count.params == count_params(each)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_the_count_is_that_of_torch_for_unrolled_steps(kind: str):
    """In double precision PyTorch runs every step as products of matrices, which its own counter knows."""
    model, (x,) = seeded(lambda: Between(getattr(nn, kind)(6, 8, num_layers=2, bidirectional=True)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).double()(x[:1].double())
    assert CostModel(trace(model, x)).original.macs == counter.get_total_flops() // 2


FREE = {
    "crnn_lstm crnn_gru crnn_rnn": {"stem.0", "body.0", "first", "middle", "second"},
    "lstm_cell lstm_cell_without_bias gru_cell rnn_cell relu_cell": {"inner", "cell"},
    "seq2seq_lstm seq2seq_gru": {"source", "target", "encoder"},
    "bridge": {"encoder", "bridge"},
    "attended": {"layer", "score.0"},
    "translator": {"embed", "encoder"},
    "dual_path": {"begin", "within", "across"},
    "recognizer": {"conv.0", "layers.0", "layers.1"},
    "speaker": {"memory", "begin.0", "attend", "query", "decode"},
    "language_model": {"embed", "layer"},
    "weight_norm old_weight_norm": {"inner", "layer"},
    "packed_lstm packed_gru packed_rnn unbatched own_zeros twice": {"inner", "layer"},
    "final_state last_states_joined learned_state both_ways_added": {"layer"},
    "residual per_channel": {"inner"},
    "conv_lstm": {"gates"},
}


@pytest.mark.parametrize("name", list(RECURRENT))
def test_a_network_of_any_wiring_is_cut_exactly_and_counted(name: str):
    model, example = RECURRENT[name]()
    graph = trace(model, example)
    assert {axis.name for axis in graph.prunable} == next(axes for names, axes in FREE.items() if name in names.split())
    costs = CostModel(graph)
    assert costs.original.macs == count_macs(model, example)
    for seed in range(2):
        made = cut(model, graph, random_architecture(graph, seed))
        assert not made.verification.frozen
        masked = mask_removed(model, graph, made.architecture)
        assert apart(outputs(masked, *example), outputs(made.model, *example)) <= 1e-5
        after = costs.cost(made.architecture)
        assert (after.macs, after.params) == (count_macs(made.model, example), count_params(made.model))


@pytest.mark.parametrize("name", list(RECURRENT))
def test_what_is_learned_of_recurrent_layers_is_the_same_with_every_number(name: str):
    model, example = RECURRENT[name]()
    example = positional_arguments(model, example)
    lean, full = RecordingContext({}, computed=False), RecordingContext({}, computed=True)
    try:
        ledger, attributes = record_once(model, example, lean, None)
    except FakeValueReadError:
        pytest.skip("its numbers are read")
    wanted, wanted_attributes = record_once(model, example, full, None)
    assert (lean.flow.names, lean.flow.sources) == (full.flow.names, full.flow.sources)
    assert attributes == wanted_attributes
    for mine, theirs in ((ledger.ties, wanted.ties), (ledger.freezes, wanted.freezes)):
        assert [str(item) for item in mine] == [str(item) for item in theirs]


class _Listing(WholeCallMode):
    """Compares the fake results of recurrent calls with the real ones, and lists the calls."""

    def __init__(self, *, compare: bool = True) -> None:
        super().__init__()
        self.compare = compare
        self.names: list[str] = []

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        self.names.append(func._schema.name)
        if self.compare and func in FAKE_RESULTS:
            fake = make_fake_result(func, args, kwargs)
            for mine, theirs in zip(*((o if isinstance(o, tuple) else (o,)) for o in (fake, out)), strict=True):
                assert (mine.shape, mine.stride(), mine.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("train", [False, True])
def test_a_layer_is_one_call_on_every_backend_and_its_fake_results_have_their_layouts(dtype: torch.dtype, train: bool):
    for kind, settings in LAYERS:
        layer = getattr(nn, kind)(6, 8, **settings).to(dtype).train(train)
        with _Listing() as seen, torch.no_grad():
            layer(torch.zeros(3, 2, 6, dtype=dtype))
        name = layer.mode.lower()
        assert seen.names.count(f"aten::{name}") == 1
        assert set(seen.names) <= {f"aten::{name}", "aten::zeros", "aten::alias"}
    for kind in ("LSTMCell", "GRUCell", "RNNCell"):
        cell, x = getattr(nn, kind)(6, 8).to(dtype), torch.zeros(2, 6, dtype=dtype)
        with _Listing() as seen, torch.no_grad():
            cell(x)
        assert sum(name.endswith("_cell") for name in seen.names) == 1
        assert set(seen.names) <= {seen.names[1], "aten::zeros", "aten::alias"}


def test_modes_within_each_other_all_see_the_whole_call():
    layer, x, state = nn.GRU(3, 4).double(), torch.zeros(2, 1, 3).double(), torch.zeros(1, 1, 4).double()
    with _Listing(compare=False) as outer, _Listing(compare=False) as inner, torch.no_grad():
        layer(x, state)
    assert outer.names == inner.names == ["aten::gru", "aten::alias"]


def test_tracing_takes_no_longer_for_a_thousand_steps():
    model, _ = seeded(lambda: Between(nn.GRU(6, 8, batch_first=True)))
    graphs = [trace(model, torch.randn(1, steps, 5)) for steps in (2, 1000)]
    assert len(graphs[0].calls) == len(graphs[1].calls)
    assert [len(graph.operations) for graph in graphs] == [4, 4]
    assert CostModel(graphs[1]).original.macs == 500 * CostModel(graphs[0]).original.macs


FROZEN = {
    "state of the input": (
        lambda m, x: m.head(m.layer(m.inner(x), x[None, :, 0, :4].contiguous())[0]),
        "layer", "begins with a state that does not follow its units",
    ),
    "constant state": (
        lambda m, x: m.head(m.layer(m.inner(x), torch.full((1, x.size(0), 4), 0.1))[0]),
        "layer", "begins with a state that does not follow its units",
    ),
    "channels as steps": (
        lambda m, x: m.head(m.layer(m.inner(x)[..., None].expand(-1, -1, -1, 6)[:, 0])[0]),
        "inner", "takes them one after the other, as steps",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FROZEN))
def test_what_does_not_follow_freezes_its_axis_only(name: str):
    compute, frozen, why = FROZEN[name]
    model, (x,) = seeded(
        lambda: With(compute, inner=nn.Linear(5, 6), layer=nn.GRU(6, 4, batch_first=True), head=nn.Linear(4, 3))
    )
    graph = trace(model, x)
    reasons = {axis.name: axis.frozen_because for axis in graph.axes}
    assert why in str(reasons[frozen])
    assert {axis.name for axis in graph.prunable} == {"inner", "layer"} - {frozen}
    made = cut(model, graph, random_architecture(graph, 0))
    assert not made.verification.frozen


def test_a_cut_layer_keeps_no_weights_of_the_original():
    model, (x,) = seeded(CRNN, "crnn")
    graph = trace(model, x)
    made = apply_architecture(model, graph, random_architecture(graph, 0))
    before = outputs(made, x)
    for layer in (made.first, made.second):
        assert [id(w) for w in layer._flat_weights] == [id(getattr(layer, n)) for n in layer._flat_weights_names]
        for name, weight in layer.named_parameters():
            assert weight.shape == layer.get_parameter(name).shape
    fresh = copy.deepcopy(made)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert apart(before, outputs(fresh, x)) == 0
    assert float(outputs(made, x)[0].abs().max()) == 0
    made.load_state_dict(fresh.state_dict())
    assert apart(before, outputs(made, x)) == 0
    # Weights that move to another precision move in the layer's own list as well.
    assert outputs(made.double(), x.double())[0].dtype == torch.float64


def test_a_cut_layer_trains_and_its_original_does_not_change():
    model, (x,) = seeded(lambda: CellLoop(nn.LSTMCell(6, 7)))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = trace(model, x)
    small = cut(model, graph, random_architecture(graph, 2)).model.train()
    small(x).square().mean().backward()
    assert all(parameter.grad is not None and float(parameter.grad.abs().max()) > 0 for parameter in small.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_projection_that_is_as_wide_as_its_cells_is_never_made():
    """PyTorch takes a layer whose state and cells are equally wide for one without projection."""
    model, (x,) = seeded(lambda: Between(nn.LSTM(6, 8, proj_size=4, batch_first=True)))
    graph = trace(model, x)
    made = cut(model, graph, Architecture.of({"layer": range(4)}))
    assert made.verification.max_rel <= made.verification.tolerance
    layer: Any = made.model.layer
    assert layer.proj_size < layer.hidden_size


def test_a_residual_layer_can_be_removed_as_a_block():
    """Its final state is a value of its own, which nobody uses."""

    def compute(model: Any, x: Tensor) -> Tensor:
        x = model.inner(x)
        x = x + model.mix(model.layer(x)[0])
        x = x + model.mix_again(model.again(x)[0])
        return model.head(x)

    model, (x,) = seeded(
        lambda: With(
            compute,
            inner=nn.Linear(5, 6),
            layer=nn.GRU(6, 7, batch_first=True),
            mix=nn.Linear(7, 6),
            again=nn.RNN(6, 7, bidirectional=True, batch_first=True),
            mix_again=nn.Linear(14, 6),
            head=nn.Linear(6, 3),
        )
    )
    graph = trace(model, x)
    assert [block.name for block in graph.removable] == ["layer", "again"]
    for block in graph.removable:
        made = cut(model, graph, Architecture.of({"inner": (0, 2, 5)}, [block.name]))
        assert made.architecture.removed_blocks == (block.name,)
        want = outputs(mask_removed(model, graph, made.architecture), x)
        assert apart(want, outputs(made.model, x)) <= 1e-5
