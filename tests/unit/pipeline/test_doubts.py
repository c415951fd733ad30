"""What a report doubts: a model that guesses is named, one that has learned something is not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from noise_images import noise_data

from secateur.data import MemorySplit
from secateur.data.dataset import guessing_accuracy
from secateur.pipeline.finalize import guessing_doubt
from secateur.report import MeasuredAccuracy, Step


def _data(*counts: int):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    images = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8)
    data = noise_data()
    test = MemorySplit(images, labels, data.test.normalization)
    return replace(data, test=test, classes=tuple(map(str, range(len(counts)))))


def _step(right: int, of: int) -> Step:
    return Step("original", MeasuredAccuracy(right / of, of))


@pytest.mark.parametrize(
    ("counts", "right", "doubted"),
    [
        ((500, 500), 980, False),  # Twice the chance is 100 %, which no classifier of two classes is above.
        ((500, 500), 600, False),
        ((500, 500), 510, True),
        ((950, 50), 940, True),
        ((950, 50), 980, False),
        ((340, 330, 330), 600, False),
        ((10,) * 100, 25, False),
        ((10,) * 100, 15, True),
        ((5, 5), 8, True),  # Of ten images nothing can be said.
    ],
)
def test_a_model_is_compared_with_the_most_frequent_class(counts: tuple[int, ...], right: int, doubted: bool) -> None:
    said = guessing_doubt("original", _step(right, sum(counts)), _data(*counts))
    assert bool(said) is doubted
    if said:
        assert f"about what guessing gives ({100 * max(counts) / sum(counts):.1f} %)" in said[0]


@given(st.lists(st.integers(20, 300), min_size=2, max_size=6), st.floats(0, 1))
def test_nothing_is_doubted_that_is_three_deviations_above_chance(counts: list[int], part: float) -> None:
    n, chance = sum(counts), max(counts) / sum(counts)
    above = chance + 3 * (chance * (1 - chance) / n) ** 0.5
    right = round(n * (above + part * (1 - above))) + 1
    assert right > n or guessing_doubt("original", _step(right, n), _data(*counts)) == ()
    assert guessing_doubt("original", _step(int(chance * n), n), _data(*counts))


def test_a_split_that_does_not_say_its_labels_counts_as_balanced() -> None:
    assert guessing_accuracy(object(), 4) == 0.25
    assert guessing_accuracy(_data(3, 1).test, 2) == 0.75
