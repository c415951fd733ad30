"""Calibration batches of any form: run, counted, and split into images to fit to and images to judge by."""

from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn

from secateur._batches import call_model, count_images, first_images, select_images
from secateur.errors import SurgeryError
from secateur.prune.calibration import check_batches, split_calibration

Named = namedtuple("Named", "left right")


def numbered(count: int, *shape: int) -> Tensor:
    """Image i holds only i."""
    return torch.arange(float(count)).reshape(-1, *[1] * len(shape)).expand(count, *shape).contiguous()


FORMS = {
    "tensor": lambda n: numbered(n, 3, 4, 4),
    "tuple": lambda n: (numbered(n, 3, 4, 4), numbered(n, 5)),
    "named tuple": lambda n: Named(numbered(n, 3, 4, 4), numbered(n, 5)),
    "mapping": lambda n: {"ids": torch.arange(n)[:, None].expand(n, 7), "scale": 2.0, "mask": numbered(n, 7)},
    "list of images": lambda n: [torch.full((3, 4 + i, 4), float(i)) for i in range(n)],
    "nested": lambda n: ({"image": numbered(n, 3, 4, 4)}, [numbered(n, 2, 1, 1), numbered(n, 4, 1, 1)]),
    "images and labels": lambda n: (numbered(n, 3, 4, 4), torch.arange(n)),
    "pair and labels": lambda n: ((numbered(n, 3), numbered(n, 2)), torch.arange(n)),
}


def ids(part: object) -> set[tuple[int, ...]]:
    """The images of every part of a batch that runs over images."""
    if isinstance(part, Tensor):
        return {tuple(int(v) for v in part.reshape(len(part), -1)[:, 0].tolist())}
    if isinstance(part, list) and part and part[0].dim() == 3:
        return {tuple(int(image.flatten()[0]) for image in part)}
    parts = part.values() if isinstance(part, dict) else part if isinstance(part, list | tuple) else ()
    return set().union(*map(ids, parts)) if parts else set()


@pytest.mark.parametrize("form", FORMS)
def test_batches_of_every_form_are_counted_and_reduced(form):
    batch = FORMS[form](9)
    assert count_images(batch) == 9
    for index in ([0], [2, 3, 4], [8, 1, 5], range(9)):
        few = select_images(batch, list(index))
        assert type(few) is type(batch)
        assert ids(few) == {tuple(index)}
        assert count_images(few) == len(index)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sizes", [(8,), (9,), (40,), (5, 6), (3, 3, 3), (8, 8, 8, 8), (2,) * 9, (1,) * 30])
def test_the_parts_are_disjoint_and_hold_all_images(form, sizes):
    batches = [FORMS[form](size) for size in sizes]
    split = split_calibration(batches)
    assert not split.is_shared
    fit, held = (sum(map(count_images, part)) for part in (split.fit, split.held_out))
    assert fit + held == sum(sizes)
    assert 0.1 <= held / sum(sizes) <= 0.34
    if len(sizes) == 1:
        (mine,), (other,) = ids(split.fit[0]), ids(split.held_out[0])
        assert sorted(mine + other) == list(range(sizes[0]))
    again = split_calibration(batches)
    assert [ids(batch) for batch in again.held_out] == [ids(batch) for batch in split.held_out]


def test_sorted_classes_are_on_both_sides():
    images = numbered(64, 3)
    labels = torch.arange(4).repeat_interleave(16)
    split = split_calibration([(images, labels)])
    assert set(split.fit[0][1].tolist()) == set(split.held_out[0][1].tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("sizes", [(1,), (7,), (3, 4), (1,) * 7])
def test_too_few_images_are_shared_and_the_split_says_so(sizes):
    batches = [numbered(size, 3) for size in sizes]
    split = split_calibration(batches)
    assert split.is_shared
    assert split.fit == split.held_out == tuple(batches)


def test_the_first_images_come_in_their_batches():
    batches = [numbered(4, 3), numbered(4, 3), numbered(4, 3)]
    assert [len(batch) for batch in first_images(batches, 6)] == [4, 2]
    assert first_images(batches, 12)[0] is batches[0]
    assert first_images(batches, 0) == []


class Both(nn.Module):
    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        return one - two


def test_tuples_go_by_position_and_mappings_by_name():
    one, two = torch.ones(2), torch.zeros(2)
    assert torch.equal(call_model(Both(), (one, two)), one)
    assert torch.equal(call_model(Both(), {"two": one, "one": two}), -one)
    assert torch.equal(call_model(nn.Identity(), one), one)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (Both(), torch.ones(2), r"`calibration` must hold batches as the model's forward.*got Tensor \(batch 1\)"),
        (nn.ReLU(), (torch.ones(2), torch.ones(2)), r"got a tuple of 2 \(batch 1\).*without labels"),
        (Both(), {"one": torch.ones(2), "three": 1}, r"got a mapping with one, three \(batch 1\)"),
        (nn.ReLU(), "images", r"`calibration` must hold tensors; got str \(batch 1\)"),
    ],
)
def test_batches_that_are_no_arguments_are_refused(model, batch, message):
    good = torch.ones(2) if isinstance(model, nn.ReLU) else (torch.ones(2), torch.ones(2))
    check_batches(model, [good], "calibration")
    with pytest.raises(SurgeryError, match=message):
        check_batches(model, [good, batch], "calibration")
