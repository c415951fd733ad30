"""Hostile annotation files and masks are refused with one clear message within seconds, or read correctly."""

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guarded import everything_in, refusal
from PIL import Image

from secateur.data.layouts import COCO, MASKS, TABLE, VOC, YOLO, FolderLayout, look_at

SIDE = 8
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n%%EOF\n"
Spoil = Callable[[Path], object]
OBJECT = "<object><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object>"
XML = f"<annotation><filename>0.png</filename>{OBJECT}</annotation>"
LAUGHS = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10))


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(SIDE * SIDE * 3, dtype=np.uint8).reshape(SIDE, SIDE, 3)).save(path)


def bare_png(width: int, height: int, kind: int, pixels: bytes = b"") -> bytes:
    """A PNG without anything that is not asked for; kind 0 is gray, 3 has a palette."""
    head = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    made = (
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part)) for name, part in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE) % 3).save(path)


def content() -> dict[str, Any]:
    return {
        "images": [{"id": 0, "file_name": "0.png"}],
        "annotations": [{"image_id": 0, "category_id": 1, "bbox": [1, 1, 4, 4], "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cat"}],
    }


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def good(folder: Path) -> None:
    """One small folder of every layout."""
    for name in ("coco/images", "yolo/images/train", "voc/JPEGImages", "masks/train/images", "table/images"):
        picture(folder / name / "0.png")
    written(folder / "coco/annotations/train.json", json.dumps(content()))
    written(folder / "yolo/labels/train/0.txt", "0 .5 .5 .2 .2\n")
    written(folder / "voc/Annotations/0.xml", XML)
    written(folder / "voc/ImageSets/Main/train.txt", "0\n")
    mask(folder / "masks/train/labels/0.png")
    written(folder / "table/train.csv", "image,y\n0.png,1\n")


FILES: dict[FolderLayout, str] = {
    COCO: "coco/annotations/train.json",
    YOLO: "yolo/labels/train/0.txt",
    VOC: "voc/Annotations/0.xml",
    MASKS: "masks/train/labels/0.png",
    TABLE: "table/train.csv",
}


