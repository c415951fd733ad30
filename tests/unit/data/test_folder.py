"""Image folders: in memory when small and of one size, streamed otherwise."""

import os
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import CLASSES, encode, random_pixels
from PIL import Image

from secateur.data import Augment, FolderSplit, MemorySplit, Normalization, load_data
from secateur.data import images as images_module
from secateur.errors import DataError

Make = Callable[..., Path]
PLAIN = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}


@pytest.mark.parametrize("test", ["test", "val", "validation", "valid"])
def test_small_folders_are_held_in_memory(image_folder: Make, test: str):
    data = load_data(image_folder(test=test), **PLAIN)
    assert isinstance(data.test, MemorySplit)
    assert data.classes == CLASSES
    assert (len(data.train), len(data.validation), len(data.test)) == (27, 3, 6)
    images, labels = next(iter(data.test.batches(6)))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]  # class by class in turn
    expected = np.stack([random_pixels(1, seed=100 * c + i)[0] for i in range(2) for c in range(3)])
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), expected)


def test_images_that_already_have_image_size_are_held_in_memory(image_folder: Make):
    folder = image_folder()
    assert isinstance(load_data(folder, image_size=8).train, MemorySplit)
    assert isinstance(load_data(folder, image_size=7).train, FolderSplit)


def test_images_that_are_not_square_can_be_held_in_memory(image_folder: Make):
    data = load_data(image_folder(size=lambda _: (6, 10)))
    assert data.size == (3, 6, 10)


def test_limit_takes_images_of_all_classes_in_turn(image_folder: Make):
    data = load_data(image_folder(), limit=9, validation_fraction=0.3)
    counts = torch.bincount(torch.cat([data.train.labels, data.validation.labels]))
    assert counts.tolist() == [3, 3, 3]


def test_folders_of_mixed_sizes_are_streamed(image_folder: Make):
    data = load_data(image_folder(size=lambda i: (20 + i, 30)), image_size=14, **PLAIN)
    assert isinstance(data.train, FolderSplit)
    assert data.size == (3, 14, 14)
    assert data.augment == Augment(padding=0, flip=True, min_area=0.08)
    images, labels = next(iter(data.test.batches(6)))
    photo = Image.fromarray(random_pixels(1, 20, 30, seed=0)[0])  # shorter side to 14 / 0.875 = 16, center of 14
    expected = np.asarray(photo.resize((24, 16), Image.Resampling.BILINEAR).crop((5, 1, 19, 15)))
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), expected)
    assert labels[0] == 0


