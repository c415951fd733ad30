import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from secateur.distill import VariationalInformation, attention_loss, attention_map, hcl_loss, hint_loss, vid_loss
from secateur.errors import TrainingError


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_hint_loss_is_half_the_mean_square() -> None:
    student, teacher = random(2, 3, 4, 5, seed=1), random(2, 3, 4, 5, seed=2)
    expected = sum((s - t) ** 2 for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True))
    assert hint_loss(student, teacher).item() == pytest.approx(expected / 120 / 2, rel=1e-12)


def numpy_attention(feature: np.ndarray) -> np.ndarray:
    """The attention map of one image (channels, height, width), position by position."""
    _, height, width = feature.shape
    q = np.array([(feature[:, i, j] ** 2).sum() for i in range(height) for j in range(width)])
    return q / math.sqrt((q**2).sum())


def test_attention_is_its_formula_position_by_position_whatever_the_channels() -> None:
    student, teacher = random(3, 2, 4, 5, seed=3), random(3, 6, 4, 5, seed=4)
    pairs = [(numpy_attention(s), numpy_attention(t)) for s, t in zip(student.numpy(), teacher.numpy(), strict=True)]
    np.testing.assert_allclose(attention_map(student).numpy(), np.stack([s for s, _ in pairs]), rtol=1e-12)
    expected = np.mean([(s - t) ** 2 for s, t in pairs])
    assert attention_loss(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_attention_of_tokens_is_that_of_the_map_they_come_from() -> None:
    feature = random(2, 3, 4, 5, seed=5)
    tokens = feature.flatten(2).transpose(1, 2)
    torch.testing.assert_close(attention_map(tokens), attention_map(feature), rtol=1e-12, atol=0)


def test_attention_of_a_zero_feature_is_zero_with_a_finite_gradient() -> None:
    feature = torch.zeros(1, 2, 3, 3, requires_grad=True)
    attention_loss(feature, torch.ones(1, 2, 3, 3)).backward()
    assert torch.equal(attention_map(feature), torch.zeros(1, 9))
    assert feature.grad is not None
    assert torch.isfinite(feature.grad).all()


@pytest.mark.parametrize(("size", "sides"), [((8, 8), (4, 2, 1)), ((3, 3), (2, 1)), ((1, 1), ()), ((4, 6), (2, 1))])
def test_hcl_is_its_formula_level_by_level(size: tuple[int, int], sides: tuple[int, ...]) -> None:
    student, teacher = random(2, 3, *size, seed=6), random(2, 3, *size, seed=7)
    total, weights, weight = ((student - teacher) ** 2).mean().item(), 1.0, 1.0
    for side in sides:
        weight /= 2
        cells = []
        for i in range(side):  # Bins of adaptive pooling: floor(i n / side) to ceil((i + 1) n / side).
            for j in range(side):
                (a, b), (c, d) = ((k * n // side, -(-(k + 1) * n // side)) for k, n in zip((i, j), size, strict=True))
                cells.append((student - teacher)[:, :, a:b, c:d].mean((2, 3)))
        total += weight * (torch.stack(cells) ** 2).mean().item()
        weights += weight
    assert hcl_loss(student, teacher).item() == pytest.approx(total / weights, rel=1e-12)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 5), (3, 2, 4)])
def test_vid_is_the_negative_log_of_a_gaussian_up_to_its_constant(shape: tuple[int, ...]) -> None:
    mean, teacher = random(*shape, seed=8), random(*shape, seed=9)
    variance = random(4, seed=10).exp()
    spread = variance.sqrt() if len(shape) != 4 else variance.sqrt()[:, None, None]
    density = torch.distributions.Normal(mean, spread).log_prob(teacher)
    expected = -density.mean().item() - math.log(2 * math.pi) / 2
    assert vid_loss(mean, teacher, variance).item() == pytest.approx(expected, rel=1e-12)


