"""Commands on full disks, or where nothing can be written: refused in words, nothing half-written, resumed with room.

    python full_disk.py limit JOB FOLDER BYTES...    no file may be larger (RLIMIT_FSIZE; needs no rights)
    python full_disk.py room JOB FOLDER KBYTES...    a file system with so much room (tmpfs; needs the right to mount)
    python full_disk.py frozen JOB FOLDER SEED N     nothing can be written from a random moment on, N times (chattr)

FOLDER is one that ``killing.py whole`` has filled. One JSON object per line for every fault; several with a + between.
"""

import json
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from killing import JOBS, Job, asked, computed, ended, started, warm

ROOM_KB = 65_536
"""Enough for every run."""


def no_larger(size: int) -> Callable[[], None]:
    """Has this process write no file beyond a size."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a file system."""
    try:
        with mounted(folder, 64):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def mounted(folder: Path, kilobytes: int) -> Generator[Path]:
    """A file system in memory with little room."""
    folder.mkdir(parents=True, exist_ok=True)
    _call("mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        _call("umount", str(folder))


def can_freeze(folder: Path) -> bool:
    """Whether this process may make folders immutable."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with immutable(folder):
            return not _may_write(folder / "file")
    except (OSError, subprocess.CalledProcessError):
        return False


def _may_write(path: Path) -> bool:
    try:
        path.touch()
    except OSError:
        return False
    return True


@contextmanager
def immutable(folder: Path) -> Generator[None]:
    """A folder in which, root or not, nothing can be written, made or removed. What is open already can be."""
    # Twice: what was made while the first walk went on.
    _call("chattr", "-R", "+i", str(folder), tolerant=True)
    _call("chattr", "-R", "+i", str(folder))
    try:
        yield
    finally:
        _call("chattr", "-R", "-i", str(folder))


def limit(job: Job, folder: Path, size: int) -> dict[str, Any]:
    """A run whose files may not be larger, and its end without that bound."""
    room = _fresh(folder)
    code = ended(started(job, room / "out", room / "log", no_larger(size)))
    return {"bytes": size, **_judged(job, folder, room, room / "log", code, _hidden(room))}


def full(job: Job, folder: Path, kilobytes: int) -> dict[str, Any]:
    """A run on a file system with little room, and its end after room was made."""
    room, log = _fresh(folder), folder / "full.log"
    log.unlink(missing_ok=True)
    with mounted(room, kilobytes):
        code = ended(started(job, room / "out", log))
        used = shutil.disk_usage(room).used // 1024
        _call("mount", "-o", f"remount,size={ROOM_KB}k", str(room))
        judged = _judged(job, folder, room, log, code, _hidden(room))
        return {"kilobytes": kilobytes, "used_after": used, **judged}


def frozen(job: Job, folder: Path, draw: random.Random) -> dict[str, Any]:
    """A run that loses the right to write meanwhile, and its end when it has it again."""
    room, log = _fresh(folder), folder / "full.log"
    log.unlink(missing_ok=True)
    seconds = json.loads((folder / "whole.json").read_text())["seconds"] * draw.random()
    child = started(job, room / "out", log)
    computed(child, seconds)
    with immutable(room):
        code = ended(child)
    # Where nothing can be written nothing can be removed either: what counts is what is left in the end.
    return {"at": seconds, **_judged(job, folder, room, log, code, ())}


def _judged(job: Job, folder: Path, room: Path, log: Path, code: int, half_written: Sequence[str]) -> dict[str, Any]:
    """What the command said, whether anything is or stays half-written, and whether it goes on to the same."""
    said, out = log.read_text(), room / "out"
    job.check(out)
    error = next((line for line in said.splitlines() if line.startswith("Error:")), "")
    whole = json.loads((folder / "whole.json").read_text())["outcome"]
    clear = code == 0 or (code == 2 and bool(error) and "Traceback" not in said)
    again = ended(started(job, out, log)) if code else 0
    same = again == 0 and json.loads(json.dumps(job.outcome(out))) == whole
    left = [*half_written, *_hidden(room)]
    found = {
        "exit_code": code, "error": error.replace(str(room), "..."), "half_written": left, "resumed": again,
        "same": same, "good": clear and not left and same,
    }  # fmt: skip
    return found if found["good"] else {**found, "log": log.read_text()[-3000:]}


def _hidden(room: Path) -> list[str]:
    return sorted(path.name for path in room.iterdir() if path.name.startswith("."))


def _fresh(folder: Path) -> Path:
    room = folder / "room"
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir()
    return room


def _call(*words: str, tolerant: bool = False) -> None:
    subprocess.run(words, check=not tolerant, capture_output=True)


def faults(what: str, job: Job, folder: Path, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """What came of each."""
    if what == "frozen":
        draw = random.Random(numbers[0])
        yield from (frozen(job, folder, draw) for _ in range(numbers[1]))
    else:
        yield from ((limit if what == "limit" else full)(job, folder, number) for number in numbers)


def main() -> None:
    warm()
    for what, name, folder, *numbers in asked(sys.argv[1:]):
        for found in faults(what, JOBS[name], Path(folder), [int(number) for number in numbers]):
            print(json.dumps({"job": name, "disk": what, **found}), flush=True)


if __name__ == "__main__":
    main()
