"""Folders of runs: a disk that cannot be written, said in words; what killed processes leave; and who has a folder."""

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path

from secateur.errors import ArtifactError


@contextlib.contextmanager
def told_of_disk(folder: Path) -> Generator[None]:
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


def vanish(folder: Path) -> None:
    """Remove a folder so that no part of it is ever there under its name.

    A process that is killed meanwhile leaves it beside, under a hidden name, see `sweep`.

    Raises:
        OSError: If it cannot be removed; then all of it is where it was.
    """
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def sweep(out: Path, work: Path) -> None:
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
def held(folder: Path) -> Generator[None]:
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
