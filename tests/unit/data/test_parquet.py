"""Hugging Face parquet folders: reading them, and refusing bad ones."""

import io
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import CLASSES, encode, random_pixels, save_table
from PIL import Image

from secateur.data import Augment, load_data
from secateur.data import images as images_module
from secateur.data import parquet as parquet_module
from secateur.data.image_files import ImageProblems
from secateur.data.images import decode_images
from secateur.errors import DataError

Make = Callable[..., Path]


def images_of(split: object) -> np.ndarray:
    return split.images.permute(0, 2, 3, 1).numpy()  # type: ignore[attr-defined]


def test_pixels_labels_and_class_names_are_read_unchanged(parquet: Make):
    data = load_data(parquet())
    assert data.classes == CLASSES
    assert data.size == (3, 8, 8)
    assert data.augment == Augment(padding=1, flip=True)
    np.testing.assert_array_equal(images_of(data.test), random_pixels(6))
    assert data.test.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_train_and_validation_split_the_training_set(parquet: Make):
    data = load_data(parquet(), validation_fraction=0.2)
    assert (len(data.train), len(data.validation)) == (24, 6)
    rows = {row.tobytes() for split in (data.train, data.validation) for row in images_of(split)}
    assert rows == {row.tobytes() for row in random_pixels(30)}
    assert torch.bincount(data.validation.labels).tolist() == [2, 2, 2]


def test_limit_takes_the_first_images(parquet: Make):
    data = load_data(parquet(), limit=12)
    rows = {row.tobytes() for split in (data.train, data.validation) for row in images_of(split)}
    assert rows == {row.tobytes() for row in random_pixels(30)[:12]}


def test_rows_of_several_shards_are_in_order(tmp_path: Path):
    pixels = random_pixels(9)
    for k in range(3):
        part = [encode(p) for p in pixels[3 * k : 3 * k + 3]]
        save_table(tmp_path / f"train-0000{k}-of-00003.parquet", part, [0, 1, 2])
    save_table(tmp_path / "test-00000-of-00001.parquet", [encode(p) for p in pixels], [0, 1, 2] * 3)
    data = load_data(tmp_path, limit=7, validation_fraction=0.3)
    order = torch.cat([data.train.labels, data.validation.labels])
    assert len(order) == 7
    assert {r.tobytes() for s in (data.train, data.validation) for r in images_of(s)} == {
        p.tobytes() for p in pixels[:7]
    }


def test_a_missing_shard_warns(tmp_path: Path):
    save_table(tmp_path / "train-00000-of-00002.parquet", [encode(p) for p in random_pixels(6)], [0, 1, 2] * 2)
    save_table(tmp_path / "test-00000-of-00001.parquet", [encode(p) for p in random_pixels(3)], [0, 1, 2])
    with pytest.warns(UserWarning, match=r"1 of 2 shards of train; missing: \[1\]"):
        data = load_data(tmp_path)
    assert len(data.train) + len(data.validation) == 6


def test_subfolders_may_name_splits_and_validation_replaces_a_missing_test(tmp_path: Path):
    save_table(tmp_path / "train" / "0000.parquet", [encode(p) for p in random_pixels(6)], [0, 1, 2] * 2)
    save_table(tmp_path / "validation" / "0000.parquet", [encode(p) for p in random_pixels(3)], [0, 1, 2])
    data = load_data(tmp_path)
    assert len(data.test) == 3


def test_image_column_of_bytes_and_other_names(parquet: Make):
    folder = parquet(image_column="image", label_column="fine_label", struct=False)
    np.testing.assert_array_equal(images_of(load_data(folder).test), random_pixels(6))


def test_without_metadata_classes_are_numbered(parquet: Make):
    assert load_data(parquet(names=None)).classes == ("0", "1", "2")


def test_gray_sets_have_one_channel_and_are_not_mirrored(parquet: Make):
    gray = random_pixels(30)[..., 0]
    images = [encode(p) for p in gray]
    data = load_data(parquet(train={"images": images}, test={"images": images[:6]}))
    assert data.size == (1, 8, 8)
    assert not data.augment.flip
    assert data.mean == (0.5,)
    np.testing.assert_array_equal(images_of(data.test)[..., 0], gray[:6])


def test_gray_images_among_color_ones_become_color(parquet: Make):
    pixels = random_pixels(6)
    data = load_data(parquet(test={"images": [encode(pixels[0][..., 0]), *(encode(p) for p in pixels[1:])]}))
    np.testing.assert_array_equal(images_of(data.test)[0], np.repeat(pixels[0][..., :1], 3, axis=2))


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK"])
def test_other_color_modes_become_rgb(parquet: Make, mode: str):
    buffer = io.BytesIO()
    image = Image.fromarray(random_pixels(1)[0]).convert(mode)
    image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
    data = load_data(parquet(test={"images": [buffer.getvalue()] * 6}))
    np.testing.assert_array_equal(images_of(data.test)[5], np.asarray(image.convert("RGB")))


