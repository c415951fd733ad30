"""Looking at a torch file before torch does: what it would take of memory and time is known without running any of it.

``torch.load(weights_only=True)`` runs no code of a file, but the file still says how much is unpacked and built. Two
kilobytes of compressed zeros are two megabytes, and sixty tuples, each of the one before twice, have 2^60 parts, all
of which Python visits if one becomes the key of a mapping.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any

_MOST_STEPS = 5_000_000
_MOST_PARTS = 10_000_000
"""Of one object with everything that it refers to, counted each time."""
_MOST_LONG = 10_000
"""Whole numbers beyond 32 bits: as keys of one mapping, they can be chosen to collide."""
_REFUSED = frozenset({"builtins bytearray", "__builtin__ bytearray"})
"""Makes as many zeros as it is told to."""
_LOCAL_HEADER = 30
_LEGACY_PICKLES = 5


class AbsurdFileError(ValueError):
    """A file that asks for more than its weights can need."""


def check_torch_file(path: Path) -> None:
    """Refuse a file that would take more memory than its size, or time without end.

    Raises:
        AbsurdFileError: If it does.
        Exception: Of any kind if it is damaged, or no torch file.
    """
    with path.open("rb") as file:
        if zipfile.is_zipfile(file):
            _check_zip(file, path.stat().st_size)
            return
        file.seek(0)
        for _ in range(_LEGACY_PICKLES):
            _check_pickle(file)


def _check_zip(file: IO[bytes], size: int) -> None:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise AbsurdFileError("it is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise AbsurdFileError("its parts are larger than the file")
    for entry in entries:
        if entry.filename.endswith("data.pkl"):
            # Not by zipfile, which insists on check sums that torch may be told to leave out.
            file.seek(entry.header_offset)
            header = file.read(_LOCAL_HEADER)
            names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            file.seek(entry.header_offset + _LOCAL_HEADER + names)
            _check_pickle(file)


def _check_pickle(file: IO[bytes]) -> None:
    """Follow a pickle without building anything: for every object only the number of its parts."""
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[Any, int] = {}
    long = 0
    for steps, (operation, argument, _) in enumerate(pickletools.genops(file), 1):
        name = operation.name
        long += name.startswith("LONG") and "GET" not in name and "PUT" not in name
        if steps > _MOST_STEPS or long > _MOST_LONG or (name == "GLOBAL" and argument in _REFUSED):
            raise AbsurdFileError("it builds more than tensors by name")
        if name == "MARK":
            marks.append(len(stack))
        elif "PUT" in name:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif "GET" in name:
            stack.append(memo[argument])
        else:
            _follow(operation, stack, marks)
        if stack and stack[-1] > _MOST_PARTS:
            raise AbsurdFileError("it builds objects of endless parts")


def _follow(operation: pickletools.OpcodeInfo, stack: list[int], marks: list[int]) -> None:
    before = operation.stack_before
    start = len(stack)
    if pickletools.markobject in before:
        start = marks.pop()
        before = before[: before.index(pickletools.markobject)]
    start -= len(before)
    if start < 0:
        raise ValueError("the pickle is damaged")
    parts = 1 + sum(stack[start:])
    del stack[start:]
    stack.extend(parts for _ in operation.stack_after)
