"""Corrupt and hostile images and tables are refused with one clear message, or read correctly."""

import io
import json
import os
import random
import resource
import struct
import warnings
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from guarded import everything_in, refusal
from PIL import Image
from pyarrow import parquet

from secateur.data import load_data

SIDE, ROWS = 6, 12
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 6\n(exploded) (w) file closefile\nshowpage\n%%EOF\n"


def picture(number: int = 0, kind: str = "PNG", size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", size, (20 * number % 256, 7, 9)).save(content, kind)
    return content.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *more: bytes, pixels: bytes = b"") -> bytes:
    """A PNG that claims a size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def flipped(content: bytes, seed: int, times: int = 1) -> bytes:
    draw, found = random.Random(seed), bytearray(content)
    for _ in range(times):
        found[draw.randrange(len(found))] ^= 1 << draw.randrange(8)
    return bytes(found)


IMAGES: dict[str, bytes] = {
    "nothing": b"",
    "text": b"hello",
    "half": picture()[:40],
    "postscript": POSTSCRIPT,
    "a million squared": png(10**6, 10**6),
    "above the bound": png(8193, 8193),
    "a bomb of zeros": png(20_000, 20_000, pixels=bytes(10**6)),
    "no width": png(0, 6),
    "a negative width": png(2**31, 6),
    "text without end": png(6, 6, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))),
    "a profile without end": png(6, 6, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))),
    "other than its name": picture(kind="TIFF")[:60],
    "a bitmap of 2^31": b"BM"
    + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, 2**31 - 1, 1, 24, *[0] * 6),
    "a pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    "html": b"<svg onload=alert(1)>",
    "fits": b"SIMPLE  =                    T" + b" " * 3000,
}


def image_folder(folder: Path, odd: bytes, name: str = "5.png") -> Path:
    for split in ("train", "test"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for number in range(5):
                (folder / split / label / f"{number}.png").write_bytes(picture(number))
    (folder / "train" / "b" / name).write_bytes(odd)
    return folder


def read_all(folder: Path, **settings: Any) -> int:
    """Load a data set and read all its images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load_data(folder, **settings)
        return sum(len(labels) for split in (data.train, data.test) for _, labels in split.batches(4))


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import all modules before a test watches for imports."""
    folder = tmp_path_factory.mktemp("warm")
    table(folder / "a", {})
    for kind in ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF"):
        image_folder(folder / kind, picture(kind=kind))
        assert read_all(folder / kind, image_size=4)
    assert read_all(folder / "a")


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("name", IMAGES)
def test_corrupt_images_in_a_folder(tmp_path: Path, name: str, size: int | None):
    folder = image_folder(tmp_path / "set", IMAGES[name])
    before = everything_in(folder)
    said, _ = refusal(read_all, folder, image_size=size)
    assert everything_in(folder) == before
    assert said is not None
    assert "train/b/5.png" in said


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("seed", range(4))
def test_flipped_images(tmp_path: Path, kind: str, seed: int):
    refusal(read_all, image_folder(tmp_path / "set", flipped(picture(kind=kind), seed, 3)), image_size=4)


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("what", ["pipe", "device", "dead link", "folder"])
def test_images_that_are_not_regular_files(tmp_path: Path, what: str, size: int | None):
    folder = image_folder(tmp_path / "set", b"")
    odd = folder / "train" / "b" / "5.png"
    odd.unlink()
    if what == "pipe":
        os.mkfifo(odd)
    elif what == "folder":
        odd.mkdir()
    else:
        odd.symlink_to("/dev/zero" if what == "device" else "nothing")
    said, _ = refusal(read_all, folder, image_size=size)
    assert said is not None
    assert "train/b/5.png" in said


def test_links_to_real_images_are_followed(tmp_path: Path):
    folder = image_folder(tmp_path / "set", picture())
    odd = folder / "train" / "b" / "5.png"
    odd.rename(tmp_path / "real.png")
    odd.symlink_to(tmp_path / "real.png")
    assert refusal(read_all, folder) == (None, 20)


def table(folder: Path, columns: dict[str, Any], *, names: Any = ("a", "b"), raw: bytes | None = None, **settings: Any):
    """A set in parquet in which columns of the training part are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    images = pa.array([{"bytes": picture(n), "path": str(n)} for n in range(ROWS)])
    features = {"label": {"names": names}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode() if raw is None else raw}
    usual = {"img": images, "label": pa.array([n % 2 for n in range(ROWS)])}
    for split, own in (("train", {**usual, **columns}), ("test", usual)):
        found = pa.table(own).replace_schema_metadata(metadata)
        parquet.write_table(found, folder / f"{split}-00000-of-00001.parquet", **settings)
    return folder