def test_folders_beyond_the_memory_limit_are_streamed_with_equal_pixels(
    image_folder: Make, monkeypatch: pytest.MonkeyPatch
):
    folder = image_folder()
    held = load_data(folder)
    monkeypatch.setattr(import_module("secateur.data.images"), "MEMORY_LIMIT", 1000)
    streamed = load_data(folder)
    assert isinstance(streamed.train, FolderSplit)
    for a, b in zip(held.train.batches(10, seed=1), streamed.train.batches(10, seed=1), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_shifts_and_flips_in_memory_and_streamed_are_equal(image_folder: Make, monkeypatch: pytest.MonkeyPatch):
    folder = image_folder()
    held = load_data(folder)
    monkeypatch.setattr(import_module("secateur.data.images"), "MEMORY_LIMIT", 1000)
    streamed = load_data(folder)
    augment = Augment(padding=2)
    for a, b in zip(
        held.train.batches(10, seed=1, augment=augment),
        streamed.train.batches(10, seed=1, augment=augment),
        strict=True,
    ):
        assert torch.equal(a[0], b[0])


def test_streamed_crops_are_parts_of_the_photograph(tmp_path: Path):
    """Pixels are (column, row, 0): a crop's corners tell where it was taken."""
    rows, columns = np.mgrid[0:60, 0:90]
    photo = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    path = tmp_path / "photo.png"
    path.write_bytes(encode(photo))
    data = load_folder_split(path, copies=60)
    images, _ = next(iter(data.batches(60, seed=0, augment=Augment(padding=0, flip=False, min_area=0.2))))
    width = (images[:, 0, 8, -2] - images[:, 0, 8, 1]) * 16 / 13
    height = (images[:, 1, -2, 8] - images[:, 1, 1, 8]) * 16 / 13
    area, aspect = width * height / (60 * 90), width / height
    assert float(images[:, 0].max()) <= 89
    assert float(images[:, 1].max()) <= 59
    assert float(area.min()) > 0.15
    assert float(area.max()) <= 1.02
    assert float(area.mean()) * 1.1 > 0.6  # uniform in [0.2, 1] has mean 0.6; cut sides take a little of it
    whole = area > 0.85
    assert float(aspect[~whole].min()) > 0.7
    assert float(aspect[~whole].max()) < 1.45


def test_large_jpegs_are_decoded_at_reduced_size_for_crops_and_hardly_differ(tmp_path: Path):
    """A smooth photograph of 1,200 x 900: a crop of most of it to 64 pixels needs an eighth of its pixels per side."""
    rows, columns = np.mgrid[0:900, 0:1200]
    waves = [128 + 100 * np.sin(rows / 90 + k) * np.cos(columns / 70) for k in range(3)]
    photo = np.stack(waves, axis=-1).round().astype(np.uint8)
    paths = tmp_path / "photo.jpg", tmp_path / "photo.png"
    Image.fromarray(photo).save(paths[0], quality=95)
    with Image.open(paths[0]) as decoded:
        decoded.save(paths[1])  # The same pixels, in a format that is always decoded whole.
    augment = Augment(padding=0, flip=False, min_area=0.3)
    batches = []
    for path in paths:
        split = FolderSplit((path,) * 20, torch.arange(20), (3, 64, 64), Normalization((0.0,) * 3, (1 / 255,) * 3))
        batches.append(next(split.batches(20, seed=0, augment=augment))[0])
    difference = (batches[0] - batches[1]).abs()
    assert 0 < float(difference.max()) <= 8
    assert float(difference.mean()) < 1
    whole = [next(load_folder_split(path, 1).batches(1))[0] for path in paths]
    assert torch.equal(*whole)  # Nothing is approximated where models are judged.


def load_folder_split(path: Path, copies: int) -> FolderSplit:
    return FolderSplit(
        (path,) * copies, torch.zeros(copies, dtype=torch.int64), (3, 16, 16), Normalization((0.0,) * 3, (1 / 255,) * 3)
    )


def test_gray_folders_have_one_channel(image_folder: Make):
    assert load_data(image_folder(gray=True)).size == (1, 8, 8)


def test_streamed_gray_folders_have_one_channel_and_refuse_color(image_folder: Make):
    folder = image_folder(gray=True, size=lambda i: (20 + i, 30))
    data = load_data(folder, image_size=14)
    assert next(iter(data.train.batches(4)))[0].shape == (4, 1, 14, 14)
    (folder / "test" / "owl" / "001.png").write_bytes(encode(random_pixels(1, 20, 20)[0]))
    with pytest.raises(DataError, match=r"owl/001\.png must be gray like the other images; got color"):
        list(data.test.batches(4))


def test_streamed_gray_images_among_color_ones_become_color(image_folder: Make):
    folder = image_folder(size=lambda i: (20 + i, 30))
    (folder / "test" / "cat" / "000.png").write_bytes(encode(np.full((20, 20), 7, dtype=np.uint8)))
    data = load_data(folder, image_size=14, **PLAIN)
    assert float(next(iter(data.test.batches(1)))[0].sub(7).abs().max()) < 1e-4


def test_a_corrupt_file_is_named_at_the_batch_that_needs_it(image_folder: Make):
    folder = image_folder(size=lambda i: (20 + i, 30))
    data = load_data(folder, image_size=14)
    file = folder / "test" / "dog" / "001.png"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(DataError, match=r"dog/001\.png must be an image that PIL can decode"):
        list(data.test.batches(4))


def test_a_corrupt_header_is_named_at_once(image_folder: Make):
    folder = image_folder()
    (folder / "test" / "dog" / "001.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"dog/001\.png must be an image that PIL can decode; got an unknown format"):
        load_data(folder)


def test_different_sizes_are_refused_without_image_size(image_folder: Make):
    folder = image_folder(size=lambda i: (8 + i, 9))
    with pytest.raises(DataError, match=r"the same size unless `image_size` is given; got 9 x 8 .* and 9 x 9"):
        load_data(folder)


def test_large_sets_that_are_not_square_need_an_image_size(image_folder: Make, monkeypatch: pytest.MonkeyPatch):
    folder = image_folder(size=lambda _: (6, 10))
    monkeypatch.setattr(import_module("secateur.data.images"), "MEMORY_LIMIT", 1000)
    with pytest.raises(DataError, match="`image_size` must be given for a large set of 10 x 6 images"):
        load_data(folder)


def test_an_empty_class_is_refused(image_folder: Make):
    folder = image_folder()
    for file in (folder / "train" / "dog").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"train/dog must hold at least one image; got nothing"):
        load_data(folder)


def test_other_files_are_left_out_with_a_warning(image_folder: Make):
    folder = image_folder()
    (folder / "train" / "dog" / "notes.txt").write_text("x")
    (folder / "train" / "dog" / ".hidden").write_text("x")
    with pytest.warns(UserWarning, match=r"train: 1 entries are not image files and are left out, such as .*notes.txt"):
        data = load_data(folder)
    assert len(data.train) + len(data.validation) == 30


def test_classes_that_differ_are_refused(image_folder: Make):
    folder = image_folder(test_classes=("cat", "dog", "eel"))
    with pytest.raises(DataError, match=r"same classes; \['eel', 'owl'\] \(2 in all\) are in only one of"):
        load_data(folder)


def test_folders_without_train_are_refused(image_folder: Make):
    folder = image_folder()
    (folder / "train").rename(folder / "training")
    with pytest.raises(DataError, match=r"must hold a folder `train` .*; got test, training \(2 entries\)"):
        load_data(folder)


def test_folders_without_test_are_refused(image_folder: Make):
    with pytest.raises(DataError, match=r"must hold a folder `test` or `val` beside `train`; got exam, train"):
        load_data(image_folder(test="exam"))


def test_empty_folders_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"must hold a folder `train` .* or parquet files; got nothing"):
        load_data(tmp_path)


