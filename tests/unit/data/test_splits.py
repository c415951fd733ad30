"""Stratified, seeded hold-outs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.data.dataset import hold_out
from secateur.errors import DataError


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(lambda counts: max(counts) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_every_class_contributes_in_proportion(counts: list[int], fraction: float, seed: int):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    kept, held = hold_out(labels, fraction, seed)
    assert sorted(kept.tolist() + held.tolist()) == list(range(len(labels)))
    assert len(held) >= 1
    assert len(held) <= max(1, round(fraction * len(labels)))
    assert torch.equal(kept, kept.sort().values)
    for label, count in enumerate(counts):
        given_away = int((labels[held] == label).sum())
        assert count == 0 or given_away <= count - 1
        assert fraction * count - 1 < given_away + (1 if given_away == count - 1 else 0)
        assert given_away < fraction * count + 1


def test_the_number_held_out_is_the_rounded_share():
    labels = torch.arange(1000) % 7
    _, held = hold_out(labels, 0.1234, 0)
    assert len(held) == 123


def test_the_choice_depends_on_the_seed():
    labels = torch.arange(100) % 4
    assert torch.equal(hold_out(labels, 0.3, 1)[1], hold_out(labels, 0.3, 1)[1])
    assert not torch.equal(hold_out(labels, 0.3, 1)[1], hold_out(labels, 0.3, 2)[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fractions_out_of_range_are_refused(fraction: float):
    with pytest.raises(DataError, match="`validation_fraction` must lie in"):
        hold_out(torch.arange(10) % 2, fraction, 0)


def test_negative_seeds_are_refused():
    with pytest.raises(DataError, match="`seed` must not be negative; got -1"):
        hold_out(torch.arange(10) % 2, 0.5, -1)


def test_classes_of_one_image_are_refused():
    with pytest.raises(DataError, match="no class has two"):
        hold_out(torch.arange(10), 0.5, 0)
