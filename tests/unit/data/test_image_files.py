"""Images that cannot be used are all named at once, before anything begins; or they are left out and named."""

import io
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import encode, random_pixels
from PIL import Image

from secateur.data import FolderSplit, MemorySplit, load_data
from secateur.errors import DataError

Make = Callable[..., Path]


def _encoded(kind: str, mode: str = "RGB", size: int = 40, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(random_pixels(1, size, size)[0]).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _sixteen_bits() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 40), 40_000, dtype=np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def _floats() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 40), 0.5, dtype=np.float32)).save(buffer, "TIFF")
    return buffer.getvalue()


def _animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(each) for each in random_pixels(3, 40, 40)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


BAD: dict[str, bytes] = {
    "zero bytes.jpg": b"",
    "text.jpg": b"<html>404 Not Found</html>",
    "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "header alone.jpg": _encoded("JPEG")[:300],
    "truncated.jpg": _encoded("JPEG")[:-200],
    "truncated.png": _encoded("PNG")[:-200],
    "truncated.webp": _encoded("WEBP", lossless=True)[:-200],
    "truncated.bmp": _encoded("BMP")[:-200],
    "truncated.tif": _encoded("TIFF")[:-200],
    "16 bits.png": _sixteen_bits(),
    "floats.tif": _floats(),
}
GOOD: dict[str, bytes] = {
    "cmyk.jpg": _encoded("JPEG", "CMYK"),
    "gray.jpg": _encoded("JPEG", "L"),
    "transparent.png": _encoded("PNG", "RGBA"),
    "palette.png": _encoded("PNG", "P"),
    "one bit.png": _encoded("PNG", "1"),
    "animated.gif": _animated(),
    "wrong name.png": _encoded("JPEG"),
    "more after the end.jpg": _encoded("JPEG") + b"\0" * 500,
    "lossless.webp": _encoded("WEBP", lossless=True),
    "bitmap.bmp": _encoded("BMP"),
    "plain.tif": _encoded("TIFF"),
}


