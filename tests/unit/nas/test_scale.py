import pytest
import torch

from secateur.nas.mixture import scale_channels


@pytest.mark.parametrize(
    "positions", [[2, 3, 4], [0, 2, 4], [1], [0, 1, 2, 3, 4]], ids=["a row", "apart", "one", "all"]
)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_some_channels_are_multiplied(positions, dim):
    z = torch.randn(5, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    factors = torch.linspace(-1, 2, len(positions), dtype=torch.float64).requires_grad_()
    where = torch.tensor(positions)
    got = scale_channels(z, factors, where, dim=dim)
    want = z.detach().clone()
    for factor, position in zip(factors.tolist(), positions, strict=True):
        want.select(dim, position).mul_(factor)
    assert torch.equal(got.detach(), want)
    assert torch.autograd.gradcheck(lambda z, f: scale_channels(z, f, where, dim=dim), (z, factors))


def test_only_needed_gradients_are_computed():
    z, factors, where = torch.ones(2, 3, requires_grad=True), torch.ones(2), torch.tensor([0, 2])
    scale_channels(z, factors, where, dim=1).sum().backward()
    assert torch.equal(z.grad, torch.ones(2, 3))
    factors.requires_grad_()
    scale_channels(z.detach(), factors, where, dim=1).sum().backward()
    assert factors.grad.tolist() == [2, 2]


def test_the_result_has_the_dtype_of_the_features():
    """The gradient of the factors is summed in the dtype of the factors."""
    z = torch.ones(300, 2, dtype=torch.bfloat16)
    factors = torch.tensor([0.5], requires_grad=True)
    out = scale_channels(z, factors, torch.tensor([1]), dim=1)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert factors.grad.dtype == torch.float32
    assert float(factors.grad) == 300  # bfloat16 would stop at 256
