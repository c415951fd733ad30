import numpy as np
import pytest
import torch
from hand_graphs import HAND_GRAPHS, depthwise, embedding, flat, plain, residual
from scipy.spatial.distance import cdist
from torch import nn
from torch.nn import functional

from secateur.errors import DataError, ModelError
from secateur.graph import Role
from secateur.search import (
    L1,
    L2,
    LAMP,
    BatchNormScale,
    GeometricMedian,
    Importance,
    RandomImportance,
    ScoringInputs,
    Taylor,
    checked_scores,
    producers,
)

ALL = [L1(), L2(), GeometricMedian(), BatchNormScale(), Taylor(), LAMP(), RandomImportance()]


def batches(graph, classes: int, count: int = 2, size: int = 5):
    generator = torch.Generator().manual_seed(7)
    shape = graph.example_shape[1:]
    return tuple(
        (torch.randn(size, *shape, generator=generator), torch.randint(classes, (size,), generator=generator))
        for _ in range(count)
    )


def rows_of(model: nn.Module, name: str) -> np.ndarray:
    weight = model.state_dict()[name].double().numpy()
    return weight.reshape(len(weight), -1)


@pytest.mark.parametrize("importance", ALL, ids=repr)
@pytest.mark.parametrize("make", HAND_GRAPHS.values(), ids=HAND_GRAPHS)
def test_every_importance_scores_every_axis_and_repeats_itself(importance, make):
    model, graph = make()
    inputs = ScoringInputs(model, graph, batches(graph, 3), seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    model.train()
    first, second = importance.scores(inputs), importance.scores(inputs)
    assert list(first) == [axis.name for axis in graph.prunable]
    for axis in graph.prunable:
        assert first[axis.name].shape == (axis.size,)
        assert first[axis.name].dtype == np.float64
        assert (first[axis.name] >= 0).all()
        assert np.array_equal(first[axis.name], second[axis.name])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


def test_l1_and_l2_are_the_norms_of_the_filters():
    model, graph = plain()
    rows = rows_of(model, "conv2.weight")
    np.testing.assert_allclose(L1().scores(ScoringInputs(model, graph))["conv2"], np.abs(rows).sum(1), rtol=1e-12)
    np.testing.assert_allclose(
        L2().scores(ScoringInputs(model, graph))["conv2"], np.linalg.norm(rows, axis=1), rtol=1e-12
    )


@pytest.mark.parametrize("importance", [L1(), L2(), GeometricMedian(), LAMP()], ids=repr)
def test_a_coupled_axis_takes_the_mean_over_its_producers(importance):
    model, graph = residual()
    scores = importance.scores(ScoringInputs(model, graph))["stem"]
    alone = []
    for name in ("stem.weight", "conv2.weight"):
        twin, twin_graph = residual()
        other = "conv2.weight" if name == "stem.weight" else "stem.weight"
        with torch.no_grad():
            # Both producers are made the one under test, so their mean is that one alone.
            parameter = dict(twin.named_parameters())
            replacement = nn.Parameter(parameter[name].clone())
            twin.get_submodule(other.split(".", maxsplit=1)[0]).weight = replacement
        alone.append(importance.scores(ScoringInputs(twin, twin_graph))["stem"])
    np.testing.assert_allclose(scores, np.mean(alone, axis=0), rtol=1e-9)


def test_geometric_median_sums_all_pairwise_distances():
    model, graph = plain(16, 40)
    rows = rows_of(model, "conv2.weight")
    expected = cdist(rows, rows).sum(axis=1)
    # float64 by the Gram matrix: relative 1e-9 for rows that are not equal
    np.testing.assert_allclose(GeometricMedian().scores(ScoringInputs(model, graph))["conv2"], expected, rtol=1e-9)


def test_geometric_median_prefers_the_outlier_to_the_duplicate():
    model, graph = plain()
    with torch.no_grad():
        model.conv1.weight.copy_(model.conv1.weight[:1].expand_as(model.conv1.weight))
        model.conv1.weight[3] += 1
    scores = GeometricMedian().scores(ScoringInputs(model, graph))["conv1"]
    assert scores.argmax() == 3
    np.testing.assert_allclose(np.delete(scores, 3), np.sqrt(27), rtol=1e-6)


def test_lamp_is_the_share_among_the_channels_at_least_as_strong():
    model, graph = plain()
    energy = (rows_of(model, "conv1.weight") ** 2).sum(1)
    expected = [e / energy[energy >= e].sum() for e in energy]
    scores = LAMP().scores(ScoringInputs(model, graph))["conv1"]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)
    assert scores.max() == 1


def test_lamp_of_dead_filters_is_zero():
    model, graph = plain()
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert (LAMP().scores(ScoringInputs(model, graph))["conv1"] == 0).all()


