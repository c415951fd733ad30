"""Data sets of installed packages: scikit-learn's digits and torchvision's CIFAR."""

import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from image_sets import random_pixels

from secateur.data import Augment, load_data
from secateur.errors import DataError


def test_digits():
    data = load_data("digits")
    assert data.size == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert data.augment == Augment(padding=1, flip=False)
    assert (len(data.train), len(data.validation), len(data.test)) == (1294, 144, 359)
    counts = torch.bincount(data.test.labels).tolist()
    assert all(34 <= count <= 38 for count in counts)  # a fifth of 174 to 183 of each class


def test_digits_are_normalized_to_about_zero_and_one():
    data = load_data("digits")
    images = torch.cat([next(iter(split.batches(2000)))[0] for split in (data.train, data.validation, data.test)])
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01


def test_the_seed_moves_validation_but_not_test():
    a, b = load_data("digits", seed=0), load_data("digits", seed=1)
    assert torch.equal(a.test.images, b.test.images)
    assert not torch.equal(a.validation.images, b.validation.images)


def test_digits_can_be_resized_and_limited():
    data = load_data("digits", image_size=16, limit=100)
    assert data.size == (1, 16, 16)
    assert len(data.train) + len(data.validation) == 100
    small = load_data("digits")
    assert abs(float(data.test.images.float().mean() - small.test.images.float().mean())) < 1.5


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"needs scikit-learn, which is missing\. Run: pip install 'secateur\[demo\]'"):
        load_data("digits")


class FakeCifar:
    """A stand-in for torchvision's class without its 170 MB of data."""

    classes = ("a", "b", "c")

    def __init__(self, root: str, train: bool) -> None:
        if not Path(root).is_dir():
            raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
        n = 30 if train else 6
        self.data = random_pixels(n, seed=int(train))
        self.targets = [i % 3 for i in range(n)]


@pytest.mark.parametrize(("name", "kind"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_torchvision(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(f"torchvision.datasets.{kind}", FakeCifar)
    data = load_data(f"torchvision:{name}:{tmp_path}", limit=12)
    assert (len(data.train) + len(data.validation), len(data.test)) == (12, 6)
    assert data.classes == ("a", "b", "c")
    assert data.name == name
    np.testing.assert_array_equal(data.test.images.permute(0, 2, 3, 1).numpy(), random_pixels(6, seed=0))


def test_torchvision_sets_that_are_absent_say_how_to_get_them(tmp_path: Path):
    root = tmp_path / "none"
    with pytest.raises(DataError, match=r"none must hold torchvision's cifar10; .*CIFAR10\('.*none', download=True\)"):
        load_data(f"torchvision:cifar10:{root}")
    assert not root.exists()


def test_other_torchvision_sets_are_refused():
    with pytest.raises(DataError, match=r"must be followed by one of \['cifar10', 'cifar100'\]; got 'svhn'"):
        load_data("torchvision:svhn")


class _WarnsLikeJoblib(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        warnings.warn_explicit("Read-only file system", UserWarning, "a.py", 1, "joblib._multiprocessing_helpers")
        return getattr(sklearn.datasets, name)


def test_digits_come_without_words_of_joblib_about_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without /dev/shm joblib warns when scikit-learn imports it."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", _WarnsLikeJoblib("sklearn.datasets"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_data("digits").train) > 1000