@pytest.fixture(params=["held", "streamed"])
def folder(request: pytest.FixtureRequest, image_folder: Make, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 36 images of 40 x 40 pixels, which is held in memory or streamed."""
    if request.param == "streamed":
        monkeypatch.setattr(import_module("secateur.data.images"), "MEMORY_LIMIT", 1000)
    return image_folder(size=lambda _: (40, 40))


def _fill(folder: Path, files: dict[str, bytes], split: str = "train") -> None:
    for name, content in files.items():
        (folder / split / "dog" / name).write_bytes(content)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_found_before_anything_begins(folder: Path, name: str) -> None:
    _fill(folder, {name: BAD[name]})
    with pytest.raises(DataError, match="To go on without such images: --skip-bad-images") as refused:
        load_data(folder)
    assert name in str(refused.value)
    with pytest.warns(UserWarning, match=rf"^1 image of {folder.name} left out, which cannot be used: .*{name}\.$"):
        data = load_data(folder, skip_bad_images=True)
    assert len(data.train) + len(data.validation) == 30
    assert [Path(each).name for each in data.skipped] == [name]


def test_good_images_of_odd_kinds_are_used(folder: Path) -> None:
    _fill(folder, GOOD)
    data = load_data(folder)
    assert len(data.train) + len(data.validation) == 30 + len(GOOD)
    assert data.skipped == ()
    assert sum(len(labels) for _, labels in data.train.batches(8)) == len(data.train)


def test_all_bad_images_of_both_splits_are_named_at_once(folder: Path) -> None:
    _fill(folder, BAD)
    _fill(folder, {f"too {name}": content for name, content in BAD.items()}, "test")
    with pytest.raises(DataError) as refused:
        load_data(folder)
    first, *lines, last = str(refused.value).splitlines()
    count = 2 * len(BAD)
    assert first == f"{count} of {36 + count} images of {folder.name} cannot be used:"
    assert len(lines) == 21
    assert lines[-1] == f"- and {count - 20} more"
    assert last.startswith("To go on without such images")
    with pytest.warns(UserWarning, match=rf"^{count} images of .* left out, .* and {count - 20} more\.$"):
        data = load_data(folder, skip_bad_images=True)
    assert len(data.skipped) == count
    assert (len(data.train) + len(data.validation), len(data.test)) == (30, 6)


def test_labels_stay_with_their_images(folder: Path) -> None:
    whole = load_data(folder)
    _fill(folder, {f"000{name}": content for name, content in BAD.items()})
    with pytest.warns(UserWarning, match="left out"):
        less = load_data(folder, skip_bad_images=True)
    for one, other in ((whole.train, less.train), (whole.validation, less.validation), (whole.test, less.test)):
        wanted = {tuple(image.flatten()[:9].tolist()): int(label) for image, label in _each(one)}
        found = {tuple(image.flatten()[:9].tolist()): int(label) for image, label in _each(other)}
        both = wanted.keys() & found.keys()
        assert both
        assert all(wanted[image] == found[image] for image in both)


def _each(split: MemorySplit | FolderSplit) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [pair for batch in split.batches(8) for pair in zip(*batch, strict=True)]


def test_damage_in_the_middle_is_left_out_where_that_is_asked(folder: Path) -> None:
    content = bytearray(_encoded("PNG"))
    content[200:260] = bytes(60)
    _fill(folder, {"middle.png": bytes(content)})
    with pytest.warns(UserWarning, match=r"middle\.png"):
        assert load_data(folder, skip_bad_images=True).skipped


def test_images_beyond_the_limit_are_not_looked_at(folder: Path) -> None:
    _fill(folder, {"999.png": b""})
    assert load_data(folder, limit=9, validation_fraction=0.3).skipped == ()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_a_good_image_is_refused(folder: Path, split: str) -> None:
    for path in (folder / split).rglob("*.png"):
        path.write_bytes(b"")
    for skip in (False, True):
        with pytest.raises(DataError, match=r"images of .* cannot be used"):
            load_data(folder, skip_bad_images=skip)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes are those of POSIX")
def test_what_is_no_file_is_named(folder: Path) -> None:
    place = folder / "train" / "dog"
    (place / "gone.png").symlink_to(place / "nothing.png")
    os.mkfifo(place / "pipe.png")
    (place / "folder.png").mkdir()
    with pytest.raises(DataError, match="3 of 39 images") as refused:
        load_data(folder)
    assert "gone.png must be an image that PIL can decode; got No such file or directory" in str(refused.value)
    assert "pipe.png must be an image that PIL can decode; got it is a pipe or device, not a file" in str(refused.value)
    with pytest.warns(UserWarning, match="3 images of"):
        assert len(load_data(folder, skip_bad_images=True).skipped) == 3


def test_files_without_permission_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for the system, which lets the administrator read everything."""
    images = import_module("secateur.data.image_files")
    opened = images.open_regular_file

    def refuse(path: Path) -> object:
        if path.name == "001.png":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path)

    monkeypatch.setattr(images, "open_regular_file", refuse)
    with pytest.raises(DataError, match=r"6 of 36 images .*\n- .*001\.png must be .*; got Permission denied"):
        load_data(folder)


@pytest.mark.parametrize("content", [None, b"", b"text", _encoded("PNG", size=8)[:-40]])
def test_rows_of_parquet_are_left_out_or_named_too(parquet: Make, content: bytes | None) -> None:
    images: list[bytes | None] = [encode(each) for each in random_pixels(30)]
    images[4] = images[7] = content
    folder = parquet(train={"images": images})
    with pytest.raises(DataError, match=r"2 of 36 images .*\n- row 4 of .*\n- row 7 of "):
        load_data(folder)
    whole = load_data(parquet(train={"images": [encode(each) for each in random_pixels(30)]}))
    parquet(train={"images": images})
    with pytest.warns(UserWarning, match="2 images of .* left out"):
        data = load_data(folder, skip_bad_images=True)
    assert len(data.train) + len(data.validation) == 28
    found = {tuple(image.flatten().tolist()): int(label) for image, label in _each(data.train)}
    wanted = {
        tuple(image.flatten().tolist()): int(label) for image, label in [*_each(whole.train), *_each(whole.validation)]
    }
    assert all(wanted[image] == label for image, label in found.items())
