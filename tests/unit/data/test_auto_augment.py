"""Policies of timm: equal to timm, a pure function of image and key in any thread, without global generators."""

import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from secateur.data import Augment, FolderSplit, MemorySplit, Normalization, Split
from secateur.data.auto_augment import load_policy
from secateur.errors import DataError

BYTES = Normalization((0.0,) * 3, (1 / 255,) * 3)
USUAL = Normalization.default(3)
NAMES = ("rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.7-tweights", "original-mstd0.5", "v0", "3a", "augmix-m3-w2")


def pixels(n: int = 24, channels: int = 3, side: int = 12) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (n, side, side, channels), dtype=np.uint8)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_equals_that_of_timm_for_equal_random_numbers(name: str):
    from timm.data import auto_augment as timm

    settings = {"translate_const": 5, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BILINEAR}
    if name.startswith("rand"):
        theirs = timm.rand_augment_transform(name, settings)
    elif name.startswith("augmix"):
        theirs = timm.augment_and_mix_transform(name, settings | {"translate_pct": 0.3})
    else:
        theirs = timm.auto_augment_transform(name, settings)
    mine = load_policy(name, (3, 12, 12), USUAL.mean)
    states, changed, compared = (random.getstate(), np.random.get_state()), 0, 0
    try:
        for key, image in enumerate(pixels(), 2**40):
            random.seed(key)
            np.random.seed((key & 0xFFFFFFFF, key >> 32))
            try:
                expected = np.asarray(theirs(Image.fromarray(image)))
            except ValueError:  # No bits at all: Pillow 13 refuses what timm asks for.
                continue
            np.testing.assert_array_equal(mine(image, key), expected)
            changed += not np.array_equal(image, expected)
            compared += 1
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    assert compared > 18
    assert changed > 12


def test_the_highest_magnitude_leaves_one_bit():
    policy = load_policy("rand-m10-n4-p1-inc1", (3, 12, 12), USUAL.mean)
    for key, image in enumerate(pixels(200)):
        assert policy(image, key).shape == image.shape


def test_the_input_is_not_changed_and_the_result_depends_on_the_key():
    image, policy = pixels()[0], load_policy(NAMES[0], (3, 12, 12), USUAL.mean)
    before = image.copy()
    varied = [policy(image, key).tobytes() for key in range(20)]
    np.testing.assert_array_equal(image, before)
    assert len(set(varied)) > 10
    assert varied == [policy(image, key).tobytes() for key in range(20)]


def test_threads_have_independent_generators():
    policy, images = load_policy("original", (3, 12, 12), USUAL.mean), pixels(200)
    alone = [policy(image, key).tobytes() for key, image in enumerate(images)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda key: policy(images[key], key).tobytes(), range(200))) == alone


def test_timms_module_and_global_generators_are_not_changed():
    from timm.data import auto_augment

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    operations = dict(auto_augment.NAME_TO_OP)
    memory_split().batches(5, seed=0, augment=Augment(auto_augment=NAMES[0])).__next__()
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert sys.modules["timm.data.auto_augment"] is auto_augment
    assert (auto_augment.random, auto_augment.np, auto_augment.NAME_TO_OP) == (random, np, operations)


def memory_split(channels: int = 3) -> MemorySplit:
    images = torch.from_numpy(pixels(channels=channels)).permute(0, 3, 1, 2)
    return MemorySplit(images, torch.arange(24), Normalization((0.0,) * channels, (1 / 255,) * channels))


@pytest.fixture(params=["memory", "folder"])
def split(request: pytest.FixtureRequest, image_folder: Callable[..., Path]) -> Split:
    if request.param == "memory":
        return memory_split()
    paths = tuple(sorted(image_folder().rglob("*.png")))
    return FolderSplit(paths, torch.arange(len(paths)), (3, 8, 8), BYTES)


@pytest.mark.parametrize(
    "augment",
    [Augment(padding=1, auto_augment=NAMES[0]), Augment(padding=0, min_area=0.3, auto_augment=NAMES[2], erase=0.3)],
)
def test_a_varied_image_depends_on_seed_and_epoch_only(split: Split, augment: Augment, monkeypatch: pytest.MonkeyPatch):
    def by_label(batch_size: int, epoch: int) -> Tensor:
        batches = list(split.batches(batch_size, seed=3, epoch=epoch, augment=augment))
        return torch.cat([x for x, _ in batches])[torch.cat([y for _, y in batches]).argsort()]

    first = by_label(7, epoch=1)
    monkeypatch.setattr(import_module("secateur.data.images"), "decoding_threads", lambda: 1)
    torch.testing.assert_close(first, by_label(16, epoch=1), rtol=0, atol=0)
    assert not torch.equal(first, by_label(7, epoch=2))


def test_policies_in_memory_and_streamed_are_equal(image_folder: Callable[..., Path]):
    paths = tuple(sorted(image_folder().rglob("*.png")))
    held = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2)
    splits = (MemorySplit(held, torch.arange(36), BYTES), FolderSplit(paths, torch.arange(36), (3, 8, 8), BYTES))
    augment = Augment(padding=2, auto_augment=NAMES[0], erase=0.5, mixup=0.3, cutmix=1.0)
    for a, b in zip(*(split.batches(10, seed=1, augment=augment) for split in splits), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_gray_images_stay_gray_and_others_are_refused():
    images, _ = next(memory_split(channels=1).batches(24, seed=0, augment=Augment(auto_augment="original")))
    assert images.shape == (24, 1, 12, 12)
    with pytest.raises(DataError, match="`auto_augment` must be given gray or color images; got 4 channels"):
        memory_split(channels=4).batches(4, seed=0, augment=Augment(auto_augment="original"))


@pytest.mark.parametrize("name", ["", "rand-", "rand-x3", "rand-m", "m9", "rand-tother", "augmix-m3-x", "originals"])
def test_names_that_timm_does_not_know_are_refused(name: str):
    with pytest.raises(DataError, match="`auto_augment` must be a policy of timm"):
        Augment(auto_augment=name)