def test_batch_norm_scale_is_the_absolute_gamma():
    model, graph = plain()
    scores = BatchNormScale().scores(ScoringInputs(model, graph))
    np.testing.assert_allclose(scores["conv1"], model.bn1.weight.detach().abs().double().numpy())


def test_batch_norm_scale_takes_the_mean_over_the_norms_of_an_axis():
    model, graph = residual()
    expected = (model.bn.weight.detach().abs().double() + model.bn2.weight.detach().abs().double()).numpy() / 2
    np.testing.assert_allclose(BatchNormScale().scores(ScoringInputs(model, graph))["stem"], expected, rtol=1e-12)


def test_an_axis_without_batch_norm_falls_back_to_the_relative_filter_norm():
    model, graph = flat()
    scores = BatchNormScale().scores(ScoringInputs(model, graph))["conv"]
    expected = np.linalg.norm(rows_of(model, "conv.weight"), axis=1)
    np.testing.assert_allclose(scores, expected / expected.mean(), rtol=1e-12)
    with torch.no_grad():
        model.conv.weight.zero_()
    assert (BatchNormScale().scores(ScoringInputs(model, graph))["conv"] == 0).all()


def test_batch_norms_without_scale_fall_back_too():
    model, graph = plain()
    model.bn1.register_parameter("weight", None)
    model.bn1.affine = False
    axis = graph.by_name["conv1"]
    kept = tuple(site for site in axis.sites if site.tensor not in ("bn1.weight",))
    object.__setattr__(axis, "sites", kept)
    scores = BatchNormScale().scores(ScoringInputs(model, graph))["conv1"]
    assert scores.mean() == pytest.approx(1)


def test_taylor_is_the_first_order_change_of_the_loss():
    model, graph = residual()
    model.double()
    images, labels = batches(graph, 5, count=1)[0]
    scores = Taylor().scores(ScoringInputs(model, graph, ((images.double(), labels),)))

    def loss(scale: float, axis, channel: int) -> float:
        with torch.no_grad():
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            for site in axis.sites:
                if site.role is Role.INPUT:
                    view = state[site.tensor].movedim(site.dim, 0)
                    view[site.index[channel]] *= scale
            output = torch.func.functional_call(model, state, (images.double(),))
            return functional.cross_entropy(output, labels).item()

    # d loss / d scale at 1, by central differences (error about 1e-7), is the sum of w * dL/dw.
    for axis in graph.prunable:
        slopes = [(loss(1 + 1e-4, axis, c) - loss(1 - 1e-4, axis, c)) / 2e-4 for c in range(axis.size)]
        np.testing.assert_allclose(scores[axis.name], np.abs(slopes), rtol=1e-4, atol=1e-6)


def test_taylor_is_the_derivative_by_a_gate_on_the_channel():
    model, graph = plain()
    model.double()
    images, labels = batches(graph, 10, count=1)[0]
    gate = torch.ones(1, 8, 1, 1, dtype=torch.float64, requires_grad=True)
    hook = model.conv2.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * gate,))
    functional.cross_entropy(model(images.double()), labels).backward()
    hook.remove()
    scores = Taylor().scores(ScoringInputs(model, graph, ((images.double(), labels),)))
    np.testing.assert_allclose(scores["conv1"], gate.grad.abs().flatten().numpy(), rtol=1e-10)


def test_taylor_of_an_axis_that_no_weight_reads_sums_over_its_sites():
    model, graph = plain()
    axis = graph.by_name["conv1"]
    object.__setattr__(axis, "sites", tuple(site for site in axis.sites if site.role is not Role.INPUT))
    pair = batches(graph, 10, count=1)
    scores = Taylor().scores(ScoringInputs(model, graph, pair))["conv1"]
    functional.cross_entropy(model(pair[0][0]), pair[0][1]).backward()
    conv, norm = model.conv1, model.bn1
    expected = (
        (conv.weight * conv.weight.grad).sum((1, 2, 3)) + norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
    )
    np.testing.assert_allclose(scores, expected.abs().detach().numpy(), rtol=1e-4, atol=1e-6)


def test_taylor_averages_the_absolute_values_of_batches():
    model, graph = plain()
    pair = batches(graph, 10)
    both = Taylor().scores(ScoringInputs(model, graph, pair))["conv1"]
    single = [Taylor().scores(ScoringInputs(model, graph, (batch,)))["conv1"] for batch in pair]
    np.testing.assert_allclose(both, np.mean(single, axis=0), rtol=1e-12)


