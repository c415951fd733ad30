"""Times between measured widths: linear among widths of one alignment, and never falling along it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from secateur.cost import TimeGrid, alignment

OUTS = np.array([8, 15, 16, 31, 32, 40, 47, 64])
READS = np.array([4, 8, 16, 24, 48])


def stepped(outs: np.ndarray, reads: np.ndarray) -> np.ndarray:
    """Bilinear among the widths of each pair of alignments; another one for each pair."""
    slow = 1 + 0.3 * (16 // alignment(outs)) + 0.1 * (16 // alignment(reads))
    return slow * (2.0 + outs) * (1.0 + reads)


GRID = TimeGrid(OUTS, READS, stepped(OUTS[:, None], READS[None, :]))


def test_measured_widths_have_their_times():
    outs, reads = (axis.reshape(-1) for axis in np.meshgrid(OUTS, READS, indexing="ij"))
    assert GRID.at(outs, reads) == pytest.approx(GRID.seconds.reshape(-1))


def test_between_them_only_widths_of_the_same_alignment_count():
    outs, reads = (axis.reshape(-1) for axis in np.meshgrid(np.arange(15, 48), np.arange(8, 25), indexing="ij"))
    for kind_of_out in (1, 16):
        for kind_of_read in (8, 16):
            mine = (alignment(outs) == kind_of_out) & (alignment(reads) == kind_of_read)
            rows, columns = alignment(OUTS) == kind_of_out, alignment(READS) == kind_of_read
            reference = RegularGridInterpolator(
                (OUTS[rows], READS[columns]), GRID.seconds[np.ix_(rows, columns)], bounds_error=False
            )
            wanted = reference(np.stack([outs[mine], reads[mine]], axis=1))
            assert np.isfinite(wanted).all()
            assert GRID.at(outs[mine], reads[mine]) == pytest.approx(wanted)


def test_the_step_after_an_aligned_width_is_seen():
    assert GRID.at(np.array([32]), np.array([16]))[0] < GRID.at(np.array([31]), np.array([16]))[0]


def test_an_alignment_that_was_not_measured_is_that_of_the_next_better_widths():
    grid = TimeGrid(np.array([8, 16, 24, 32]), np.array([3]), np.array([[5.0], [1], [6], [2]]))
    assert grid.at(np.array([12, 20, 13]), np.array([3, 3, 3])) == pytest.approx([5.25, 5.75, 5.3125])
    only_odd = TimeGrid(np.array([3, 7]), np.array([3]), np.array([[1.0], [2]]))
    assert only_odd.at(np.array([4]), np.array([3])) == pytest.approx([1.25])


def test_beyond_the_measured_widths_the_last_one_holds():
    grid = TimeGrid(np.array([16, 32]), np.array([16]), np.array([[1.0], [2]]))
    assert grid.at(np.array([8, 0, 48, 1000]), np.array([16, 99, 1, 16])) == pytest.approx([1, 1, 2, 2])


@given(st.lists(st.floats(0.1, 10), min_size=9, max_size=9))
def test_noise_never_makes_more_channels_quicker(seconds: list[float]):
    nodes = np.array([16, 32, 48])
    grid = TimeGrid(nodes, nodes, np.array(seconds).reshape(3, 3))
    aligned = np.arange(16, 49, 16)
    table = grid.at(*(axis.reshape(-1) for axis in np.meshgrid(aligned, aligned, indexing="ij"))).reshape(3, 3)
    assert (np.diff(table, axis=0) >= 0).all()
    assert (np.diff(table, axis=1) >= 0).all()
    assert (table >= grid.seconds - 1e-12).all()


def test_relaxed_times_agree_at_aligned_widths_and_have_their_slope():
    aligned = np.array([16, 32, 64])
    outs = torch.tensor(aligned, dtype=torch.float64)
    reads = torch.full_like(outs, 16.0)
    assert GRID.at_tensor(outs, reads).numpy() == pytest.approx(GRID.at(aligned, np.full(3, 16)))
    middle = torch.tensor([24.0], dtype=torch.float64, requires_grad=True)
    seconds = GRID.at_tensor(middle, torch.tensor([32.0], dtype=torch.float64))
    (slope,) = torch.autograd.grad(seconds.sum(), middle)
    ends = GRID.at(np.array([16, 32, 16, 32]), np.array([16, 16, 48, 48]))
    assert seconds.item() == pytest.approx(ends.mean())
    assert slope.item() == pytest.approx((ends[1] + ends[3] - ends[0] - ends[2]) / 2 / 16)
    assert torch.autograd.gradcheck(lambda v: GRID.at_tensor(v, reads[:1]), (middle,))


def test_one_measured_width_is_a_constant():
    grid = TimeGrid(np.array([10]), np.array([3]), np.array([[0.5]]))
    assert grid.at(np.array([1, 10, 99]), np.array([3, 3, 3])) == pytest.approx([0.5] * 3)
    assert grid.at_tensor(torch.tensor([7.0]), torch.tensor([3.0])).tolist() == [0.5]