def test_images_without_class_folders_are_refused(image_folder: Make):
    folder = image_folder()
    for path in (folder / "train").iterdir():
        path.rename(folder / path.name)
    (folder / "train" / "a.png").write_bytes(encode(random_pixels(1)[0]))
    with pytest.raises(DataError, match=r"train must hold one folder of images per class; got a\.png"):
        load_data(folder)


def test_limit_is_checked(image_folder: Make):
    with pytest.raises(DataError, match="`limit` must lie between 1 and the 30 training images there are; got 99"):
        load_data(image_folder(), limit=99)


@pytest.mark.parametrize("size", [(5, 8, 8), (3, 0, 9)])
def test_streams_make_images_of_one_to_four_channels(size: tuple[int, int, int]):
    with pytest.raises(DataError, match="`size` must be 1 to 4 channels, a height and a width"):
        FolderSplit((Path("a.png"),), torch.zeros(1, dtype=torch.int64), size, Normalization((0.5,), (0.5,)))


def test_many_files_are_announced_before_they_are_checked(
    image_folder: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    folder = image_folder()
    monkeypatch.setattr(images_module, "_MANY", 36)
    with caplog.at_level("INFO", "secateur"):
        load_data(folder, image_size=7)
    said = f"Checking 36 image files in 3 classes of {folder.name}, before anything begins."
    assert caplog.messages == [said]


@pytest.mark.slow
def test_sixty_thousand_jpegs_of_a_thousand_classes_open_in_seconds(tmp_path: Path):
    """Links to a few, of many sizes. Processor time of two threads and of the system; 7 s were measured."""
    for i in range(50):
        low = Image.fromarray(random_pixels(1, seed=i)[0])
        low.resize((180 + 4 * i, 380 - 3 * i)).save(tmp_path / f"{i}.jpg", quality=70)
    for part, count in (("train", 50), ("test", 10)):
        for k in range(1000):
            (tmp_path / "set" / part / f"{k:04d}").mkdir(parents=True)
            for i in range(count):
                os.link(tmp_path / f"{i}.jpg", tmp_path / "set" / part / f"{k:04d}" / f"{i}.jpg")
    began = time.process_time()
    data = load_data(tmp_path / "set", image_size=224)
    assert time.process_time() - began < 20
    assert (len(data.train), len(data.test), len(data.classes)) == (45_000, 10_000, 1000)
