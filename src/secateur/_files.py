"""Files and folders that are written completely or not at all, and files that are read with suspicion.

Everything is written under a temporary name beside its destination, flushed to the disk, and renamed. A process that
is killed, or a disk that fills up, leaves what was there before.
"""

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

LOCK = "lock"
"""Name of the file inside a folder that `locked` locks."""


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Generator[Path]:
    """Write one file atomically: yield a temporary path in the same folder, then rename it to ``path``.

    A missing folder is created. If the block raises, the temporary file is removed and ``path`` is unchanged.

    Args:
        path: The destination. An older file there is replaced.

    Yields:
        The path to write to. It has the suffix of ``path``.
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


def write_atomic(path: Path | str, content: bytes | str) -> None:
    """Write one file atomically; text is encoded as UTF-8. See `atomic_file`.

    Raises:
        OSError: If it cannot be written. What was there before is unchanged.
    """
    with atomic_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_folder(folder: Path | str) -> Generator[Path]:
    """Write a folder atomically: yield an empty temporary sibling, then put it in the place of ``folder``.

    An older folder is replaced as a whole, so the caller must check first that it may be. The replacement is one step
    where the file system can exchange two names (Linux). Elsewhere it takes two renames, and the first one is undone
    if the second one fails. If the block raises, the temporary folder is removed and ``folder`` is unchanged.

    Args:
        folder: The destination. Missing parents are created.

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


def _flush(path: Path) -> None:
    """Ask the system to write a file or folder to the disk, so that a power cut cannot undo the order of steps."""
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
    """Swap two names in one step with renameat2(2); return False where the system or the file system cannot."""
    if not _POSIX:
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def remove_dir_atomic(folder: Path) -> None:
    """Remove a folder in one step, so that its name never holds only a part of it.

    A process that is killed meanwhile leaves the folder under a hidden name; `clean_stale` removes that.

    Raises:
        OSError: If it cannot be removed. The folder is then unchanged.
    """
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def clean_stale(out: Path, work: Path) -> None:
    """Remove the temporary folders that killed processes have left beside an output folder.

    A hidden ``.old`` folder of ``out`` stays: it may be the older artifact, which `atomic_folder` moves aside for a
    moment where the file system cannot exchange two names.

    Args:
        out: The output folder.
        work: The folder of its unfinished run.
    """
    draft, tag = rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.part", r"\.[0-9a-f]{8}\.(part|old)"
    # The second pattern is an artifact that was being saved inside a draft.
    stale = re.compile(rf"{draft}|\.{draft}{tag}|\.{re.escape(work.name)}{tag}")
    for path in out.absolute().parent.glob(".*"):
        if stale.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Generator[None]:
    """Report an OSError of the block as an `ArtifactError` that says what to do.

    Args:
        folder: The folder that the block writes to.

    Raises:
        ArtifactError: For any OSError of the block.
    """
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{folder} could not be written: {error.strerror or error}. Free some space, fix the permissions or "
            "choose another folder, then continue with --resume. What was complete is unchanged."
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Lock a folder for this process. The system releases the lock when the process ends, however it ends.

    Where files cannot be locked, other processes are not kept out.

    Raises:
        ArtifactError: If another process holds the lock.
    """
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    # lockf belongs to the process, not to the open file: children that outlive this process do not hold the lock.
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ArtifactError(
                f"`out` must be used by one process at a time; another process is working in {folder} (this is "
                f"process {os.getpid()}). Wait for it, stop it, or choose another --out."
            ) from error
        except OSError:
            pass
        yield


def read_bytes(path: Path, *, limit: int) -> bytes:
    """Read a regular file of at most ``limit`` bytes. Links, devices and pipes are refused.

    Args:
        path: The file.
        limit: Largest accepted size in bytes.

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
        # Not `limit`, which may come from an untrusted manifest: reading allocates as much as it is asked for.
        return file.read(status.st_size + 1)


def _not_regular(path: Path, what: str) -> ArtifactError:
    return ArtifactError(
        f"{path.name} must be a regular file; got {what} ({path}). Copy the real file into the folder."
    )
