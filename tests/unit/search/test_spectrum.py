import numpy as np
import pytest
import torch
from hand_graphs import HAND_GRAPHS, concat, embedding, flat, plain, randomized, residual
from torch import nn

from secateur.errors import DataError, ModelError
from secateur.graph import Activation, ChannelGraph
from secateur.search import (
    Activations,
    Correlation,
    Covariance,
    FilterWeights,
    RawWeights,
    ScoringInputs,
    readers,
    unexplained_variance,
)
from secateur.search.pca import RunningCovariance, eigenvalues_of_covariance, eigenvalues_of_rows


def explained(rows: np.ndarray, correlation: bool = False) -> np.ndarray:
    """CCR(0..N) by the definition: eigenvalues of numpy's N x N matrix, no stretching."""
    matrix = np.corrcoef(rows) if correlation else np.cov(rows)
    values = np.sort(np.linalg.eigvalsh(matrix))[::-1]
    return np.append(0, np.cumsum(values)) / values.sum()


def weight_rows(weight: torch.Tensor) -> np.ndarray:
    return weight.detach().double().flatten(1).numpy()


@pytest.mark.parametrize("shape", [(5, 40), (40, 12), (9, 9)])
@pytest.mark.parametrize("matrix", [Covariance(), Correlation()])
def test_eigenvalues_of_rows_are_those_of_the_whole_matrix(shape, matrix):
    rows = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[0] + 1)[:, None]
    found = np.sort(eigenvalues_of_rows(rows, matrix))[::-1]
    found = np.append(found, np.zeros(max(0, shape[0] - len(found))))
    whole = np.corrcoef(rows) if isinstance(matrix, Correlation) else np.cov(rows) * (shape[1] - 1)
    np.testing.assert_allclose(found[: shape[0]], np.sort(np.linalg.eigvalsh(whole))[::-1], atol=1e-9 * whole.max())


def test_eigenvalues_of_a_covariance_may_be_of_its_correlation():
    data = np.random.default_rng(0).normal(size=(6, 50)) * np.arange(1, 7)[:, None]
    found = eigenvalues_of_covariance(np.cov(data), Correlation())
    np.testing.assert_allclose(found, np.linalg.eigvalsh(np.corrcoef(data)), atol=1e-12)


def test_a_variable_without_variance_has_no_correlation():
    rows = np.random.default_rng(0).normal(size=(4, 30))
    rows[2] = 3.0
    values = eigenvalues_of_rows(rows, Correlation())
    np.testing.assert_allclose(values.sum(), 3)
    np.testing.assert_allclose(values.min(), 0, atol=1e-12)


def test_unexplained_is_one_minus_the_cumulative_contribution():
    np.testing.assert_allclose(unexplained_variance(np.array([1.0, 4, 3, 2]), 4, 9), [1, 0.6, 0.3, 0.1, 0])


def test_a_short_spectrum_is_stretched_over_all_channels():
    rest = unexplained_variance(np.array([3.0, 1, 0, 0, 0, 0, 0, 0]), 8, 2)
    # rank 2 over 8 channels: 4 channels stand for the first component (3/4), 4 for the second
    np.testing.assert_allclose(rest, 1 - np.array([0, 3, 6, 9, 12, 13, 14, 15, 16]) / 16)
    assert (np.diff(rest) < 0).all()


def test_rounding_errors_below_zero_count_as_zero():
    rest = unexplained_variance(np.array([1.0, -1e-17, 1.0]), 3, 5)
    np.testing.assert_allclose(rest, [1, 0.5, 0, 0])


@pytest.mark.parametrize(("values", "rank"), [(np.zeros(4), 4), (np.array([1.0]), 0)])
def test_no_variance_gives_every_channel_the_same_share(values, rank):
    np.testing.assert_allclose(unexplained_variance(values, 4, rank), [1, 0.75, 0.5, 0.25, 0])


def test_the_tail_keeps_its_digits():
    rest = unexplained_variance(np.array([1.0, 1e-20, 1e-22]), 3, 9)
    np.testing.assert_allclose(rest[1:3], [1.01e-20, 1e-22], rtol=1e-12)


def test_raw_weights_follow_the_definition():
    model, graph = plain()
    rest = RawWeights().unexplained(ScoringInputs(model, graph))
    np.testing.assert_allclose(1 - rest["conv1"], explained(weight_rows(model.conv1.weight)), atol=1e-12)
    np.testing.assert_allclose(1 - rest["conv2"], explained(weight_rows(model.conv2.weight)), atol=1e-12)


def test_correlation_follows_the_definition():
    model, graph = plain()
    rest = RawWeights(Correlation()).unexplained(ScoringInputs(model, graph))
    np.testing.assert_allclose(1 - rest["conv1"], explained(weight_rows(model.conv1.weight), True), atol=1e-12)