def test_image_size_resizes_as_pillow_does(parquet: Make):
    folder = parquet()
    data = load_data(folder, image_size=5)
    expected = np.asarray(Image.fromarray(random_pixels(6)[4]).resize((5, 5), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(images_of(data.test)[4], expected)


def test_images_of_different_sizes_with_image_size_keep_the_central_square(parquet: Make):
    wide = random_pixels(1, 8, 12)[0]
    images = [encode(wide), *(encode(p) for p in random_pixels(5))]
    data = load_data(parquet(test={"images": images}), image_size=8)
    np.testing.assert_array_equal(images_of(data.test)[0], wide[:, 2:10])


def test_mean_and_std_can_be_replaced(parquet: Make):
    data = load_data(parquet(), mean=(0, 0, 0), std=(1, 1, 1))
    images, _ = next(iter(data.test.batches(6)))
    torch.testing.assert_close(images.permute(0, 2, 3, 1), torch.from_numpy(random_pixels(6)) / 255)
    assert (data.mean, data.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_many_large_images_are_decoded_in_threads_in_order(parquet: Make):
    pixels = random_pixels(30, 96, 96)
    images = [encode(p) for p in pixels]
    assert min(map(len, images)) > 16 * 1024
    data = load_data(parquet(train={"images": images}, test={"images": images[:6]}))
    np.testing.assert_array_equal(images_of(data.test), pixels[:6])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "picture"}, r"must have a column 'img' or 'image'; got columns \['picture', 'label'\]"),
        ({"label_column": "class"}, r"must have a column 'label' or 'fine_label'; got columns \['img', 'class'\]"),
        ({"labels": [0, 1, 7] * 10}, r"between 0 and 2 \(3 classes\); got 7 in row 2 of .*train-00000"),
        ({"labels": [0, -1, 2] * 10}, r"got -1 in row 1 of .*published without labels"),
        ({"labels": [0, None, 2] * 10}, r"a label in every row; got 10 null"),
        ({"labels": ["a", "b", "c"] * 10}, r"must hold integer labels; got string"),
        ({"images": [None] * 30}, r"row 0 of .* must hold the bytes of an image; got null"),
        ({"images": [b"no image"] * 30}, r"row 0 of .*train.* must be an image .*; got an unknown format"),
        ({"images": [], "labels": []}, r"at least one train image; got an empty set"),
        ({"names": ("cat", "dog", "eel")}, r"class 2 is 'eel' in train and 'owl' in test"),
        ({"names": ("cat", "dog")}, r"class 2 is nothing in train and 'owl' in test"),
    ],
)
def test_bad_training_files_are_refused(parquet: Make, changes: dict[str, object], message: str):
    folder = parquet(train=changes)
    with pytest.raises(DataError, match=message):
        load_data(folder)


