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
import tempfile
import threading
from collections.abc import Callable, Collection, Generator
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


Replaceable = Callable[[Path], Collection[str]]
"""Names the files of an older folder that a new one replaces."""


@contextlib.contextmanager
def atomic_folder(
    folder: Path | str, *, replaceable: Replaceable | None = None, must_be_new: bool = False
) -> Generator[Path]:
    """Write a folder atomically: yield an empty temporary sibling, then put it in the place of ``folder``.

    The replacement of an older folder is one step where the file system can exchange two names (Linux). Elsewhere it
    takes two renames, and the first one is undone if the second one fails. If the block raises, the temporary folder is
    removed and ``folder`` is unchanged.

    Args:
        folder: The destination. Missing parents are created.
        replaceable: Names the files of the older folder that may go, as they are at the end of the block. Everything
            else in it is moved into the new folder, under another name if its name is taken. None replaces the older
            folder as a whole, so the caller must check first that it may be.
        must_be_new: Refuse to replace anything.

    Yields:
        The folder to write into.

    Raises:
        ArtifactError: If it must be new and another process or thread has made it meanwhile.
        FileExistsError: If a file or a link is in its place by then.
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
        older = _put_in_place(part, folder, must_be_new=must_be_new)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    if older is not None and replaceable is None:
        shutil.rmtree(older, ignore_errors=True)
    elif older is not None and replaceable is not None:
        _carry_over(older, folder, replaceable(older))
    _flush(folder.parent)


def _flush(path: Path) -> None:
    """Ask the system to write a file or folder to the disk, so that a power cut cannot undo the order of steps."""
    if not _POSIX and path.is_dir():
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(part: Path, folder: Path, *, must_be_new: bool) -> Path | None:
    """Rename a finished folder; return where the older one lies now, if there was one."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise FileExistsError(errno.EEXIST, "there is a file or link by now", str(folder))
    try:
        part.rename(folder)  # over an empty folder too, where the system can do that
        return None
    except OSError as error:
        if not folder.exists():
            raise
        if must_be_new:
            raise _in_use(folder) from error
    if _exchange(part, folder):
        return part
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    folder.rename(aside)
    try:
        part.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    return aside


def _carry_over(older: Path, folder: Path, replaceable: Collection[str]) -> None:
    """Move what is not replaced out of an older folder, then remove that; nothing else is ever removed.

    A program that has the older folder open may still add files to it, so it is removed only once it is empty.
    """
    for _ in range(_ATTEMPTS):
        for entry in sorted(older.iterdir()):
            if entry.name in replaceable and (entry.is_symlink() or not entry.is_dir()):
                entry.unlink()
                continue
            target = folder / entry.name
            if os.path.lexists(target):
                target = folder / f"{entry.stem}.kept-{secrets.token_hex(4)}{entry.suffix}"
            entry.rename(target)
        with contextlib.suppress(OSError):
            older.rmdir()
            return


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


def clean_stale(out: Path, work: Path, *, own: Collection[str] | None = None) -> None:
    """Remove the temporary folders that killed processes have left beside an output folder.

    A hidden ``.old`` folder of ``out`` stays: it may be the older artifact, which `atomic_folder` moves aside for a
    moment where the file system cannot exchange two names.

    Args:
        out: The output folder.
        work: The folder of its unfinished run.
        own: Names of the files of an artifact. Everything else in a draft came from the older folder and is moved into
            ``out``; if there is no such folder, the draft stays. None removes drafts with all that they hold.
    """
    draft, tag = rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.part", r"\.[0-9a-f]{8}\.(part|old)"
    # The second pattern is an artifact that was being saved inside a draft.
    stale = re.compile(rf"{draft}|\.{draft}{tag}|\.{re.escape(work.name)}{tag}")
    for path in out.absolute().parent.glob(".*"):
        if not stale.fullmatch(path.name):
            continue
        if own is None or not re.fullmatch(draft, path.name) or path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
            continue
        with contextlib.suppress(OSError):
            ours = {entry.name for entry in path.iterdir() if entry.name in own or _TEMPORARY.fullmatch(entry.name)}
            if all(entry.name in ours for entry in path.iterdir()):
                shutil.rmtree(path, ignore_errors=True)
            elif out.is_dir():
                _carry_over(path, out, ours)


_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.(part|old)(\..*)?")
"""Names that `atomic_file` and `atomic_folder` give."""
_ATTEMPTS = 5
"""How often a folder is emptied into which another program still writes."""


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
def temporary_folder(prefix: str, *, room: int = 0) -> Generator[Path]:
    """Yield a folder among the temporary files, which is removed at the end.

    Args:
        prefix: Beginning of its name.
        room: Bytes that the block will write. Libraries that find no room there end with errors that do not say so.

    Raises:
        ArtifactError: If it cannot be made, or there is less room.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)))
        except OSError as error:
            raise ArtifactError(
                "A folder for temporary files must be found in TMPDIR, /tmp, /var/tmp or the current folder; got "
                f"{error.strerror or error}. Set TMPDIR to a folder that can be written and has room."
            ) from error
        check_temporary_room(folder, room)
        yield folder


def check_temporary_room(folder: Path, room: int) -> None:
    """Refuse a folder for temporary files that has less room than so many bytes.

    Raises:
        ArtifactError: If so.
    """
    free = shutil.disk_usage(folder).free
    if free < room:
        raise ArtifactError(
            f"The folder for temporary files must have {room / 1e6:.1f} MB free; got {free / 1e6:.1f} MB in "
            f"{folder.parent}. Free some space there, or set TMPDIR to a folder with more."
        )


_held: set[tuple[int, int]] = set()
"""Device and number of the folders that this process has locked: locks of files do not keep its own threads apart."""
_held_guard = threading.Lock()


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Lock a folder for this thread. The system releases the lock when the process ends, however it ends.

    Where files cannot be locked, other processes are not kept out.

    Raises:
        ArtifactError: If another thread or process holds the lock, or has replaced the folder.
        FileNotFoundError: If there is no such folder.
    """
    status = folder.stat()
    key = (status.st_dev, status.st_ino)
    with _held_guard:
        if key in _held:
            raise _in_use(folder, "thread of this process")
        _held.add(key)
    try:
        with _locked_against_processes(folder):
            yield
    finally:
        with _held_guard:
            _held.discard(key)


@contextlib.contextmanager
def _locked_against_processes(folder: Path) -> Generator[None]:
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    # lockf belongs to the process, not to the open file: children that outlive this process do not hold the lock. But
    # closing any file of that name releases it, so no other thread may come this far.
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise _in_use(folder) from error
        except OSError:
            pass
        # The process that held the lock may have removed the folder, and another one made a new one.
        if not _is_still_there(folder / LOCK, file.fileno()):
            raise _in_use(folder)
        yield


def _is_still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def _in_use(folder: Path, who: str = "process") -> ArtifactError:
    return ArtifactError(
        f"`out` must be used by one process at a time; another {who} is working in {folder} (this is process "
        f"{os.getpid()}). Wait for it, stop it, or choose another --out."
    )


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
