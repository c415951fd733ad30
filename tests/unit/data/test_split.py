"""Batches are a pure function of (seed, epoch), and augmentation equals its definition."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from secateur.data import (
    Augment,
    FolderSplit,
    ImageData,
    MemorySplit,
    Normalization,
    Split,
    draw_calibration,
    load_data,
)
from secateur.errors import DataError

BYTES = Normalization((0.0,) * 3, (1 / 255,) * 3)
"""A normalization that returns the bytes as floats."""


def memory_split(n: int = 40, height: int = 6, width: int = 5, channels: int = 3) -> MemorySplit:
    pixels = np.random.default_rng(1).integers(1, 256, (n, channels, height, width), dtype=np.uint8)
    return MemorySplit(torch.from_numpy(pixels), torch.arange(n), BYTES)


@pytest.fixture(params=["memory", "folder"])
def split(request: pytest.FixtureRequest, image_folder: Callable[..., Path]) -> Split:
    """Both kinds of split, which must fulfill one contract. Every image has its own label."""
    if request.param == "memory":
        return memory_split()
    paths = tuple(sorted(image_folder().rglob("*.png")))
    return FolderSplit(paths, torch.arange(len(paths)), (3, 8, 8), BYTES)


def everything(split: Split, batch_size: int = 7, **settings: object) -> tuple[Tensor, Tensor]:
    batches = list(split.batches(batch_size, **settings))  # type: ignore[arg-type]
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_fixed_order_without_a_seed(split: Split):
    images, labels = everything(split)
    assert labels.tolist() == list(range(len(split)))
    assert labels.dtype == torch.int64
    assert images.dtype == torch.float32
    assert images.shape == (len(split), *split.size)


def test_batches_are_channels_last(split: Split):
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in split.batches(7))
    augmented = split.batches(7, seed=0, augment=Augment(padding=1, min_area=0.5))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, _ in augmented)


def test_batch_sizes_and_drop_last(split: Split):
    n = len(split)
    assert [len(y) for _, y in split.batches(7)] == [7] * (n // 7) + [n % 7]
    assert [len(y) for _, y in split.batches(7, drop_last=True)] == [7] * (n // 7)
    assert [len(y) for _, y in split.batches(n + 5)] == [n]


@pytest.mark.parametrize("drop_last", [False, True])
def test_start_skips_batches_and_changes_no_other(split: Split, drop_last: bool):
    settings: dict[str, object] = {"seed": 3, "epoch": 2, "augment": Augment(padding=1), "drop_last": drop_last}
    whole = list(split.batches(7, **settings))  # type: ignore[arg-type]
    for start in range(len(whole) + 2):
        rest = list(split.batches(7, start=start, **settings))  # type: ignore[arg-type]
        assert len(rest) == max(len(whole) - start, 0)
        for (images, labels), (wanted, named) in zip(rest, whole[start:], strict=True):
            assert torch.equal(images, wanted)
            assert torch.equal(labels, named)


def test_skipped_images_are_not_decoded(tmp_path: Path):
    paths = tuple(tmp_path / f"{n}.png" for n in range(10))  # Only the last two are there.
    for path in paths[8:]:
        Image.new("RGB", (8, 8)).save(path)
    missing = FolderSplit(paths, torch.arange(10), (3, 8, 8), BYTES)
    assert [len(images) for images, _ in missing.batches(4, start=2)] == [2]
    with pytest.raises(DataError, match=r"7\.png"):
        list(missing.batches(1, start=7))


def test_order_depends_on_seed_and_epoch_only(split: Split):
    def order(seed: int, epoch: int, batch_size: int = 7) -> list[int]:
        return everything(split, batch_size, seed=seed, epoch=epoch)[1].tolist()

    assert order(0, 0) == order(0, 0) == order(0, 0, batch_size=11)
    assert sorted(order(0, 0)) == list(range(len(split)))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


@pytest.mark.parametrize("augment", [Augment(padding=2), Augment(padding=0, min_area=0.3)])
def test_augmentation_of_an_image_depends_on_seed_and_epoch_only(split: Split, augment: Augment):
    def by_label(batch_size: int, epoch: int) -> Tensor:
        images, labels = everything(split, batch_size, seed=3, epoch=epoch, augment=augment)
        return images[labels.argsort()]

    torch.testing.assert_close(by_label(7, epoch=1), by_label(16, epoch=1), rtol=0, atol=0)
    assert not torch.equal(by_label(7, epoch=1), by_label(7, epoch=2))


def test_global_random_states_are_neither_read_nor_changed(split: Split):
    def run() -> tuple[Tensor, Tensor]:
        return everything(split, seed=5, augment=Augment())

    before = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())
    first = run()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    with torch.random.fork_rng():
        torch.manual_seed(123)
        assert torch.equal(first[0], run()[0])


def test_passes_can_be_interleaved(split: Split):
    alone = everything(split, seed=1, epoch=4)[1]
    first, second = split.batches(7, seed=1, epoch=4), split.batches(7, seed=1, epoch=5)
    together = torch.cat([y for (_, y), _ in zip(first, second, strict=True)])
    assert torch.equal(alone, together)


def test_a_pass_can_be_left_early(split: Split):
    _, labels = next(iter(split.batches(7, seed=0)))
    assert len(labels) == 7


def test_batches_do_not_share_memory_with_the_set(split: Split):
    before = everything(split)[0]
    for images, labels in split.batches(len(split)):
        images.zero_()
        labels.zero_()
    assert torch.equal(before, everything(split)[0])
    assert torch.equal(split.labels, torch.arange(len(split)))


def test_subset_takes_positions_in_order(split: Split):
    index = torch.tensor([9, 2, 5])
    images, labels = everything(split.subset(index))
    whole, _ = everything(split)
    assert labels.tolist() == [9, 2, 5]
    assert torch.equal(images, whole[index])


def test_normalization_equals_its_formula():
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    split = memory_split()
    pixels = split.images.double() / 255
    expected = (pixels - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    images, _ = everything(split.normalized(Normalization(mean, std)))
    torch.testing.assert_close(images.double(), expected, rtol=0, atol=1e-6)  # float32 of values below 3


def test_every_augmented_image_is_a_shift_or_mirrored_shift_of_the_padded_one():
    split, pad = memory_split(n=300), 2
    images, labels = everything(split, batch_size=64, seed=0, augment=Augment(padding=pad))
    height, width = split.size[1:]
    seen: set[tuple[int, int, bool]] = set()
    for image, label in zip(images.numpy(), labels.tolist(), strict=True):
        padded = np.pad(split.images[label].numpy(), ((0, 0), (pad, pad), (pad, pad)))
        matches = [
            (top, left, flip)
            for top in range(2 * pad + 1)
            for left in range(2 * pad + 1)
            for flip in (False, True)
            if np.array_equal(image, padded[:, top : top + height, left : left + width][:, :, :: -1 if flip else 1])
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) == 50  # all 5 x 5 x 2 variants; that one of them is missing among 300 has a chance of 12 %
    assert len({(top, left) for top, left, _ in seen}) == 25


def test_without_flip_nothing_is_mirrored():
    split = memory_split(n=200)
    images, labels = everything(split, seed=0, augment=Augment(padding=0, flip=False))
    assert torch.equal(images, split.images[labels].float())


def test_half_of_the_images_are_mirrored():
    split = memory_split(n=2000)
    images, labels = everything(split, batch_size=500, seed=0, augment=Augment(padding=0))
    same = (images == split.images[labels].float()).flatten(1).all(1)
    mirrored = (images == split.images[labels].float().flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert abs(int(mirrored.sum()) - 1000) < 90  # four standard deviations


def test_resized_crops_of_a_ramp_are_ramps_of_the_right_length():
    """On an image whose pixel is its column, a crop of width w is a ramp of slope w."""
    side, n = 64, 400
    ramp = torch.arange(side, dtype=torch.uint8).expand(n, 3, side, side)
    split = MemorySplit(ramp.contiguous(), torch.arange(n), BYTES)
    images, _ = everything(split, 100, seed=0, augment=Augment(padding=0, flip=False, min_area=0.25))
    inner = images[:, 0, side // 2, 4:-4]  # the border repeats pixels
    slopes = (inner[:, -1] - inner[:, 0]) / (inner.shape[1] - 1)
    assert float(slopes.max()) <= 1 + 1e-4
    assert 0.5 * (3 / 4) ** 0.5 - 1e-4 <= float(slopes.min()) < 0.6
    assert 0.7 < float(slopes.mean()) < 0.85  # E sqrt(a) = 0.778 for a uniform in [0.25, 1]
    assert float(inner.diff(dim=1).min()) > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be positive; got 0"),
        ({"start": -1}, "`start` must be the number of batches to leave out, 0 or more; got -1"),
        ({"epoch": -1}, "`seed` and `epoch` must not be negative; got None and -1"),
        ({"seed": -2}, "`seed` and `epoch` must not be negative; got -2 and 0"),
        ({"augment": Augment()}, "`seed` must be given when `augment` is"),
        ({"batch_size": 1000, "drop_last": True}, r"`batch_size` must be at most the \d+ images of the split"),
    ],
)
def test_bad_settings_are_refused_when_batches_is_called(split: Split, settings: dict[str, object], message: str):
    with pytest.raises(DataError, match=message):
        split.batches(**({"batch_size": 7} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding": -1}, "`padding` must be 0 or more pixels; got -1"),
        ({"min_area": 0.0}, r"`min_area` must lie in \(0, 1\]; got 0.0"),
        ({"min_area": 1.5}, r"`min_area` must lie in \(0, 1\]; got 1.5"),
    ],
)
def test_bad_augmentation_is_refused(settings: dict[str, float], message: str):
    with pytest.raises(DataError, match=message):
        Augment(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2).long(),
            r"`images` must be uint8 .*; got torch.float32 \(2, 3, 4, 4\)",
        ),
        (torch.zeros(2, 4, 4).byte(), torch.zeros(2).long(), r"`images` must be uint8 of shape \(n, c, h, w\)"),
        (torch.zeros(2, 1, 4, 4).byte(), torch.zeros(2).long(), r"got 3 for 1 channel\(s\)"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(3).long(), "`labels` must be 2 integers, one per image"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.zeros(2), "`labels` must be 2 integers, one per image"),
        (torch.zeros(2, 3, 4, 4).byte(), torch.tensor([0, -1]), "`labels` must not be negative; got -1"),
        (torch.zeros(0, 3, 4, 4).byte(), torch.zeros(0).long(), "at least one image; got an empty set"),
    ],
)
def test_bad_tensors_are_refused(images: Tensor, labels: Tensor, message: str):
    with pytest.raises(DataError, match=message):
        MemorySplit(images, labels, BYTES)


def test_calibration_images_are_drawn_without_repeats_from_all_classes(split: Split):
    batches = draw_calibration(split, 20, batch_size=8, seed=2)
    assert [len(labels) for _, labels in batches] == [8, 8, 4]
    chosen = torch.cat([labels for _, labels in batches])
    assert len(set(chosen.tolist())) == 20
    whole, _ = everything(split)
    assert torch.equal(torch.cat([images for images, _ in batches]), whole[chosen])
    assert not torch.equal(chosen, torch.cat([y for _, y in draw_calibration(split, 20, seed=3)]))


@pytest.mark.parametrize("n", [0, 1000])
def test_more_calibration_images_than_there_are_are_refused(split: Split, n: int):
    with pytest.raises(DataError, match=rf"`n` must lie between 1 and the \d+ images of the split; got {n}"):
        draw_calibration(split, n)


def test_image_data_is_immutable():
    data: ImageData = load_data("digits")
    with pytest.raises(AttributeError):
        data.name = "other"  # type: ignore[misc]
