"""Random erasing: boxes of the stated size, filled with the mean color, one image at a time."""

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.data import Augment, MemorySplit, Normalization
from secateur.data.transforms import draw_erase_boxes
from secateur.errors import DataError

HALF = Normalization((0.5,) * 3, (0.25,) * 3)


def split(n: int = 200) -> MemorySplit:
    pixels = np.random.default_rng(1).integers(0, 256, (n, 3, 20, 16), dtype=np.uint8)
    return MemorySplit(torch.from_numpy(pixels), torch.arange(n), HALF)


def by_label(augment: Augment, batch_size: int = 32) -> Tensor:
    batches = list(split().batches(batch_size, seed=0, epoch=3, augment=augment))
    return torch.cat([x for x, _ in batches])[torch.cat([y for _, y in batches]).argsort()]


def test_a_box_of_each_chosen_image_is_the_mean_color():
    plain = by_label(Augment(padding=0, flip=False))
    erased = by_label(Augment(padding=0, flip=False, erase=0.4))
    boxes = draw_erase_boxes(200, 0.4, 20, 16, seed=0, epoch=3).tolist()
    chosen = 0
    for before, after, (top, left, bottom, right) in zip(plain, erased, boxes, strict=True):
        expected = before.clone()
        expected[:, top:bottom, left:right] = 0.0
        assert torch.equal(after, expected)
        chosen += bottom > top
    assert abs(chosen - 80) < 28  # four standard deviations


def test_areas_and_aspects_of_boxes_are_uniform_as_documented():
    boxes = draw_erase_boxes(4000, 1.0, 200, 200, seed=0, epoch=0).numpy()
    height, width = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() >= 0
    assert boxes.max() <= 200
    area, aspect = height * width / 200**2, np.log(height / width)
    assert area.max() < 1 / 3 + 0.01
    assert area.min() > 0.02 - 0.002
    assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.01  # cut sides take a little
    assert np.abs(aspect).max() < np.log(1 / 0.3) + 0.1
    assert abs(aspect.mean()) < 0.05
    assert abs((boxes[:, 0] / (200 - height + 1)).mean() - 0.5) < 0.03


def test_erased_boxes_depend_on_seed_epoch_and_image_only():
    assert torch.equal(by_label(Augment(erase=0.5)), by_label(Augment(erase=0.5), batch_size=7))
    first, second = (draw_erase_boxes(50, 0.5, 8, 8, seed=0, epoch=epoch) for epoch in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("probability", [-0.1, 1.1, float("nan")])
def test_bad_probabilities_are_refused(probability: float):
    with pytest.raises(DataError, match=r"`erase` must be a probability in \[0, 1\]; got"):
        Augment(erase=probability)
