import numpy as np
import pytest
import torch
import torch.nn.functional as F

from secateur.nas import interpolate_channels, interpolation_matrix

WIDTHS = [(few, many) for many in range(1, 41) for few in range(1, many + 1)]


def test_interpolation_is_adaptive_pooling_along_the_channels():
    """For every pair of widths up to 40, against both of torch's ways to pool."""
    draw = torch.Generator().manual_seed(0)
    for few, many in WIDTHS:
        x = torch.randn(2, few, 3, 2, generator=draw, dtype=torch.float64)
        got = interpolate_channels(x, many)
        torch.testing.assert_close(got, F.adaptive_avg_pool3d(x, (many, 3, 2)), rtol=1e-14, atol=1e-14)
        rows = x.permute(0, 2, 3, 1).reshape(12, 1, few)
        pooled = F.adaptive_avg_pool1d(rows, many).view(2, 3, 2, many).permute(0, 3, 1, 2)
        torch.testing.assert_close(got, pooled, rtol=1e-14, atol=1e-14)


def test_more_channels_onto_fewer_are_pooled_too():
    x = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(interpolate_channels(x, 4), F.adaptive_avg_pool2d(x, (4, 4)))


def test_rows_of_the_matrix_sum_to_one_and_equal_widths_change_nothing():
    assert np.allclose(interpolation_matrix(3, 8).sum(axis=1), 1)
    assert np.array_equal(interpolation_matrix(5, 5), np.eye(5))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_any_dimension_can_carry_the_channels(dim):
    x = torch.randn(5, 5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want = torch.from_numpy(interpolation_matrix(5, 7))
    letters = "abc"
    one = letters[dim]
    torch.testing.assert_close(
        interpolate_channels(x, 7, dim=dim), torch.einsum(f"n{one},abc->{letters.replace(one, 'n')}", want, x)
    )


def test_interpolation_is_differentiable():
    x = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: interpolate_channels(x, 7), (x,))
