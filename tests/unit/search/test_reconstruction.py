"""Reconstruction: what neighbors can replace goes first, whoever reads it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zoo import ZOO

from secateur.errors import DataError, ModelError
from secateur.graph import trace
from secateur.search import Reconstruction, ScoringInputs


def pictures(count: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def batched(images: Tensor, size: int = 16) -> tuple[tuple[Tensor, Tensor], ...]:
    """With class labels: all readers below give four logits or more."""
    return tuple((part, torch.arange(len(part)) % 4) for part in images.split(size))


def scored(model: nn.Module, pixels: Tensor, **settings: Any) -> dict[str, np.ndarray]:
    graph = trace(model, pixels[:1].clone())
    return Reconstruction(**settings).scores(ScoringInputs(model, graph, batched(pixels)))


class Between(nn.Module):
    """Eight channels, read by something that is to be tested."""

    def __init__(self, reader: Callable[[], nn.Module]):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.reader = reader()

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(torch.relu(self.first(x)))


READERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(8, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(486, 4)),
    "flatten": lambda: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(128, 4)),
    "linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    "in_place": lambda: nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(384, 4)),
    "two_readers": lambda: Two(),  # noqa: PLW0108 - defined below
}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.a(x).relu() + self.b(x)).mean((2, 3))


def built(reader: str, seed: int = 0) -> Between:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Between(READERS[reader]).eval()


@pytest.mark.parametrize("reader", READERS)
def test_an_exact_copy_goes_first_and_the_other_copy_then_counts(reader):
    model = built(reader)
    with torch.no_grad():
        model.first.weight[5] = model.first.weight[2]
        model.first.bias[5] = model.first.bias[2]
        # Large readers: the copy is worth much by every measure that looks at it alone.
        for name, parameter in model.reader.named_parameters():
            if name.endswith("weight") and parameter.dim() == 4:
                dim = 0 if reader == "transposed" else 1
                parameter.index_copy_(dim, torch.tensor([2, 5]), 5 * parameter.index_select(dim, torch.tensor([2, 5])))
    scores = scored(model, pictures())["first"]
    first = int(scores.argmin())
    assert first in {2, 5}
    assert scores[first] < 0.1 * np.delete(scores, first).min()
    assert scores[7 - first] > scores[first] * 10


@pytest.mark.parametrize("reader", READERS)
def test_a_channel_nobody_listens_to_is_worth_nothing(reader):
    model = built(reader)
    with torch.no_grad():
        for name, parameter in model.reader.named_parameters():
            if (
                name.endswith("weight")
                and reader != "flatten"
                and parameter.size(0 if reader == "transposed" else 1) == 8
            ):
                parameter.select(0 if reader == "transposed" else 1, 3).zero_()
            elif reader == "flatten" and name.endswith("weight"):
                parameter[:, 48:64] = 0
    scores = scored(model, pictures())["first"]
    assert scores.argmin() == 3
    assert scores[3] == pytest.approx(0, abs=1e-12)
    assert (np.delete(scores, 3) > 0).all()


def test_the_first_to_go_has_the_written_damage():
    """d = 1/2 sum_o E||dz/dy_o||^2 W_oj^2 / (G^-1)_jj for a linear reader whose output is the logits, by hand."""
    model = built("linear").double()
    images = pictures(512).double()
    scores = scored(model, images, ridge=1e-12)["first"]
    with torch.no_grad():
        x = torch.relu(model.first(images)).mean((2, 3))
        residual = 1 / torch.linalg.inv(x.T @ x / len(x)).diagonal()
        # Random signs, centered: the expected square of a centered sign among four is 1 - 1/4.
        damage = 0.5 * 0.75 * model.reader[2].weight.square().sum(0) * residual
    first = int(damage.argmin())
    assert int(scores.argmin()) == first
    assert scores[first] == pytest.approx(float(damage[first]), rel=0.15)


def test_a_flattened_reader_counts_all_its_positions():
    """The same function, once as pooling by a linear layer over positions and once as a convolution over the map."""
    model = built("flatten").double()
    with torch.random.fork_rng(devices=[]):
        twin = Between(lambda: nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 4, 4), nn.Flatten())).double().eval()
    twin.first.load_state_dict(model.first.state_dict())
    with torch.no_grad():
        twin.reader[1].weight.copy_(model.reader[2].weight.view(4, 8, 4, 4))
        twin.reader[1].bias.copy_(model.reader[2].bias)
    images = pictures().double()
    assert torch.allclose(model(images), twin(images))
    assert np.allclose(scored(model, images)["first"], scored(twin, images)["first"], rtol=1e-6)


def test_a_grouped_reader_is_seen_in_all_its_groups():
    """Two groups that read the same positions: their channels go together, so both must count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Between(lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(288, 4))).eval()
    images = pictures()
    base = scored(model, images)["first"]
    with torch.no_grad():
        # Make the second group's channels ten times as large; what reads them stays.
        model.first.weight[4:] *= 10
        model.first.bias[4:] *= 10
    assert (scored(model, images)["first"] > 5 * base).all()