def test_labels_of_other_kinds_of_column_are_refused(parquet: Make, tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = parquet()
    pq.write_table(pa.table({"img": ["a.png"] * 3, "label": [0, 1, 2]}), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"'img' of .*test.* must hold encoded images .*; got string"):
        load_data(folder)


def test_one_corrupt_image_is_named_by_its_row(parquet: Make):
    images = [encode(p) for p in random_pixels(30)]
    images[17] = images[17][:60] + b"\0\0\0\0" + images[17][64:]
    folder = parquet(train={"images": images})
    with pytest.raises(DataError, match=r"row 17 of .*train-00000-of-00001\.parquet \(column 'img'\) must be an image"):
        load_data(folder)


def test_a_truncated_image_is_named_by_its_row(parquet: Make):
    images = [encode(p) for p in random_pixels(6)]
    images[4] = images[4][:100]
    folder = parquet(test={"images": images})
    with pytest.raises(DataError, match=r"row 4 of .*test.*truncated"):
        load_data(folder)


def test_16_bit_images_are_refused(parquet: Make):
    sixteen = [encode(np.zeros((8, 8), dtype=np.uint16))] * 6
    folder = parquet(test={"images": sixteen})
    with pytest.raises(DataError, match=r"8 bits per channel; got PIL mode 'I"):
        load_data(folder)


def test_images_of_different_sizes_are_refused_without_image_size(parquet: Make):
    images = [encode(random_pixels(1, 8, 8)[0])] * 29 + [encode(random_pixels(1, 6, 10)[0])]
    folder = parquet(train={"images": images})
    with pytest.raises(DataError, match=r"the same size unless `image_size` is given; got 8 x 8 .*10 x 6 for row 29"):
        load_data(folder)


def test_train_and_test_of_different_sizes_are_refused(parquet: Make):
    folder = parquet(test={"images": [encode(p) for p in random_pixels(6, 9, 9)]})
    with pytest.raises(DataError, match=r"same \(channels, height, width\); got \(3, 8, 8\) and \(3, 9, 9\)"):
        load_data(folder)


@pytest.mark.parametrize("kept", [0, 1, 200, -10])
def test_truncated_files_are_refused(parquet: Make, kept: int):
    folder = parquet()
    file = folder / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet must be a complete parquet file; .* again"):
        load_data(folder)


def test_damaged_pages_are_refused(parquet: Make):
    folder = parquet()
    file = folder / "train-00000-of-00001.parquet"
    content = bytearray(file.read_bytes())
    content[4:3000] = bytes(2996)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet"):
        load_data(folder)


def test_damaged_label_pages_are_refused(parquet: Make):
    import pyarrow.parquet as pq

    folder = parquet()
    file = folder / "train-00000-of-00001.parquet"
    labels = pq.ParquetFile(file).metadata.row_group(0).column(2)
    content = bytearray(file.read_bytes())
    start = labels.dictionary_page_offset
    content[start : start + labels.total_compressed_size] = b"\xff" * labels.total_compressed_size
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"train-00000-of-00001\.parquet must be a complete parquet file"):
        load_data(folder)


def test_test_labels_beyond_the_training_classes_are_refused(parquet: Make):
    folder = parquet(names=None, test={"labels": [0, 1, 2, 3, 1, 2]})
    with pytest.raises(DataError, match=r"between 0 and 2 \(3 classes\); got 3 in row 3 of .*test"):
        load_data(folder)


