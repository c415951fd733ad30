"""The first run of a stranger's model ends in a sentence, whatever it would do."""

import resource

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import ArtifactError
from secateur.pipeline.load import check_runs


class Pads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, 2**20, 0, 2**20)).mean()


class Counts(nn.Module):
    """Takes another way for some numbers, which shapes alone do not tell."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x > -1].sum() + x.sum().item()


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()


def test_a_model_that_runs_stays_as_it_was():
    model = net()
    before, state = torch.get_rng_state(), {name: t.clone() for name, t in model.state_dict().items()}
    check_runs(model, (3, 8, 8))
    check_runs(Counts(), (3, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 9, 8), (3,)])
def test_a_model_of_another_size_is_refused(size: tuple[int, ...]):
    with pytest.raises(ArtifactError, match=r"must run on an image of `input\.shape`, .* it stopped with: "):
        check_runs(net(), size)


@pytest.mark.parametrize("model", [Pads(), nn.Upsample(scale_factor=2**14), nn.ConstantPad2d(2**18, 0.0)])
def test_a_tensor_without_end_is_refused_before_it_is_made(model: nn.Module):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtifactError, match=r"would make a tensor of shape \(1, 3, \d+, \d+\)"):
        check_runs(model, (3, 8, 8))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # kilobytes


def test_models_that_take_lists_run() -> None:
    class Listed(nn.Module):
        def forward(self, images: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(images).mean()

    assert check_runs(Listed(), (3, 8, 8)) is True
    assert check_runs(net(), (3, 8, 8)) is False
