"""Scores and repairs of networks with recurrent layers."""

import numpy as np
import pytest
import torch
from cuts import random_architecture
from recurrent_nets import RECURRENT, With, seeded
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from secateur._runtime import with_recurrent_gradients_
from secateur.graph import trace
from secateur.prune import RecalibrateBatchNorm, Refit, cut
from secateur.search import L2, PCASlimming, Reconstruction, ScoringInputs, Taylor, Uniform, search_architecture

LABELS = torch.tensor([0, 1])
BATCHED = [name for name in RECURRENT if not name.startswith("packed")]


@pytest.mark.parametrize("name", BATCHED)
def test_every_axis_has_scores_and_no_repair_fails(name: str):
    model, (x,) = RECURRENT[name]()
    graph = trace(model, x)
    inputs = ScoringInputs(model, graph, ((x, LABELS),))
    for importance in (L2(), Reconstruction()):
        scores = importance.scores(inputs)
        assert {axis: len(values) for axis, values in scores.items()} == dict(graph.sizes)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    made = cut(
        model, graph, random_architecture(graph, 1), calibration=[x, x], repairs=[Refit(), RecalibrateBatchNorm()]
    )
    assert len(made.repairs) == 2
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("strategy", [Uniform(), PCASlimming()], ids=str)
def test_a_budget_is_met(strategy: Uniform | PCASlimming):
    model, (x,) = RECURRENT["crnn_lstm"]()
    graph = trace(model, x)
    found = search_architecture(model, graph, strategy, budget="macs=50%", batches=[(x, LABELS)])
    assert found.cost.macs <= 0.5 * found.original.macs
    assert cut(model, graph, found.architecture).architecture == found.architecture


def classifier(layer: nn.RNNBase, *, packed: bool = False) -> nn.Module:
    def compute(model: With, x: Tensor) -> Tensor:
        features = model.inner(x)
        given = pack_padded_sequence(features, torch.full((len(x),), 5), batch_first=True) if packed else features
        end = model.layer(given)[1]
        return model.head((end[0] if isinstance(end, tuple) else end)[-1])

    return With(compute, inner=nn.Linear(5, 6), layer=layer, head=nn.Linear(7, 3))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_an_input_of_a_recurrent_layer_is_worth_what_the_others_cannot_predict(kind: type[nn.RNNBase], packed: bool):
    model, _ = seeded(lambda: classifier(kind(6, 7, batch_first=True, bidirectional=True), packed=packed))
    x = torch.randn(64, 5, 5, generator=torch.Generator().manual_seed(0))
    inner = model.get_submodule("inner")
    assert isinstance(inner, nn.Linear)
    with torch.no_grad():
        # Channel 4 is twice channel 1, and nobody reads channel 3.
        inner.weight[4], inner.bias[4] = 2 * inner.weight[1], 2 * inner.bias[1]
        for name in ("weight_ih_l0", "weight_ih_l0_reverse"):
            model.get_parameter(f"layer.{name}")[:, 3] = 0
    graph = trace(model, x)
    scores = Reconstruction().scores(ScoringInputs(model, graph, ((x, torch.zeros(64, dtype=torch.long)),)))["inner"]
    assert scores[3] == 0
    order = np.argsort(scores)
    assert order[0] == 3
    assert order[1] in {1, 4}
    assert scores[order[1]] < 0.05 * scores[order[2]]


def test_taylor_scores_units_and_inputs_by_the_weights_that_read_them():
    model, _ = seeded(lambda: classifier(nn.LSTM(6, 7, batch_first=True)))
    x, labels = torch.randn(8, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    graph = trace(model, x)
    scores = Taylor().scores(ScoringInputs(model, graph, ((x, labels),)))
    nn.functional.cross_entropy(model(x), labels).backward()
    products = {
        name: p.detach().double() * p.grad.double() for name, p in model.named_parameters() if p.grad is not None
    }
    units = products["layer.weight_hh_l0"].sum(0) + products["head.weight"].sum(0)
    assert scores["layer"] == pytest.approx(units.abs().numpy(), rel=1e-4, abs=1e-9)
    assert scores["inner"] == pytest.approx(products["layer.weight_ih_l0"].sum(0).abs().numpy(), rel=1e-4, abs=1e-9)


def test_layers_that_compute_gradients_on_gpus_give_what_they_give_in_evaluation_mode():
    layer = nn.LSTM(5, 6, 2, dropout=0.5).eval()
    x = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))
    want = layer(x)[0]
    assert with_recurrent_gradients_(layer).training
    assert torch.equal(want, layer(x)[0])