def test_taylor_works_where_gradients_are_off_and_parameters_are_frozen():
    model, graph = plain()
    expected = Taylor().scores(ScoringInputs(model, graph, batches(graph, 10)))["conv2"]
    model.requires_grad_(False)
    with torch.no_grad():
        scores = Taylor().scores(ScoringInputs(model, graph, batches(graph, 10)))["conv2"]
    assert np.array_equal(scores, expected)
    assert not any(p.requires_grad for p in model.parameters())


def test_taylor_needs_batches():
    with pytest.raises(DataError, match="`batches` must hold labeled images for Taylor; got none"):
        Taylor().scores(ScoringInputs(*plain()))


def test_taylor_needs_labels_of_the_model():
    model, graph = residual()
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(DataError, match="`labels` must be 0 to 4, the classes of the model; got 1 to 9"):
        Taylor().scores(ScoringInputs(model, graph, ((images, torch.tensor([1, 9])),)))


def test_taylor_needs_logits():
    model, graph = plain()
    body = nn.Sequential(model, nn.Unflatten(1, (2, 5)))
    with pytest.raises(DataError, match=r"must return logits \(2, classes\) for Taylor; got shape \(2, 2, 5\)"):
        Taylor().scores(ScoringInputs(body, graph, ((torch.zeros(2, 3, 8, 8), torch.tensor([1, 0])),)))


def test_random_scores_follow_the_seed():
    model, graph = plain()
    first = RandomImportance().scores(ScoringInputs(model, graph, seed=1))
    other = RandomImportance().scores(ScoringInputs(model, graph, seed=2))
    assert not np.array_equal(first["conv1"], other["conv1"])
    assert not np.array_equal(first["conv1"], first["conv2"][:8])


@pytest.mark.parametrize("importance", [i for i in ALL if not isinstance(i, RandomImportance)], ids=repr)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(importance, value):
    model, graph = plain()
    with torch.no_grad():
        model.conv1.weight[2, 0, 0, 0] = value
        model.bn1.weight[2] = value
    inputs = ScoringInputs(model, graph, batches(graph, 10))
    with pytest.raises(ModelError, match=r"must be finite; got (nan|inf)"):
        importance.scores(inputs)


def test_scores_of_a_foreign_importance_are_checked():
    _, graph = plain()
    good = {"conv1": np.ones(8), "conv2": np.ones(12)}
    assert set(checked_scores(good, graph, "mine")) == {"conv1", "conv2"}
    with pytest.raises(ModelError, match="must hold every prunable axis; 'mine' gave none for 'conv2'"):
        checked_scores({"conv1": np.ones(8)}, graph, "mine")
    with pytest.raises(ModelError, match=r"must have shape \(8,\); got \(7,\) from 'mine'"):
        checked_scores(good | {"conv1": np.ones(7)}, graph, "mine")
    with pytest.raises(ModelError, match="got nan for channel 1 and 2 such of 8 from 'mine'"):
        checked_scores(good | {"conv1": np.array([1, np.nan, 1, 1, 1, np.inf, 1, 1])}, graph, "mine")


def test_producers_of_a_depthwise_axis_are_the_convolution_before_it():
    model, graph = depthwise()
    assert [f.site.tensor for f in producers(graph.by_name["expand"], model.state_dict())] == ["expand.weight"]


def test_an_axis_without_producers_is_judged_by_the_tensors_that_hold_it():
    model, graph = embedding()
    found = producers(graph.by_name["position"], model.state_dict())
    assert [(f.site.tensor, f.rows.shape) for f in found] == [("position", (6, 4)), ("fc.weight", (6, 5))]


def test_an_axis_of_vectors_alone_is_judged_by_them():
    model, graph = plain()
    axis = graph.by_name["conv1"]
    object.__setattr__(axis, "sites", tuple(site for site in axis.sites if site.role is Role.VECTOR))
    found = producers(axis, model.state_dict())
    assert [f.rows.shape for f in found] == [(8, 1)] * 4
    for importance in (L1(), L2(), GeometricMedian(), LAMP(), BatchNormScale()):
        assert (importance.scores(ScoringInputs(model, graph))["conv1"] >= 0).all()


def test_channels_that_own_several_rows_use_all_of_them():
    model, graph = plain()
    axis = graph.by_name["conv2"]
    pairs = [type(site)(site.tensor, site.dim, np.arange(12).reshape(2, 6).T.copy(), site.role) for site in axis.sites]
    object.__setattr__(axis, "sites", tuple(pairs))
    object.__setattr__(axis, "size", 6)
    rows = rows_of(model, "conv2.weight")
    expected = np.sqrt((rows[:6] ** 2).sum(1) + (rows[6:] ** 2).sum(1))
    np.testing.assert_allclose(L2().scores(ScoringInputs(model, graph))["conv2"], expected, rtol=1e-12)


def test_importance_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Importance()
