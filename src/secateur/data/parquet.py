"""Hugging Face image sets as parquet folders: columns of encoded images and of integer labels."""

import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur.data.dataset import MemorySplit, TrainAndTest, count_training_images, default_augment
from secateur.data.image_files import ImageProblems, open_regular_file
from secateur.data.images import MEMORY_LIMIT, WHOLE, check_fits_in_memory, decode_images
from secateur.data.preprocessing import Resizing
from secateur.data.transforms import Normalization
from secateur.errors import DataError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile


_IMAGE_COLUMNS, _LABEL_COLUMNS = ("img", "image"), ("label", "fine_label")
_TRAIN, _TEST, _VALIDATION = ("train",), ("test",), ("validation", "valid", "val", "dev")
_SHARD = re.compile(r"-(\d+)-of-(\d+)$")
_READ_ROWS, _FEW_ROWS, _LABEL_ROWS = 1024, 16, 2**18
_MAX_ROWS = 2**26
_MAX_CLASSES = 2**17
_MAX_GROUP_BYTES = 2**30
"""The most unpacked bytes of one group of rows. A kilobyte of parquet can claim any number of rows."""


def parquet_files(folder: Path) -> list[Path]:
    """List the parquet files of a folder and of its direct subfolders, in order."""
    return sorted((*folder.glob("*.parquet"), *folder.glob("*/*.parquet")))


def read_parquet(
    folder: Path,
    files: Sequence[Path],
    *,
    limit: int | None,
    image_size: tuple[int, int] | None,
    resizing: Resizing | None = None,
    channels: int | None = None,
    skip_bad_images: bool = False,
) -> TrainAndTest:
    """Read a Hugging Face parquet folder into memory.

    Files belong to the split that their name, or else their folder's name, begins with: ``train``, ``test``, and
    (used for testing where there is no ``test``) ``validation``, ``valid``, ``val`` or ``dev``.

    Args:
        folder: The folder, whose name becomes that of the data.
        files: Its parquet files.
        limit: Number of training images to use, the first ones; None uses all.
        image_size: Height and width to resize to, in pixels; None requires images of one size.
        resizing: How the size is reached; None keeps all of the shorter side.
        channels: See `decode_images`.
        skip_bad_images: Leave out rows whose image is missing or damaged.

    Raises:
        DataError: If files, columns, images or labels are missing, damaged or do not fit together.
    """
    train = _Table.open(folder, files, (_TRAIN,))
    test = _Table.open(folder, files, (_TEST, _VALIDATION))
    if train.names and test.names and train.names != test.names:
        raise DataError(_describe_class_difference(folder, train.names, test.names))
    last = int(train.labels.max())
    if max(last, len(train.names), len(test.names)) >= _MAX_CLASSES:
        raise DataError(f"`data` must have fewer than {_MAX_CLASSES} classes; got the label {last} in {folder}.")
    classes = train.names or test.names or tuple(str(i) for i in range(last + 1))
    train.check_labels(classes)
    test.check_labels(classes)
    count = count_training_images(torch.from_numpy(train.labels), limit, classes)
    problems, name, images = ImageProblems(skip_bad_images), folder.resolve().name, count + len(test.labels)
    sets = ((train, count), (test, len(test.labels)))
    decode = partial(decode_images, image_size=image_size, resizing=resizing or WHOLE, channels=channels)
    splits = [table.split(n, decode, len(classes), problems) for table, n in sets]
    problems.check_left(name, images, 0 if None in splits else 1)
    skipped = problems.settle(name, images)
    learned, tested = (split for split in splits if split is not None)
    return TrainAndTest(learned, tested, classes, name, default_augment(learned.size), skipped, resizing or WHOLE)


def _describe_class_difference(folder: Path, train: tuple[str, ...], test: tuple[str, ...]) -> str:
    k = next((i for i, (a, b) in enumerate(zip(train, test, strict=False)) if a != b), min(len(train), len(test)))
    names = [repr(classes[k]) if k < len(classes) else "nothing" for classes in (train, test)]
    return (
        f"train and test must have the same classes in the same order; class {k} is {names[0]} in train and {names[1]} "
        f"in test ({folder}). Use one export of the data for both."
    )


