"""Watch for what a hostile file must not do while it is read: run code, write, connect, or take too long."""

import contextlib
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError

SECONDS = 60
"""Seconds within which every refusal must come, on a busy machine too."""
LONGEST_MESSAGE = 2_000

_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.symlink",
    "os.link",
    "subprocess.Popen",
    "socket.connect",
    "socket.bind",
    "pickle.find_class",
    "shutil.rmtree",
    "ctypes.dlopen",
)
_ASKS_FOR_A_GPU = ("ctypes.dlopen", ("libnvidia-ml.so.1",))
"""Events that torch causes once per process, when a device is first needed."""
_WRITES = frozenset("wax+")
_seen: list[str] = []
_watching = False
_installed = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or (event, arguments) == _ASKS_FOR_A_GPU or _is_isolation(event, arguments):
        return
    if event in _FORBIDDEN:
        _seen.append(f"{event} {arguments!r}"[:200])
    elif event == "open" and isinstance(arguments[1], str) and _WRITES & set(arguments[1]):
        _seen.append(f"open {arguments!r}"[:200])


def _is_isolation(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether it is the process that runs exported files, or its empty folder."""
    if event == "open":
        return isinstance(arguments[0], int)  # a pipe to it
    if event == "subprocess.Popen":
        return any(str(word).endswith("_runtime_child.py") for word in arguments[1])
    if event in ("os.mkdir", "os.rmdir", "shutil.rmtree", "os.posix_spawn"):
        return "secateur-run-" in str(arguments[0])
    return False


@contextlib.contextmanager
def watched() -> Generator[None]:
    """Fail if the code inside the context imports, writes, connects or starts processes, or takes too long."""
    global _installed, _watching  # noqa: PLW0603
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    _seen.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not _seen, _seen


def refusal(action: Any, *arguments: Any, **named: Any) -> tuple[str | None, Any]:
    """Return the message of a refusal and None, or None and the result; any other error is a bug."""
    with watched():
        try:
            return None, action(*arguments, **named)
        except SecateurError as error:
            said = str(error)
    assert said.strip()
    # A list, as of the bad images of a folder, may have 22 lines.
    assert max(map(len, said.splitlines())) < LONGEST_MESSAGE
    assert len(said) < 3 * LONGEST_MESSAGE, len(said)
    assert len(said.splitlines()) <= 23
    return said, None


def everything_in(folder: Path) -> dict[str, object]:
    """Return names, kinds and contents of a folder, to check that nothing was written."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in sorted(folder.rglob("*"))
    }