def test_vid_module_starts_with_the_given_variance_and_learns_it() -> None:
    # Errors of variance 4 in the first channel and 0.25 in the second: the best variances of a Gaussian.
    student = random(4000, 2, seed=11).float()
    teacher = student + torch.tensor([2.0, 0.5]) * random(4000, 2, seed=12).float()
    vid = VariationalInformation(nn.Identity(), 2, initial_variance=3.0)
    torch.testing.assert_close(vid.variance.detach(), torch.tensor([3.0, 3.0]), rtol=1e-5, atol=0)
    optimizer = torch.optim.Adam(vid.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        vid(student, teacher).backward()
        optimizer.step()
    measured = (student - teacher).square().mean(0)
    torch.testing.assert_close(vid.variance.detach(), measured, rtol=0.02, atol=0)


def test_vid_module_is_the_loss_of_its_adaptors_prediction() -> None:
    vid = VariationalInformation(nn.Conv2d(2, 3, 1).double(), 3, initial_variance=80.0, variance_floor=0.5).double()
    student, teacher = random(2, 2, 4, 4, seed=13), random(2, 3, 4, 4, seed=14)
    variance = F.softplus(vid.alpha) + 0.5
    torch.testing.assert_close(variance.detach(), torch.full((3,), 80.0, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(vid(student, teacher), vid_loss(vid.adaptor(student), teacher, variance))
    assert "variance_floor=0.5" in repr(vid)


LOSSES = {
    "hint": hint_loss,
    "attention": attention_loss,
    "hcl": hcl_loss,
    "vid": lambda s, t: vid_loss(s, t, torch.tensor([0.5, 2.0])),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences_and_the_teacher_gets_none(name: str) -> None:
    student, teacher = (random(2, 2, 3, 3, seed=seed).requires_grad_() for seed in (15, 16))
    assert gradcheck(lambda s: LOSSES[name](s, teacher.detach()), (student,))
    LOSSES[name](student, teacher).backward()
    assert teacher.grad is None


def test_gradients_of_vid_reach_adaptor_and_variances() -> None:
    vid = VariationalInformation(nn.Linear(2, 3), 3).double()
    student, teacher = random(4, 2, seed=17), random(4, 3, seed=18)
    weight, alpha = vid.adaptor.weight.detach(), vid.alpha.detach()

    def loss(weight: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(vid, {"adaptor.weight": weight, "alpha": alpha}, (student, teacher))

    assert gradcheck(loss, (weight.requires_grad_(), alpha.requires_grad_()))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name: str) -> None:
    loss = LOSSES[name]
    student, teacher = (random(2, 2, 4, 4, seed=seed).bfloat16() for seed in (19, 20))
    assert loss(student, teacher).dtype is torch.float32
    assert torch.equal(loss(student, teacher), loss(student.float(), teacher.float()))


def test_other_shapes_are_refused() -> None:
    for loss in (hint_loss, hcl_loss, lambda s, t: vid_loss(s, t, torch.ones(4))):
        with pytest.raises(TrainingError, match=r"feature \(2, 4, 3, 3\); got \(2, 3, 3, 3\)\. Put an adaptor"):
            loss(torch.zeros(2, 3, 3, 3), torch.zeros(2, 4, 3, 3))
    with pytest.raises(TrainingError, match=r"positions of the teacher's feature \(2, 3, 8, 8\); got \(2, 3, 4, 4\)"):
        attention_loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 8, 8))
    with pytest.raises(TrainingError, match=r"`feature` must be a map .*; got \(2, 3\)\. Tap a module before"):
        attention_map(torch.zeros(2, 3))
    with pytest.raises(TrainingError, match=r"`student` must be a map .*; got \(2, 3\)\. Use `hint_loss`"):
        hcl_loss(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(TrainingError, match=r"of the teacher's 3 channels; got \(2,\)"):
        vid_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2))


def test_variances_out_of_range_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"`variance_floor` must be positive and finite; got 0\.0"):
        VariationalInformation(nn.Identity(), 2, variance_floor=0.0)
    with pytest.raises(TrainingError, match="`initial_variance` must be positive and finite; got inf"):
        VariationalInformation(nn.Identity(), 2, initial_variance=math.inf)
    with pytest.raises(TrainingError, match=r"`initial_variance` must be above variance_floor=1\.0; got 0\.5"):
        VariationalInformation(nn.Identity(), 2, initial_variance=0.5, variance_floor=1.0)
