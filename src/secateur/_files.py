"""Files and folders that are either wholly there or not at all.

Everything is written under a temporary name beside its destination, flushed to the disk, and renamed. A run that
is killed, or a disk that fills up, leaves what was there before.

Files that are there as a whole or not at all.

Folders of runs: a disk that cannot be written, said in words; what killed processes leave; and who has a folder."""

import contextlib
import ctypes
import errno
import importlib.util
import os
import re
import secrets
import shutil
import stat
from collections.abc import Generator
from pathlib import Path

from secateur.errors import ArtifactError

_POSIX = os.name == "posix"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Generator[Path]:
    """Write one file atomically: yields a temporary path in the same folder, then renames it to ``path``.

    The folder is made if it is missing. If the block raises, the temporary file is removed and ``path`` is as it was.

    Args:
        path: The destination. An older file there is replaced.

    Yields:
        The path to write to; same suffix as ``path``.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
    try:
        yield part
        _flush(part)
        part.replace(path)
        _flush(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(folder: Path | str) -> Generator[Path]:
    """Write a folder atomically: yields an empty temporary sibling, then puts it in the place of ``folder``.

    The caller decides first whether what is at ``folder`` may be replaced; it is replaced whole, in one step where the
    file system can exchange two names (Linux), else in two renames of which the first is undone if the second fails.
    If the block raises, the temporary folder is removed and ``folder`` is as it was.

    Args:
        folder: The destination. Its parents are made if they are missing.

    Yields:
        The folder to write into.
    """
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    part.mkdir()  # not tempfile.mkdtemp, whose folder only its owner may read
    try:
        yield part
        for inside in sorted(part.rglob("*")):
            _flush(inside)
        _flush(part)
        _put_in_place(part, folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a new file (never through a link, never over an existing one) and flush it to the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes; links, devices and pipes are refused.

    Args:
        path: The file.
        limit: Most bytes it may have.

    Raises:
        ArtifactError: If the file is missing, is not a regular file, or is larger.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"`folder` must hold {path.name}; got no such file in {path.parent}. "
            "Give the folder that `secateur compress` wrote."
        ) from error
    except ValueError as error:
        raise ArtifactError(f"`folder` must be a path; got {str(path)!r} ({error}).") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise _not_regular(path, "a symbolic link") from error
        raise ArtifactError(
            f"{path} could not be read: {error.strerror}. Check the path and its permissions."
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise _not_regular(path, "a folder or device")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > limit:
            raise ArtifactError(
                f"{path.name} must have at most {limit} bytes; got {status.st_size} ({path}). "
                "The file is damaged or is not an artifact's."
            )
        # Not the limit, which may be a stranger's claim: reading makes room for as much as it is asked for.
        return file.read(status.st_size + 1)


def _not_regular(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path.name} must be a regular file; got {what} ({path}). Copy the real file into the folder."
    )


def _flush(path: Path) -> None:
    """Ask the system to put a file or folder on the disk."""
    if not _POSIX and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(part: Path, folder: Path) -> None:
    if not folder.exists():
        part.rename(folder)
        return
    if _exchange(part, folder):
        shutil.rmtree(part, ignore_errors=True)
        return
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    folder.rename(aside)
    try:
        part.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, renameat2(2); False where the system or the file system cannot."""
    if not _POSIX:
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step; its folder is made if it is not there.

    Raises:
        OSError: If it cannot be written; what was there before is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


@contextlib.contextmanager
def disk_errors(folder: Path) -> Generator[None]:
    """A disk that cannot be written is said in words.

    Raises:
        ArtifactError: For any OSError inside.
    """
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{folder} could not be written: {error.strerror or error}. Make room, mend the permissions or choose "
            "another folder, then go on with --resume; what was whole is as it was."
        ) from error


def remove_dir_atomic(folder: Path) -> None:
    """Remove a folder so that no part of it is ever there under its name.

    A process that is killed meanwhile leaves it beside, under a hidden name, see `clean_stale`.

    Raises:
        OSError: If it cannot be removed; then all of it is where it was.
    """
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean_stale(out: Path, work: Path) -> None:
    """Remove what killed processes have left of drafts beside an output folder.

    An artifact that was there before is not touched: where a file system cannot exchange two names, it may be hidden
    too, for a moment.

    Args:
        out: The output folder.
        work: The folder of its unfinished run.
    """
    draft, tag = rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.part", r"\.[0-9a-f]{8}\.(part|old)"
    # The second is the draft of an artifact that is saved into a draft.
    left = re.compile(rf"{draft}|\.{draft}{tag}|\.{re.escape(work.name)}{tag}")
    for path in out.absolute().parent.glob(".*"):
        if left.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Have a folder for this process alone; the system gives it free when the process ends, however that ends.

    Where the file system or the system cannot lock files, nobody is kept out.

    Raises:
        ArtifactError: If another process has it.
    """
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    # A lock of the process, not of the open file: children that outlive it do not have it.
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ArtifactError(
                f"`out` must be for one process at a time; got one whose run another process is at ({folder}, "
                f"this is process {os.getpid()}). Wait for it, end it, or choose another --out."
            ) from error
        except OSError:
            pass
        yield


LOCK = "lock"
"""The file in a folder that is locked."""
