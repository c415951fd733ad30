"""Makers of small image sets on disk."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from image_sets import CLASSES, encode, random_pixels, save_table


@pytest.fixture
def parquet(tmp_path: Path) -> Callable[..., Path]:
    """Makes a parquet folder of 30 training and 6 test images; keyword arguments replace those of `save_table`."""

    def make(train: dict[str, object] | None = None, test: dict[str, object] | None = None, **both: object) -> Path:
        for split, n, changes in (("train", 30, train), ("test", 6, test)):
            default = {"images": [encode(p) for p in random_pixels(n)], "labels": [i % 3 for i in range(n)]}
            save_table(tmp_path / f"{split}-00000-of-00001.parquet", **(default | both | (changes or {})))
        return tmp_path

    return make


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes an image folder: 10 training and 2 test images of each class."""

    def make(
        *,
        test: str = "test",
        classes: Sequence[str] = CLASSES,
        test_classes: Sequence[str] | None = None,
        size: Callable[[int], tuple[int, int]] = lambda _: (8, 8),
        gray: bool = False,
    ) -> Path:
        for split, n, names in (("train", 10, classes), (test, 2, test_classes or classes)):
            for c, name in enumerate(names):
                for i in range(n):
                    pixels = random_pixels(1, *size(i), seed=100 * c + i)[0]
                    path = tmp_path / split / name / f"{i:03}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(encode(pixels[..., 0] if gray else pixels))
        return tmp_path

    return make
