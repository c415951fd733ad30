"""Mixup and CutMix: the formulas, by hand and against timm's code; labels; dependence on the batch."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch import Tensor

from secateur.data import Augment, MemorySplit, Normalization
from secateur.data.transforms import Mix, draw_mixes, draw_paste_box
from secateur.distill import label_loss
from secateur.errors import DataError

BYTES = Normalization((0.0,) * 3, (1 / 255,) * 3)
STILL = {"padding": 0, "flip": False}


def split(n: int = 50, classes: int = 10) -> MemorySplit:
    pixels = np.random.default_rng(1).integers(0, 256, (n, 3, 8, 6), dtype=np.uint8)
    return MemorySplit(torch.from_numpy(pixels), torch.arange(n) % classes, BYTES)


def batches(source: MemorySplit, augment: Augment, batch_size: int = 16, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(source.batches(batch_size, seed=4, epoch=epoch, augment=augment))


def test_mixup_equals_its_formula():
    source = split()
    for (mixed, labels), (plain, own) in zip(
        batches(source, Augment(**STILL, mixup=0.5)), batches(source, Augment(**STILL)), strict=True
    ):
        share = float(labels[0, own[0]]) if own[0] != own[-1] else 1.0
        for i in range(len(own)):
            j = len(own) - 1 - i
            expected = share * plain[i].double() + (1 - share) * plain[j].double()
            torch.testing.assert_close(mixed[i].double(), expected, rtol=0, atol=1e-4)  # float32 of bytes
            wanted = torch.zeros(10, dtype=torch.float64)
            wanted[own[i]] += share
            wanted[own[j]] += 1 - share
            torch.testing.assert_close(labels[i].double(), wanted, rtol=0, atol=1e-6)


def test_cutmix_pastes_a_box_and_shares_by_its_area():
    source, seen = split(), set[float]()
    for (mixed, labels), (plain, own) in zip(
        batches(source, Augment(**STILL, cutmix=1.0)), batches(source, Augment(**STILL)), strict=True
    ):
        other = plain.flip(0)
        pasted = (mixed != plain).any(1)  # (n, h, w); equal pixels of two images are rare, so the union is the box
        box = pasted.any(0)
        rows, columns = box.any(1).nonzero().flatten(), box.any(0).nonzero().flatten()
        area = len(rows) * len(columns)
        assert int(box.sum()) == area
        inside = box[None, None].expand_as(mixed)
        assert torch.equal(torch.where(inside, other, plain), mixed)
        share = 1 - area / 48
        differ = own != own.flip(0)
        torch.testing.assert_close(labels.gather(1, own[:, None])[differ, 0], torch.full((int(differ.sum()),), share))
        seen.add(share)
    assert len(seen) > 1


@given(st.floats(0, 1), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_the_box_equals_that_of_timm(share: float, height: int, width: int, seed: int):
    class SameDraws:
        """Gives pasted_box the numbers that timm draws."""

        def __init__(self) -> None:
            self.state = np.random.RandomState(seed)

        def integers(self, high: int) -> int:
            return int(self.state.randint(0, high))

    mine = draw_paste_box(share, height, width, SameDraws())  # type: ignore[arg-type]
    state = np.random.get_state()
    try:
        np.random.seed(seed)
        theirs, corrected = cutmix_bbox_and_lam((1, 3, height, width), share)
    finally:
        np.random.set_state(state)
    assert mine == tuple(int(edge) for edge in theirs)
    top, bottom, left, right = mine
    assert 1 - (bottom - top) * (right - left) / (height * width) == pytest.approx(float(corrected))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixed_labels_with_label_smoothing_equal_those_of_timm(share: float, smoothing: float):
    labels = torch.tensor([0, 3, 3, 1, 2])
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = mixup_target(labels, 4, share, smoothing).double()
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    mixed = Mix(share).mix_labels(labels, 4)
    assert mixed.sum(1).tolist() == pytest.approx([1.0] * 5)
    assert label_loss(logits, mixed, smoothing=smoothing).item() == pytest.approx(expected.item(), rel=1e-6)


def test_shares_are_drawn_from_the_beta_distribution():
    shares = np.array([mix.share for mix in draw_mixes(Augment(mixup=0.4), 4000, 8, 8, seed=0, epoch=0)])
    variance = 1 / (4 * (2 * 0.4 + 1))  # of Beta(a, a)
    assert abs(shares.mean() - 0.5) < 4 * (variance / 4000) ** 0.5
    assert abs(shares.var() / variance - 1) < 0.1


def test_with_mixup_and_cutmix_each_batch_gets_one_of_them():
    mixes = draw_mixes(Augment(mixup=0.2, cutmix=1.0), 1000, 8, 8, seed=0, epoch=0)
    assert abs(sum(mix.box is not None for mix in mixes) - 500) < 64  # four standard deviations


def test_mixes_depend_on_seed_epoch_and_place_only():
    augment, source = Augment(mixup=0.2, cutmix=1.0), split(n=64)
    whole = batches(source, augment)
    again = batches(source, augment)
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(whole, again, strict=True))
    late = list(source.batches(16, seed=4, augment=augment, start=2))
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(whole[2:], late, strict=True))
    assert not torch.equal(whole[0][0], batches(source, augment, epoch=1)[0][0])


def test_mixed_labels_have_a_probability_for_every_class():
    images, labels = next(batch for batch in batches(split(classes=3), Augment(mixup=0.2)))
    assert labels.dtype == torch.float32
    assert labels.shape == (len(images), 3)
    known = MemorySplit(split(classes=3).images, torch.arange(50) % 3, BYTES, classes=7)
    for part in (known, known.subset(torch.arange(20)), known.normalized(BYTES)):
        assert batches(part, Augment(cutmix=1.0))[0][1].shape == (16, 7)
    with pytest.raises(DataError, match="`classes` must be more than the highest label, 2; got 2"):
        MemorySplit(known.images, known.labels, BYTES, classes=2)


def test_a_batch_of_one_image_is_mixed_with_itself():
    source = split(n=17, classes=17)
    (_, _), (image, label) = batches(source, Augment(**STILL, mixup=0.5))
    own = source.images[int(label.argmax())]
    assert label.max() == 1
    torch.testing.assert_close(image[0], own.float(), rtol=0, atol=1e-4)


def test_global_generators_are_neither_read_nor_changed():
    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    batches(split(), Augment(mixup=0.2, cutmix=1.0, erase=0.5))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_bad_alphas_are_refused(name: str, alpha: float):
    with pytest.raises(DataError, match=f"`{name}` must be finite and not negative; got"):
        Augment(**{name: alpha})  # type: ignore[arg-type]
