"""Decoding and normalizing do not depend on how a file is read, on the number of threads, or on the parts."""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import encode, random_pixels
from PIL import Image

from secateur.data import Augment, FolderSplit, Normalization
from secateur.errors import DataError

BYTES = Normalization((0.0,) * 3, (1 / 255,) * 3)
SIDE, SHORTER = 14, 16


def split_of(*paths: Path) -> FolderSplit:
    return FolderSplit(paths, torch.zeros(len(paths), dtype=torch.int64), (3, SIDE, SIDE), BYTES)


def saved(path: Path, kind: str, seed: int = 0) -> Path:
    """A JPEG of 40 x 30 pixels: plain, or of a kind that cameras and printers write."""
    image = Image.fromarray(random_pixels(1, 30, 40, seed)[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    settings = {"progressive": {"progressive": True}, "turned": {"exif": turned}}.get(kind, {})
    mode = {"gray": "L", "printed": "CMYK"}.get(kind, "RGB")
    image.convert(mode).save(path, "JPEG", **settings)
    return path


@pytest.fixture(params=["whole", "piece by piece"])
def _read(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the tests with files that are read at once, and with files above that size."""
    if request.param != "whole":
        monkeypatch.setattr(import_module("secateur.data.image_files"), "_MAX_READ_AT_ONCE", 10)


@pytest.mark.usefixtures("_read")
@pytest.mark.parametrize("kind", ["plain", "gray", "printed", "progressive", "turned"])
def test_jpegs_have_the_pixels_that_pil_decodes(tmp_path: Path, kind: str):
    path = saved(tmp_path / "photo.jpg", kind)
    images, _ = next(split_of(path).batches(1))
    with Image.open(path) as photo:
        resized = photo.convert("RGB").resize((21, SHORTER), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((3, 1, 3 + SIDE, 1 + SIDE)))
    np.testing.assert_array_equal(images[0].permute(1, 2, 0).numpy(), expected)


@pytest.mark.usefixtures("_read")
@pytest.mark.parametrize("augment", [None, Augment(padding=0, min_area=0.08)])
def test_a_truncated_jpeg_is_refused(tmp_path: Path, augment: Augment | None):
    path = saved(tmp_path / "photo.jpg", "plain")
    path.write_bytes(path.read_bytes()[:800])
    with pytest.raises(
        DataError, match=r"photo\.jpg must be an image that PIL can decode; got image file is truncated"
    ):
        next(split_of(path).batches(1, seed=0, augment=augment))


@pytest.mark.usefixtures("_read")
def test_images_of_16_bits_are_refused(tmp_path: Path):
    path = tmp_path / "photo.png"
    path.write_bytes(encode(np.full((20, 20), 999, dtype=np.uint16)))
    with pytest.raises(DataError, match=r"photo\.png must have 8 bits per channel; got PIL mode 'I;16'"):
        next(split_of(path).batches(1))


def test_batches_are_the_same_with_any_number_of_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    split = split_of(*[saved(tmp_path / f"{seed}.jpg", "plain", seed) for seed in range(21)])
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(import_module("secateur.data.images"), "decoding_threads", lambda threads=threads: threads)
        augment = Augment(padding=0, min_area=0.08, auto_augment="rand-m9-mstd0.5-inc1")
        found.append(torch.cat([images for images, _ in split.batches(4, seed=3, epoch=1, augment=augment)]))
    assert found[0].std() > 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("shape", [(3, 200, 333, 3), (2, 8, 8, 1), (1, 2, 50_000, 3), (0, 4, 4, 3)])
@pytest.mark.parametrize("whole", [True, False])
def test_normalized_floats_equal_the_formula_bit_for_bit(shape: tuple[int, ...], whole: bool):
    """The result does not depend on the size of the parts that are computed at once."""
    usual = Normalization.default(shape[-1])
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    given = pixels if whole else (pixels.permute(0, 3, 1, 2).contiguous().float() / 2).permute(0, 2, 3, 1)
    mean, std = torch.tensor(usual.mean) * 255, torch.tensor(usual.std) * 255
    floats = usual(given)
    assert torch.equal(floats, ((given.float() - mean) / std).permute(0, 3, 1, 2))
    assert floats.is_contiguous(memory_format=torch.channels_last)
    assert floats.dtype == torch.float32