def test_weights_fold_the_batch_norm():
    model, graph = plain()
    scale = model.bn1.weight / torch.sqrt(model.bn1.running_var + model.bn1.eps)
    rows = weight_rows(model.conv1.weight) * scale.detach().double().numpy()[:, None]
    rest = FilterWeights().unexplained(ScoringInputs(model, graph))
    np.testing.assert_allclose(1 - rest["conv1"], explained(rows), atol=1e-7)  # float32 scale here


def test_folded_weights_do_not_depend_on_the_scale_of_a_filter():
    model, graph = plain()
    model.bn1.eps = 0.0
    before = FilterWeights().unexplained(ScoringInputs(model, graph))["conv1"]
    raw = RawWeights().unexplained(ScoringInputs(model, graph))["conv1"]
    with torch.no_grad():
        scale = torch.tensor([2.0**k for k in range(-4, 4)])
        model.conv1.weight *= scale[:, None, None, None]
        model.bn1.running_var *= scale**2
    np.testing.assert_allclose(FilterWeights().unexplained(ScoringInputs(model, graph))["conv1"], before, rtol=1e-12)
    assert np.abs(RawWeights().unexplained(ScoringInputs(model, graph))["conv1"] - raw).max() > 0.05


def test_correlation_does_not_care_for_folding():
    model, graph = plain()
    folded = FilterWeights(Correlation()).unexplained(ScoringInputs(model, graph))
    raw = RawWeights(Correlation()).unexplained(ScoringInputs(model, graph))
    np.testing.assert_allclose(folded["conv1"], raw["conv1"], atol=1e-12)


def forget(graph: ChannelGraph, *tensors: str) -> None:
    """Make the graph what it would have been without these tensors."""
    for axis in graph.axes:
        object.__setattr__(axis, "sites", tuple(site for site in axis.sites if site.tensor not in tensors))


def test_batch_norms_without_gamma_fold_their_variance():
    model, graph = plain()
    model.bn1.register_parameter("weight", None)
    forget(graph, "bn1.weight")
    rows = weight_rows(model.conv1.weight) / np.sqrt(model.bn1.running_var.double().numpy() + 1e-5)[:, None]
    rest = FilterWeights().unexplained(ScoringInputs(model, graph))
    np.testing.assert_allclose(1 - rest["conv1"], explained(rows), atol=1e-12)


def test_batch_norms_without_running_statistics_are_not_folded():
    model, graph = plain()
    model.bn1.running_var = None
    model.bn1.running_mean = None
    forget(graph, "bn1.running_var", "bn1.running_mean")
    inputs = ScoringInputs(model, graph)
    np.testing.assert_allclose(FilterWeights().unexplained(inputs)["conv1"], RawWeights().unexplained(inputs)["conv1"])


def test_damaged_batch_norms_are_refused_when_folding():
    model, graph = plain()
    model.bn1.running_var[2] = -1.0
    with pytest.raises(ModelError, match=r"`bn1` must have finite scales .* use RawWeights\(\)"):
        FilterWeights().unexplained(ScoringInputs(model, graph))
    assert set(RawWeights().unexplained(ScoringInputs(model, graph))) == {"conv1", "conv2"}


def test_a_coupled_axis_averages_the_spectra_of_its_producers():
    model, graph = residual()
    rest = RawWeights().unexplained(ScoringInputs(model, graph))["stem"]
    both = [explained(weight_rows(conv.weight)) for conv in (model.stem, model.conv2)]
    np.testing.assert_allclose(1 - rest, np.mean(both, axis=0), atol=1e-12)


def test_rgb_stem_with_more_filters_than_rank_is_stretched():
    model, graph = plain(64, 8)  # 64 filters of 27 weights: centered rank 26
    rest = RawWeights().unexplained(ScoringInputs(model, graph))["conv1"]
    assert (np.diff(rest) < 0).all()
    plain_ccr = explained(weight_rows(model.conv1.weight))
    np.testing.assert_allclose(plain_ccr[26], 1, atol=1e-12)
    np.testing.assert_allclose(1 - rest[32], plain_ccr[13], atol=1e-12)


