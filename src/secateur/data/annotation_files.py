"""Annotation files of strangers, as text: JSON, tables, XML, and what COCO's JSON must hold."""

import csv
import io
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from secateur.data.image_files import open_regular_file, reason_of
from secateur.errors import DataError

_MOST_TEXT = 2**30
"""Bytes of an annotation file. The largest of COCO has 449 MB."""
_LONGEST_NAME = 200
"""Characters of a strange name or value in a message."""
_XML_ENCODING = re.compile(
    rb"""^<\?xml[^>]{0,100}?encoding=["'](iso-8859-[1-9]|iso-8859-1[03-6]|windows-125[0-8]|us-ascii)["']""", re.I
)
"""Encodings of XML other than UTF-8 and UTF-16, in which what an annotation must not hold is still found as text."""


def read_text_file(path: Path, what: str) -> str:
    """Read a text file in UTF-8, such as annotations.

    Args:
        path: The file.
        what: What it must be, for the message: "JSON".

    Raises:
        DataError: If it is not a regular file, is too large, or is not text in UTF-8.
    """
    try:
        return _read(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} must be {what} in UTF-8; got {reason_of(error)}. Repair or remove it.") from error


def _read(path: Path) -> bytes:
    """Read a file; pipes and devices, and more than 1 GiB, are refused."""
    with open_regular_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > _MOST_TEXT:
            raise ValueError(f"{size} bytes, more than {_MOST_TEXT}")
        return file.read(size + 1)


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: If the file holds no such thing.
    """
    try:
        data = json.loads(read_text_file(path, "JSON"))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} must be JSON; got {error}. Repair it.") from error
    if not isinstance(data, dict):
        raise DataError(f"{path} must hold a JSON object; got {type(data).__name__}.")
    return cast(Mapping[str, Any], data)


def read_table_rows(path: Path) -> list[dict[str, str]]:
    """Read a table with a column ``image`` and at least one other: a mapping from columns to texts for each row.

    Raises:
        DataError: If a name is there twice, or a row has more or fewer values than there are columns.
    """
    reader = csv.DictReader(io.StringIO(read_text_file(path, "a table"), newline=""))
    try:
        rows, names = list(reader), list(reader.fieldnames or ())
    except csv.Error as error:
        raise DataError(
            f"{path} must be a table of values with commas between them; got: {error}. Repair it."
        ) from error
    if not rows or "image" not in names or len(names) < 2:
        got = f"the columns {', '.join(names)}" if rows else "no rows"
        raise DataError(f"{path} must have a column `image` and at least one of numbers; got {got}.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} must name every column once; got {shortened(twice)} twice. Rename or remove one.")
    for line, row in enumerate(rows, 2):
        # The reader puts what is too much under no name, and fills up what is too little.
        if len(row) != len(names) or None in row.values():
            raise DataError(
                f"{path}, line {line}: must have {len(names)} values, as many as columns. Correct the line."
            )
    return rows


def read_xml(path: Path) -> str:
    """Read XML as text, without its declaration: what is looked for in it is what a parser sees of it.

    Raises:
        OSError: If it is not a regular file, or cannot be opened.
        ValueError: If it is too large, or in an encoding that is not known or not its own.
    """
    content = _read(path)
    named = _XML_ENCODING.match(content)
    is_wide = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    text = content.decode(named[1].decode() if named else "utf-16" if is_wide else "utf-8-sig")
    return re.sub(r"^<\?xml[^>]*\?>", "", text)  # The encoding that it names is that of the bytes.


def coco_notes(
    data: Mapping[str, Any],
) -> tuple[dict[Any, str], dict[Any, list[tuple[list[float], int]]], tuple[str, ...]]:
    """Return what COCO's JSON says: file names by image id, boxes with their class by image id, and names of classes.

    Boxes are (x1, y1, x2, y2) in pixels; classes are numbered from 1 in the order of their ids. Crowds and boxes
    without an area are left out.

    Raises:
        ValueError: If something is missing or of another kind; the message names its place.
    """
    categories = _coco_objects(data, "categories", "name")
    images = {which: str(each["file_name"]) for which, each in _coco_objects(data, "images", "file_name").items()}
    try:
        number = {which: place for place, which in enumerate(sorted(categories), 1)}
    except TypeError:
        raise ValueError("the ids of `categories` are of several kinds") from None
    boxes: dict[Any, list[tuple[list[float], int]]] = {which: [] for which in images}
    for place, note in enumerate(_coco_list(data, "annotations")):
        try:
            x, y, width, height = map(float, note["bbox"])
        except (KeyError, TypeError, ValueError, OverflowError):
            x = y = width = height = math.nan
        if not all(map(math.isfinite, (x, y, width, height))):
            raise ValueError(
                f"`annotations` {place} must have a `bbox` of 4 finite numbers (x, y, width, height); got "
                f"{shortened(note.get('bbox'))}"
            )
        if width <= 0 or height <= 0 or note.get("iscrowd"):
            continue
        for key, known in (("image_id", boxes), ("category_id", number)):
            if not isinstance(note.get(key), int | float | str) or note[key] not in known:
                raise ValueError(
                    f"`annotations` {place} must have the `{key}` of a listed one; got {shortened(note.get(key))}"
                )
        boxes[note["image_id"]].append(([x, y, x + width, y + height], number[note["category_id"]]))
    return images, boxes, tuple(str(categories[which]["name"]) for which in number)


def _coco_list(data: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = data.get(name)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in cast(list[Any], found)):
        raise ValueError(f"`{name}` must be a list of objects; got {shortened(found)}")
    return cast(list[dict[str, Any]], found)


def _coco_objects(data: Mapping[str, Any], name: str, text: str) -> dict[Any, dict[str, Any]]:
    """Return images or categories by their ids."""
    found: dict[Any, dict[str, Any]] = {}
    for place, each in enumerate(_coco_list(data, name)):
        which = each.get("id")
        if not isinstance(which, int | float | str) or which in found:
            raise ValueError(f"`{name}` {place} must have an `id` that is a number of its own; got {shortened(which)}")
        if not isinstance(each.get(text), int | float | str) or each[text] == "":
            raise ValueError(f"`{name}` {place} must have a `{text}`; got {shortened(each.get(text))}")
        found[which] = each
    return found


def shortened(value: Any) -> str:
    """Return a value of a JSON file for a message: 200 characters at most."""
    text = repr(value) if isinstance(value, str | int | float | None) else json.dumps(value)
    return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}..."