@pytest.mark.parametrize("name", ZOO)
def test_every_net_gets_finite_scores_the_same_every_time_and_is_left_alone(name):
    model, example = ZOO[name]()
    graph = trace(model, example)
    model.train()
    images = pictures(24)
    before = {key: (t.clone(), t._version) for key, t in model.state_dict(keep_vars=True).items()}
    state, same = torch.get_rng_state(), images.clone()
    inputs = ScoringInputs(model, graph, batched(images, 8), seed=3)
    first, second = (Reconstruction().scores(inputs) for _ in range(2))
    assert list(first) == [axis.name for axis in graph.prunable]
    for axis in graph.prunable:
        assert first[axis.name].shape == (axis.size,)
        assert np.isfinite(first[axis.name]).all()
        assert (first[axis.name] >= 0).all()
        assert np.array_equal(first[axis.name], second[axis.name])
    assert all(p.grad is None for p in model.parameters())
    assert all(
        torch.equal(before[k][0], t) and before[k][1] == t._version for k, t in model.state_dict(keep_vars=True).items()
    )
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(images, same)
    assert images.grad is None
    assert not images.requires_grad


@pytest.mark.parametrize("reader", ["convolution", "flatten", "linear"])
def test_the_order_of_batches_matters_only_within_the_noise_of_random_signs(reader):
    model = built(reader)
    images = pictures(256)
    one, other = scored(model, images)["first"], scored(model, images.flip(0))["first"]
    assert np.abs(one - other).max() <= 0.25 * one.max()
    assert np.corrcoef(one, other)[0, 1] > 0.9


def test_frozen_parameters_and_models_that_write_into_their_input_are_fine():
    model = nn.Sequential(
        nn.ReLU(inplace=True), nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 6), nn.Flatten()
    )
    model.requires_grad_(False).eval()
    images = pictures(16)
    same = images.clone()
    scores = scored(model, images)["1"]
    assert (scores > 0).all()
    assert torch.equal(images, same)


def test_a_model_without_prunable_axes_has_no_scores():
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()).eval()
    assert scored(model, pictures(4)) == {}


def test_images_beyond_the_limit_are_not_looked_at():
    model = built("convolution")
    images = pictures(64)
    assert np.array_equal(scored(model, images[:16])["first"], scored(model, images, images=16)["first"])


def test_weights_that_are_not_finite_are_refused():
    model = built("convolution")
    with torch.no_grad():
        model.first.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match="must be finite"):
        scored(model, pictures(8))


def test_no_batches_is_refused():
    model, example = ZOO["plain"]()
    with pytest.raises(
        DataError, match=r"`batches` must hold images for Reconstruction; got none\. Pass calibration data"
    ):
        Reconstruction().scores(ScoringInputs(model, trace(model, example)))
