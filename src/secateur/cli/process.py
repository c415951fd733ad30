"""The process of a command: streams that may be closed or full, and the last guard around everything."""

import contextlib
import errno
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.text import Text

from secateur.cli.output import INTERRUPTED, end_with_error, err, work_of

BUG = 70
"""EX_SOFTWARE of sysexits.h."""


class _LenientStream(io.RawIOBase):
    """Standard output or error. What nobody can read any more is dropped, and the run goes on.

    Attributes:
        error: Why text was dropped, or None.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any, /) -> int:
        if self.error is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                return self._patiently(bytes(data))
            except OSError as error:
                self.error = error
        return len(data)

    def _patiently(self, data: bytes) -> int:
        """Write to a pipe or terminal that another program has made non-blocking."""
        os.set_blocking(self._descriptor, True)
        return os.write(self._descriptor, data)


def _lenient(descriptor: int, before: TextIO | None) -> tuple[_LenientStream, TextIO]:
    raw = _LenientStream(descriptor)
    encoding = before.encoding if before is not None else "utf-8"
    # Where the encoding lacks a character, as in LC_ALL=C, its escape is written.
    text = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=True, write_through=True
    )
    return raw, text


@contextmanager
def open_streams() -> Generator[None]:
    """Give the process standard streams that are open and never raise, until the end of the block.

    A stream that is closed is opened on nothing: otherwise the next file that is opened would become it, and messages
    would be written into that file. If a reader is gone, the rest is dropped. If standard output could not be written
    for another reason, such as a full disk, the command ends with an error, because its result is lost.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
    if os.name == "nt" and sys.stdout is not None and sys.stderr is not None:
        yield  # Its terminals take no bytes.
        return
    raw, out = _lenient(1, sys.stdout)
    _, error = _lenient(2, sys.stderr)
    sys.stdout, sys.stderr = out, error
    yield
    if raw.error is not None and raw.error.errno not in (errno.EPIPE, errno.EBADF):
        said = f"Standard output could not be written: {raw.error.strerror}. Files that the command wrote are complete."
        raise end_with_error(said)


@contextmanager
def last_guard(*, debug: bool, out_folder: Path | None) -> Generator[None]:
    """End the block with one message, whatever goes wrong in it.

    Args:
        debug: Let exceptions through, with their traceback.
        out_folder: The output folder of the command, if it has one; an unfinished run beside it is kept.
    """
    try:
        yield
    except KeyboardInterrupt:
        err().print("Interrupted. Nothing was written.")
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            raise
        err().print(Text(_bug(error, out_folder), style="bold red"), soft_wrap=True)
        raise SystemExit(BUG) from None


def _bug(error: Exception, out_folder: Path | None) -> str:
    """Write the traceback to a file; return the line that says so."""
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    log = _written(f"{' '.join(sys.argv)!r}\n\n{''.join(traceback.format_exception(error))}", out_folder)
    where = "could not be written" if log is None else f"is in {log}"
    work = work_of(out_folder) if out_folder is not None else None
    kept = "" if work is None else f" The work so far is kept in {work}: --resume continues it."
    return (
        f"Error: this is a bug in Secateur ({reason}). The log {where}. Please report it with the log and the output "
        f"of `secateur --version`, where you found this code.{kept}"
    )


def _written(text: str, out_folder: Path | None) -> Path | None:
    """Write the log beside the output folder, or else among the temporary files; None if it cannot be written."""
    content = text.encode(errors="backslashreplace")
    with contextlib.suppress(OSError, ValueError):
        if out_folder is not None and out_folder.absolute().parent.is_dir():
            path = out_folder.parent / f"{out_folder.name}.error.log"
            path.write_bytes(content)
            return path
    with contextlib.suppress(OSError, ValueError):
        handle, name = tempfile.mkstemp(prefix="secateur-", suffix=".error.log")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        return Path(name)
    return None


@contextmanager
def modules_of_working_folder() -> Generator[None]:
    """Let ``python:MODULE:NAME`` find modules of the working folder, as ``python FILE`` beside them would.

    The folder comes last, so that a file in it replaces no installed module.
    """
    try:
        here = str(Path.cwd())
    except FileNotFoundError:  # Somebody has removed it.
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # The code of the user may have changed the list.
            sys.path.remove(here)