def read(folder: Path, layout: FolderLayout) -> str | None:
    """The message, or None if it was read."""
    before = everything_in(folder)
    said, found = refusal(look_at, layout, folder / layout.name, channels=None)
    assert everything_in(folder) == before
    assert (said is None) == (found is not None)
    return said


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import all modules before a test watches for imports."""
    folder = tmp_path_factory.mktemp("warm")
    good(folder)
    for layout in FILES:
        look_at(layout, folder / layout.name, channels=None)


@pytest.mark.parametrize("layout", FILES, ids=lambda layout: layout.name)
def test_the_good_ones_are_good(tmp_path: Path, layout: FolderLayout) -> None:
    good(tmp_path)
    assert read(tmp_path, layout) is None


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("what", [pipe, device, Path.mkdir])
@pytest.mark.parametrize("layout", FILES, ids=lambda layout: layout.name)
def test_annotations_that_are_not_files(tmp_path: Path, layout: FolderLayout, what: Spoil) -> None:
    good(tmp_path)
    (tmp_path / FILES[layout]).unlink()
    what(tmp_path / FILES[layout])
    assert read(tmp_path, layout)


@pytest.mark.parametrize("name", ["yolo/classes.txt", "voc/ImageSets/Main/val.txt"])
@pytest.mark.parametrize("what", [pipe, device, lambda path: path.write_bytes(b"\xff\xfe\n")])
def test_lists_beside_annotations(tmp_path: Path, name: str, what: Spoil) -> None:
    good(tmp_path)
    what(tmp_path / name)
    said = read(tmp_path, YOLO if "yolo" in name else VOC)
    assert said is not None or not (tmp_path / name).is_file()  # What is no file is no list of classes.


def changed(list_name: str, **changes: Any) -> str:
    found = content()
    found[list_name][0] |= changes
    return json.dumps(found)


NO_NAME = content()
del NO_NAME["categories"][0]["name"]
TWICE = content()
TWICE["images"] *= 2
SPOILED: list[tuple[FolderLayout, str, str | bytes, str]] = [
    (COCO, "levels", "[" * 100_000, "JSON"),
    (COCO, "a list", "[]", "JSON object"),
    (COCO, "null", json.dumps(content() | {"images": None}), "`images` must be a list"),
    (COCO, "an annotation that is a list", json.dumps(content() | {"annotations": [[1]]}), "must be a list of objects"),
    (COCO, "a category without a name", json.dumps(NO_NAME), "`categories` 0 must have a `name`"),
    (COCO, "an image twice", json.dumps(TWICE), "`images` 1 must have an `id`"),
    (COCO, "a list as id", changed("images", id=[0]), "`images` 0 must have an `id`"),
    (COCO, "a vast box", changed("annotations", bbox=[10**400, 0, 1, 1]), "`bbox` of 4 finite numbers"),
    (COCO, "half of a box", changed("annotations", bbox=[1, 2]), "`bbox` of 4 finite numbers"),
    (COCO, "NaN", changed("annotations", bbox=[float("nan"), 0, 4, 4]), "`bbox` of 4 finite numbers"),
    (COCO, "infinite", changed("annotations", bbox=[0, 0, float("inf"), 4]), "`bbox` of 4 finite numbers"),
    (COCO, "an image that is not listed", changed("annotations", image_id=9), "the `image_id` of a listed one; got 9"),
    (COCO, "a long name", changed("images", file_name="x" * 5000), "must be a file in"),
    (COCO, "no name", changed("images", file_name=""), "must have a `file_name`"),
    (COCO, "a name above", changed("images", file_name="../0.png"), "inside of"),
    (COCO, "another encoding", json.dumps(content()).encode("utf-16"), "UTF-8"),
    (YOLO, "a billion classes", "999999999 .5 .5 .2 .2\n", "the class must be below"),
    (YOLO, "a class beyond integers", "9" * 40 + " .5 .5 .2 .2\n", "the class must be below"),
    (YOLO, "NaN", "0 nan .5 .2 .2\n", "fractions"),
    (YOLO, "another encoding", b"\xff\xfe0", "UTF-8"),
    (VOC, "levels", "<a>" * 100_000, "Pascal VOC"),
    (VOC, "entities in 16 bits", f"<!DOCTYPE a [{LAUGHS}]>{XML}".encode("utf-16"), "it declares entities"),
    (VOC, "EBCDIC", b'<?xml version="1.0" encoding="cp037"?>' + f"<!DOCTYPE a []>{XML}".encode("cp037"), "Pascal VOC"),
    (MASKS, "postscript", POSTSCRIPT, "an unknown format"),
    (MASKS, "a million squared", bare_png(10**6, 10**6, 0), "pixels"),
    (MASKS, "above the bound", bare_png(8193, 8193, 0), "more than"),
    (MASKS, "text", b"hello", "an unknown format"),
    (TABLE, "too few values", "image,y\n0.png\n", "line 2: must have 2 values"),
    (TABLE, "too many values", "image,y\n0.png,1,2\n", "line 2: must have 2 values"),
    (TABLE, "a column twice", "image,y,y\n0.png,1,2\n", "every column once"),
    (TABLE, "a long field", "image,y\n" + "x" * 200_000 + ",1\n", "field larger"),
    (TABLE, "another encoding", b"image,y\n\xff,1\n", "UTF-8"),
    (TABLE, "a long name", "image,y\n" + "x" * 5000 + ",1\n", "must be a file in"),
]


@pytest.mark.parametrize(
    ("layout", "name", "text", "words"), SPOILED, ids=[f"{row[0].name}, {row[1]}" for row in SPOILED]
)
def test_spoiled_annotations(tmp_path: Path, layout: FolderLayout, name: str, text: str | bytes, words: str) -> None:
    del name
    good(tmp_path)
    written(tmp_path / FILES[layout], text)
    said = read(tmp_path, layout)
    assert said is not None
    assert words in said


def test_lists_name_nothing_outside(tmp_path: Path) -> None:
    good(tmp_path)
    written(tmp_path / "private.xml", XML)
    written(tmp_path / "voc/ImageSets/Main/train.txt", "../../private\n")
    assert "inside of" in (read(tmp_path, VOC) or "")


def test_a_mask_of_fractions(tmp_path: Path) -> None:
    good(tmp_path)
    content = io.BytesIO()
    Image.fromarray(np.full((SIDE, SIDE), np.nan, np.float32)).save(content, "TIFF")
    written(tmp_path / FILES[MASKS], content.getvalue())
    assert "whole numbers" in (read(tmp_path, MASKS) or "")


def test_a_palette_that_is_missing(tmp_path: Path) -> None:
    """A mask needs the numbers alone; an image needs their colors."""
    bare = bare_png(SIDE, SIDE, 3, (b"\0" + bytes([0, 1] * (SIDE // 2))) * SIDE)
    good(tmp_path)
    written(tmp_path / FILES[MASKS], bare)
    assert read(tmp_path, MASKS) is None
    written(tmp_path / "masks/train/images/0.png", bare)
    assert "without its palette" in (read(tmp_path, MASKS) or "")


def test_a_published_folder_of_coco(tmp_path: Path) -> None:
    """``train2017/`` beside ``annotations/instances_train2017.json``."""
    picture(tmp_path / "coco/train2017/0.png")
    written(tmp_path / "coco/annotations/instances_train2017.json", json.dumps(content()))
    assert read(tmp_path, COCO) is None