LABELS = pa.array([n % 2 for n in range(ROWS)])
TABLES: dict[str, dict[str, Any]] = {
    "a vast label": {"label": pa.array([0] * (ROWS - 1) + [2**40])},
    "the largest label": {"label": pa.array([0] * (ROWS - 1) + [2**63 - 1])},
    "an unsigned label": {"label": pa.array([0] * (ROWS - 1) + [2**64 - 1], pa.uint64())},
    "a negative label": {"label": pa.array([-(2**62)] * ROWS)},
    "labels as text": {"label": pa.array(["0"] * ROWS)},
    "labels as lists": {"label": pa.array([[0]] * ROWS)},
    "labels as floats": {"label": pa.array([float("nan")] * ROWS)},
    "no label": {"label": pa.array([None] * ROWS, pa.int64())},
    "images as numbers": {"img": pa.array(range(ROWS))},
    "images as lists": {"img": pa.array([[1]] * ROWS)},
    "images without bytes": {"img": pa.array([{"path": "/etc/passwd"}] * ROWS)},
    "bytes as text": {"img": pa.array([{"bytes": "a"}] * ROWS)},
    "paths and no bytes": {"img": pa.array([{"bytes": None, "path": "/etc/passwd"}] * ROWS)},
    "null images": {"img": pa.nulls(ROWS, pa.struct([("bytes", pa.binary())]))},
    "postscript": {"img": pa.array([POSTSCRIPT] * ROWS)},
    "a bomb": {"img": pa.array([png(20_000, 20_000)] * ROWS)},
    "zeros": {"img": pa.array([bytes(2**20)] * ROWS)},
}


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("name", TABLES)
def test_corrupt_columns(tmp_path: Path, name: str, size: int | None):
    folder = table(tmp_path / "set", TABLES[name])
    before = everything_in(folder)
    said, _ = refusal(read_all, folder, image_size=size)
    assert said
    assert everything_in(folder) == before


@pytest.mark.parametrize("name", ["a vast label", "the largest label"])
def test_the_number_of_unnamed_classes_is_bounded(tmp_path: Path, name: str):
    said, _ = refusal(read_all, table(tmp_path / "set", TABLES[name], raw=b"{}"))
    assert said is not None
    assert "must have fewer than 131072 classes" in said


@pytest.mark.parametrize(
    "raw", [b"[" * 100_000, b"\xff", b'{"info": {"features": 3}}', b'{"info": {"features": {"label": {"names": 7}}}}']
)
def test_corrupt_metadata_gives_no_class_names(tmp_path: Path, raw: bytes):
    assert refusal(read_all, table(tmp_path / "set", {}, raw=raw)) == (None, 2 * ROWS - 1)


def test_one_large_image_repeated_a_thousand_times(tmp_path: Path):
    """The file has a kilobyte and claims a gigabyte of images."""
    once = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array([bytes(2**20)]))
    columns = {"img": once, "label": pa.array([0, 1] * 500)}
    settings: dict[str, Any] = {"compression": "zstd", "dictionary_pagesize_limit": 2**22, "store_schema": False}
    folder = table(tmp_path / "set", columns, **settings)
    assert (folder / "train-00000-of-00001.parquet").stat().st_size < 10_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said, _ = refusal(read_all, folder)
    assert said is not None
    assert "must be an image that PIL can decode" in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10  # kilobytes


def test_a_long_thin_image_is_not_resized_to_a_huge_one(tmp_path: Path):
    said, _ = refusal(read_all, image_folder(tmp_path / "set", picture(size=(1, 20_000))), image_size=224)
    assert said is not None
    assert "must not be much longer than wide" in said


@pytest.mark.parametrize("seed", range(30))
def test_flipped_tables(tmp_path: Path, seed: int):
    folder = table(tmp_path / "set", {})
    path = folder / "train-00000-of-00001.parquet"
    path.write_bytes(flipped(path.read_bytes(), seed, 1 + seed % 3))
    refusal(read_all, folder)


@pytest.mark.parametrize("seed", [969, 1475, 1592, 1689])
def test_damaged_statistics_do_not_abort_the_process(tmp_path: Path, seed: int):
    """pyarrow 26 aborts when it is asked for the column of a group in files like these."""
    folder = table(tmp_path / "set", {})
    path = folder / "train-00000-of-00001.parquet"
    path.write_bytes(flipped(path.read_bytes(), seed, 1 + seed % 4))
    refusal(read_all, folder)


def test_groups_of_rows_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(import_module("secateur.data.parquet"), "_MAX_GROUP_BYTES", 100)
    said, _ = refusal(read_all, table(tmp_path / "set", {}))
    assert said is not None
    assert "bytes in one group of rows, above 100" in said


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_truncated_tables(tmp_path: Path, part: float):
    path = table(tmp_path / "set", {}) / "train-00000-of-00001.parquet"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    said, _ = refusal(read_all, path.parent)
    assert said is not None
    assert "must be a complete parquet file" in said


def test_more_rows_than_can_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(import_module("secateur.data.parquet"), "_MAX_ROWS", ROWS - 1)
    said, _ = refusal(read_all, table(tmp_path / "set", {}))
    assert said is not None
    assert f"it says that it has {ROWS} rows, above" in said


@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
def test_tables_that_are_not_regular_files(tmp_path: Path, what: str):
    path = table(tmp_path / "set", {}) / "train-00000-of-00001.parquet"
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    said, _ = refusal(read_all, path.parent)
    assert said


def test_huge_shard_counts_in_file_names_are_harmless(tmp_path: Path):
    folder = table(tmp_path / "set", {})
    (folder / "train-00000-of-00001.parquet").rename(folder / f"train-00000-of-{10**15}.parquet")
    assert refusal(read_all, folder) == (None, 2 * ROWS - 1)


@pytest.mark.slow
def test_thousands_of_flipped_tables(tmp_path: Path):
    folder = table(tmp_path / "set", {})
    path = folder / "train-00000-of-00001.parquet"
    content = path.read_bytes()
    for seed in range(2_000):
        path.write_bytes(flipped(content, seed, 1 + seed % 4))
        refusal(read_all, folder)
    images = image_folder(tmp_path / "images", picture())
    for seed in range(2_000):
        kind = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")[seed % 6]
        (images / "train" / "b" / "5.png").write_bytes(flipped(picture(kind=kind), seed, 1 + seed % 4))
        refusal(read_all, images, image_size=4)