@pytest.mark.parametrize(
    "source", [FilterWeights(), RawWeights(), FilterWeights(Correlation()), Activations()], ids=repr
)
@pytest.mark.parametrize("make", HAND_GRAPHS.values(), ids=HAND_GRAPHS)
def test_every_source_gives_a_falling_curve_for_every_axis_and_changes_nothing(source, make):
    model, graph = make()
    images = torch.randn(6, *graph.example_shape[1:], generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    inputs = ScoringInputs(model, graph, ((images, torch.zeros(6, dtype=torch.int64)),))
    rest, again = source.unexplained(inputs), source.unexplained(inputs)
    assert set(rest) == {axis.name for axis in graph.prunable}
    for axis in graph.prunable:
        curve = rest[axis.name]
        assert curve.shape == (axis.size + 1,)
        assert (curve[0], curve[-1]) == (1, 0)
        assert (np.diff(curve) <= 1e-15).all()
        assert np.array_equal(curve, again[axis.name])
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def images_for(graph: ChannelGraph, count: int = 16) -> torch.Tensor:
    return torch.randn(count, *graph.example_shape[1:], generator=torch.Generator().manual_seed(3))


def channels_first(output: torch.Tensor) -> np.ndarray:
    return output.detach().double().movedim(1, 0).flatten(1).numpy()


def test_activations_are_taken_after_the_batch_norm():
    model, graph = plain()
    images = images_for(graph)
    batches = tuple((part, torch.zeros(len(part))) for part in images.split(5))
    rest = Activations().unexplained(ScoringInputs(model, graph, batches))["conv1"]
    expected = explained(channels_first(model.bn1(model.conv1(images))))
    np.testing.assert_allclose(1 - rest, expected, atol=1e-6)  # float32 activations


def test_activations_without_batch_norm_are_the_outputs():
    model, graph = flat()  # 6 channels of 9 weights and one input: rank is no cap
    images = images_for(graph)
    rest = Activations(Correlation()).unexplained(ScoringInputs(model, graph, ((images, None),)))["conv"]
    np.testing.assert_allclose(1 - rest, explained(channels_first(model.conv(images)), True), atol=1e-6)


def test_activations_of_an_axis_no_module_shows_use_the_weights():
    model, graph = embedding()
    inputs = ScoringInputs(model, graph, ((images_for(graph), None),))
    np.testing.assert_array_equal(
        Activations().unexplained(inputs)["position"], RawWeights().unexplained(inputs)["position"]
    )


def test_an_output_that_shows_an_axis_in_part_is_not_used():
    model, graph = concat()
    part = graph.activations["a"]
    graph.activations["a"] = Activation("a", part.shape, 1, np.where(part.channel < 2, 0, -1), part.channel)
    inputs = ScoringInputs(model, graph, ((images_for(graph), None),))
    np.testing.assert_array_equal(Activations().unexplained(inputs)["a"], RawWeights().unexplained(inputs)["a"])


def test_activations_need_batches():
    with pytest.raises(DataError, match="`batches` must hold images for Activations; got none"):
        Activations().unexplained(ScoringInputs(*plain()))


def test_activations_that_are_not_finite_are_refused():
    model, graph = plain()
    images = images_for(graph)
    images[3] = float("nan")
    with pytest.raises(ModelError, match="activations of axis 'conv1' must be finite"):
        Activations().unexplained(ScoringInputs(model, graph, ((images, None),)))


def test_running_covariance_equals_numpy_in_any_pieces():
    data = np.random.default_rng(0).normal(size=(4, 100)) + 1e3
    run = RunningCovariance(4)
    for piece in np.split(data, [1, 2, 30], axis=1):
        run.add(piece)
    np.testing.assert_allclose(run.covariance(), np.cov(data, bias=True), rtol=1e-9, atol=1e-12)


class PreActivation(nn.Module):
    """The batch norm after the sum reads neither convolution's output."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 1)
        self.last = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.stem(x)
        return self.last(x + self.conv(torch.relu(self.norm(x))))


def test_a_batch_norm_belongs_to_the_module_whose_output_it_reads():
    found = readers(randomized(PreActivation()), (torch.zeros(1, 3, 4, 4),), {"stem", "conv"})
    assert found == {"stem": "norm"}


def test_hooks_are_removed_when_the_model_fails():
    model = randomized(PreActivation())
    with pytest.raises(RuntimeError):
        readers(model, (torch.zeros(1, 5, 4, 4),), {"stem", "conv"})
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_literal_rank_cap_explains_everything_from_the_rank_on():
    rest = unexplained_variance(np.array([3.0, 1, 0, 0, 0, 0, 0, 0]), 8, 2, stretched=False)
    np.testing.assert_allclose(rest, [1, 0.25, 0, 0, 0, 0, 0, 0, 0])
    # Where the rank is no cap, both are the same.
    values = np.array([1.0, 4, 3, 2])
    np.testing.assert_allclose(unexplained_variance(values, 4, 9, stretched=False), unexplained_variance(values, 4, 9))
    # The worked minimum: width = min { i : CCR(i) >= tau }.
    rest = unexplained_variance(np.array([5.0, 3, 1.5, 0.5]), 6, 4, stretched=False)
    assert [int(np.argmax(1 - rest >= tau - 1e-12)) for tau in (0.5, 0.8, 0.95, 1.0)] == [1, 2, 3, 4]