@dataclass(frozen=True, eq=False)
class _Table:
    """The rows of one split, of which the labels have been read but not the images."""

    files: tuple[Path, ...]
    rows: tuple[int, ...]
    image: str
    label: str
    labels: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, files: Sequence[Path], choices: tuple[tuple[str, ...], ...]) -> "_Table":
        chosen = next((found for prefixes in choices if (found := _files_of_split(files, prefixes))), [])
        if not chosen:
            raise DataError(
                f"{folder} must hold {choices[0][0]} files, named {choices[0][0]}-*.parquet; got "
                f"{', '.join(str(f.relative_to(folder)) for f in files[:5])}."
            )
        if len({file.parent for file in chosen}) > 1:
            raise DataError(
                f"{folder} must hold one configuration; got {choices[0][0]} files in "
                f"{', '.join(sorted({str(f.parent) for f in chosen}))}. Name the folder of the one you want."
            )
        _warn_of_missing_shards(chosen)
        first = _open_parquet(chosen[0])
        image, label = _find_column(first, chosen[0], _IMAGE_COLUMNS), _find_column(first, chosen[0], _LABEL_COLUMNS)
        labels = [_read_labels(file, label) for file in chosen]
        rows = tuple(len(part) for part in labels)
        if not sum(rows):
            raise DataError(f"{folder} must hold at least one {choices[0][0]} image; got an empty set.")
        return cls(tuple(chosen), rows, image, label, np.concatenate(labels), _class_names(first, label))

    def row_name(self, i: int) -> str:
        """Name the file and row of image i of the split."""
        ends = np.cumsum(self.rows)
        k = int(np.searchsorted(ends, i, side="right"))
        return f"row {i - int(ends[k]) + self.rows[k]} of {self.files[k]} (column {self.image!r})"

    def check_labels(self, classes: tuple[str, ...]) -> None:
        wrong = np.flatnonzero((self.labels < 0) | (self.labels >= len(classes)))
        if wrong.size:
            raise DataError(
                f"labels must lie between 0 and {len(classes) - 1} ({len(classes)} classes); got "
                f"{self.labels[wrong[0]]} in {self.row_name(int(wrong[0]))}. A label of -1 marks a set published "
                "without labels: remove those files, and validation files are used instead."
            )

    def split(
        self, count: int, decode: Callable[..., tuple[Tensor, Tensor]], classes: int, problems: ImageProblems
    ) -> MemorySplit | None:
        """Read the first images, without those that cannot be used, which are noted; None if none is left."""
        check_fits_in_memory(count, sum(file.stat().st_size for file in self.files) // sum(self.rows))
        images, kept = decode(self._encoded(count), count, name=self.row_name, problems=problems)
        labels = torch.from_numpy(self.labels[:count])[kept]
        return MemorySplit(images, labels, Normalization.default(images.shape[1]), classes) if len(kept) else None

    def _encoded(self, count: int) -> Iterator[bytes | None]:
        """Yield the encoded images of the first rows, of which few are in memory at once.

        Raises:
            DataError: If a file is damaged, holds fewer, or all of them take more than the limit.
        """
        left, room = count, MEMORY_LIMIT
        for file in self.files:
            try:
                for part in _read_parts(file, _checked_column(file, self.image)):
                    # Equal values are one object, so they count once.
                    room -= sum(map(len, {id(value): value for value in part if value is not None}.values()))
                    if room < 0:
                        raise ValueError(f"its images take more than {MEMORY_LIMIT} bytes, with those before it.")
                    yield from part[:left]
                    left -= len(part[:left])
                    if not left:
                        return
            except DataError:
                raise
            except Exception as error:
                raise _damaged(file, error) from error
        raise DataError(
            f"{self.files[-1].parent} must have an image for each of its {count} labels; got {count - left}. "
            "Download the files again."
        )


def _files_of_split(files: Sequence[Path], prefixes: tuple[str, ...]) -> list[Path]:
    """Select the files whose own name begins with a prefix as a word, or else whose folder's name does."""
    begins = re.compile(rf"({'|'.join(prefixes)})(?![a-zA-Z])")
    known = re.compile(rf"({'|'.join((*_TRAIN, *_TEST, *_VALIDATION))})(?![a-zA-Z])")
    return [file for file in files if begins.match(file.name if known.match(file.name) else file.parent.name)]


def _warn_of_missing_shards(files: Sequence[Path]) -> None:
    shards = [match for file in files if (match := _SHARD.search(file.stem))]
    total = max((int(match[2]) for match in shards), default=0)
    present = {int(match[1]) for match in shards}
    missing = list(itertools.islice((number for number in range(total) if number not in present), 5))
    if missing:
        warnings.warn(
            f"{files[0].parent} holds {len(shards)} of {total} shards of {files[0].name.split('-')[0]}; missing: "
            f"{missing}. Only the images that are there are used.",
            stacklevel=2,
        )


def _open_parquet(file: Path, once: Sequence[str] = ()) -> "ParquetFile":
    """Open a file; equal values in the columns ``once`` are unpacked only once."""
    from pyarrow.parquet import ParquetFile

    try:
        open_regular_file(file).close()
        table = ParquetFile(file, read_dictionary=[*once])
    except Exception as error:  # A damaged file can raise any exception.
        raise _damaged(file, error) from error
    if table.metadata.num_rows > _MAX_ROWS:
        raise _damaged(file, ValueError(f"it says that it has {table.metadata.num_rows} rows, above {_MAX_ROWS}."))
    return table


def _damaged(file: Path, error: Exception) -> DataError:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"{file} must be a complete parquet file; {first_line} Download it again.")