@pytest.mark.parametrize(("split", "message"), [("train", "must hold train files"), ("test", "must hold test files")])
def test_a_missing_split_is_named(parquet: Make, split: str, message: str):
    folder = parquet()
    (folder / f"{split}-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=message):
        load_data(folder)


def test_two_configurations_in_one_folder_are_refused(tmp_path: Path):
    for name in ("a", "b"):
        save_table(tmp_path / name / "train-00000-of-00001.parquet", [encode(p) for p in random_pixels(3)], [0, 1, 2])
    with pytest.raises(DataError, match=r"must hold one configuration; got train files in .*/a, .*/b"):
        load_data(tmp_path)


def test_sets_beyond_the_memory_limit_are_refused(parquet: Make, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(import_module("secateur.data.images"), "MEMORY_LIMIT", 4000)
    with pytest.raises(DataError, match=r"must take at most .* GiB; got 30 images of \d+ bytes. Pass `limit`"):
        load_data(parquet())


def test_classes_without_images_warn(parquet: Make):
    with pytest.warns(UserWarning, match="1 of 4 classes have no training image, such as 'yak'"):
        load_data(parquet(names=(*CLASSES, "yak")))


def test_valid_data_does_not_warn(parquet: Make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(load_data(parquet()).test) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 31}, "`limit` must lie between 1 and the 30 training images there are; got 31"),
        ({"limit": 0}, "`limit` must lie between 1 and the 30 training images there are; got 0"),
        ({"limit": 2}, r"the first 2 training images have none of class 'owl' \(1 of 3 classes are absent\)"),
        ({"limit": 3}, "`validation_fraction` must leave something to validate on; got 0.1 of 3 training images"),
        ({"validation_fraction": 0.0}, r"`validation_fraction` must lie in \(0, 1\), both excluded; got 0\.0"),
        ({"validation_fraction": 1.0}, r"`validation_fraction` must lie in \(0, 1\), both excluded; got 1\.0"),
        ({"validation_fraction": float("nan")}, r"`validation_fraction` must lie in \(0, 1\).*got nan"),
        ({"image_size": 0}, "`image_size` must be positive, in pixels; got 0"),
        ({"seed": -1}, "`seed` must not be negative; got -1"),
        ({"mean": (0.5,)}, "must have one number per channel"),
        ({"mean": (0.5,), "std": (0.5,)}, r"got 1 for images with 3 channel\(s\)"),
        ({"mean": (0.5, float("inf"), 0.5)}, "`mean` must be finite numbers"),
        ({"std": (0.5, 0.0, 0.5)}, r"`std` must be positive numbers .*; got \(0\.5, 0\.0, 0\.5\)"),
    ],
)
def test_bad_settings_are_refused(parquet: Make, arguments: dict[str, object], message: str):
    folder = parquet()
    with pytest.raises(DataError, match=message):
        load_data(folder, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", ["nowhere", "/nowhere/at/all", "digit", "timm:resnet18"])
def test_unknown_specs_are_refused(spec: str):
    with pytest.raises(DataError, match=r"`data` must be a folder .*'digits'; got .* no such folder"):
        load_data(spec)


def test_a_file_is_refused(parquet: Make):
    with pytest.raises(DataError, match="which is a file"):
        load_data(parquet() / "train-00000-of-00001.parquet")


@pytest.mark.shared
def test_real_cifar10(cifar10_folder: Path):
    data = load_data(cifar10_folder, limit=200, validation_fraction=0.25)
    assert data.classes[:3] == ("airplane", "automobile", "bird")
    assert (len(data.train), len(data.validation), len(data.test)) == (150, 50, 10_000)
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    images, _ = next(iter(data.test.batches(10_000)))
    scale, shift = torch.tensor(data.std).view(1, 3, 1, 1), torch.tensor(data.mean).view(1, 3, 1, 1)
    # per-channel means of the CIFAR-10 test set are published as 0.494, 0.485, 0.450
    torch.testing.assert_close(
        (images * scale + shift).mean((0, 2, 3)), torch.tensor([0.494, 0.485, 0.450]), atol=1e-3, rtol=0
    )


class _Counted(bytes):
    """Encoded images, of which the number that exists is known."""

    alive, most = 0, 0

    def __new__(cls, content: bytes) -> "_Counted":
        cls.alive += 1
        cls.most = max(cls.most, cls.alive)
        return super().__new__(cls, content)

    def __del__(self) -> None:
        type(self).alive -= 1


@pytest.mark.parametrize("extra", [0, 20_000], ids=["one thread", "several threads"])
def test_few_encoded_images_are_held_at_once(extra: int):
    """Of large files; those are decoded by several threads."""
    content, count = encode(random_pixels(1)[0]) + bytes(extra), 3_000
    _Counted.alive = _Counted.most = 0
    images, kept = decode_images(
        (_Counted(content) for _ in range(count)), count, None, lambda i: f"image {i}", ImageProblems()
    )
    assert (len(images), len(kept)) == (count, count)
    assert _Counted.most <= 1024 + 1


def test_the_bound_of_encoded_images_is_one_for_all_files(parquet: Make, monkeypatch: pytest.MonkeyPatch):
    folder = parquet()
    (file,) = folder.glob("train*.parquet")
    one, two = file.with_name("train-one.parquet"), file.with_name("train-two.parquet")
    file.rename(one)
    assert len(load_data(folder).train) == 27
    encoded = sum(len(encode(p)) for p in random_pixels(30))
    monkeypatch.setattr(parquet_module, "MEMORY_LIMIT", encoded + 1)
    assert len(load_data(folder).train) == 27
    shutil.copy(one, two)
    with pytest.raises(DataError, match=r"train-two.parquet must .* take more than .* with those before it"):
        load_data(folder)


def test_many_images_are_announced(parquet: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(images_module, "_MANY", 30)
    with caplog.at_level("INFO", "secateur"):
        load_data(parquet())
    assert caplog.messages == ["Decoding 30 images into memory."]


_GROWTH = """
import resource, sys
import pyarrow.parquet, secateur.data
def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
secateur.data.load_data(sys.argv[1])
before = most()
secateur.data.load_data(sys.argv[2])
print(most() - before)
"""


@pytest.mark.slow
def test_memory_follows_the_pixels_not_the_files(tmp_path: Path):
    """Four times the images, whose files are twelve times their pixels, take twice their pixels more, not the files."""
    pixels = random_pixels(1000, 16, 16)
    padded = [encode(p) + np.random.default_rng(i).bytes(9_000) for i, p in enumerate(pixels)]
    for name, shards in (("small", 5), ("large", 20)):
        (tmp_path / name).mkdir()
        for k in range(shards):
            unique = [content + f"{k}".encode() for content in padded]
            save_table(tmp_path / name / f"train-{k:05d}-of-{shards:05d}.parquet", unique, [0, 1, 2, 0] * 250)
        save_table(tmp_path / name / "test-00000-of-00001.parquet", padded[:9], [0, 1, 2] * 3)
    command = [sys.executable, "-c", _GROWTH, str(tmp_path / "small"), str(tmp_path / "large")]
    more = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    files = 15_000 * len(padded[0])
    assert more < 2 * 15_000 * pixels[0].nbytes + 0.2 * files, more / 2**20