def _find_column(table: "ParquetFile", file: Path, names: tuple[str, ...]) -> str:
    found: list[str] = table.schema_arrow.names
    name = next((name for name in names if name in found), None)
    if name is None:
        wanted = " or ".join(repr(name) for name in names)
        raise DataError(f"{file} must have a column {wanted}; got columns {found}. Rename yours.")
    return name


def _read_labels(file: Path, column: str) -> np.ndarray:
    import pyarrow

    table = _open_parquet(file)
    _find_column(table, file, (column,))
    kind = table.schema_arrow.field(column).type
    if table.metadata.num_rows == 0:
        return np.empty(0, dtype=np.int64)
    if not pyarrow.types.is_integer(kind):
        raise DataError(f"column {column!r} of {file} must hold integer labels; got {kind}. Encode the classes.")
    try:
        parts = [batch.column(0) for batch in table.iter_batches(_LABEL_ROWS, columns=[column])]
        values = pyarrow.chunked_array(parts, kind).cast(pyarrow.int64())
    except Exception as error:
        raise _damaged(file, error) from error
    if len(values) != table.metadata.num_rows:
        raise _damaged(file, ValueError(f"it has {len(values)} labels for {table.metadata.num_rows} rows."))
    if values.null_count:
        raise DataError(f"column {column!r} of {file} must have a label in every row; got {values.null_count} null(s).")
    return values.to_numpy()


def _checked_column(file: Path, column: str) -> str:
    """Return the path of the column of encoded images within its rows.

    Raises:
        DataError: If it holds anything else.
    """
    import pyarrow

    table = _open_parquet(file)
    _find_column(table, file, (column,))
    kind = table.schema_arrow.field(column).type
    is_struct = pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    held = kind.field("bytes").type if is_struct else kind
    # Nulls alone are refused image by image, with the number of the row.
    if not any(test(held) for test in (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_null)):
        raise DataError(f"column {column!r} of {file} must hold encoded images (bytes); got {kind}.")
    return f"{column}.bytes" if is_struct else column


def _read_parts(file: Path, column: str) -> Iterator[list[bytes | None]]:
    """Yield the values of a column, some rows at a time.

    A file may refer to one large image in its dictionary a thousand times. So columns are read with their dictionary,
    which holds the image once. Where a column stops using its dictionary this fails, and the rest is read a few rows at
    a time.
    """
    import pyarrow

    table, done = _open_parquet(file, (column,)), 0
    _check_groups(table)
    try:
        for batch in table.iter_batches(_READ_ROWS, columns=[column]):
            yield _values(batch)
            done += len(batch)
        return
    except pyarrow.ArrowNotImplementedError:
        pass
    for batch in _open_parquet(file).iter_batches(_FEW_ROWS, columns=[column]):
        if done < len(batch):
            yield _values(batch)[done:]
        done = max(0, done - len(batch))


def _check_groups(table: "ParquetFile") -> None:
    # The sizes of single columns are not read, because pyarrow aborts the process if their statistics are damaged.
    for number in range(table.metadata.num_row_groups):
        size = table.metadata.row_group(number).total_byte_size
        if not 0 <= size <= _MAX_GROUP_BYTES:
            raise ValueError(f"its columns take {size} bytes in one group of rows, above {_MAX_GROUP_BYTES}.")


def _values(batch: Any) -> list[bytes | None]:
    """Return the values of a batch; equal values of a dictionary are the same object."""
    import pyarrow

    array = batch.column(0)
    array = array.field("bytes") if pyarrow.types.is_struct(array.type) else array
    if not pyarrow.types.is_dictionary(array.type):
        return array.to_pylist()
    values: list[bytes | None] = array.dictionary.to_pylist()
    return [None if place is None else values[place] for place in array.indices.to_pylist()]


def _class_names(table: "ParquetFile", label: str) -> tuple[str, ...]:
    """Read the class names in the Hugging Face metadata of the schema; empty if there are none."""
    metadata: dict[bytes, bytes] = table.schema_arrow.metadata or {}
    try:
        known: Any = json.loads(metadata.get(b"huggingface", b"{}"))
        return tuple(str(name) for name in known["info"]["features"][label]["names"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ()
