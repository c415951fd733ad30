"""``kill -9`` of the processes of Ray while `compress --strategy swp --ray local` judges candidates.

    python ray_killed.py FOLDER WHAT...    WHAT is nothing (first), worker, workers, driver, raylet or caller

One JSON object per line: the exit code, whether the weights are those without a kill (after ``--resume``, where the run
ended), what it said, and the processes that are left.
"""

import contextlib
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WORDS = shlex.split(
    "compress --model digits_resnet --data digits --budget macs=50% --threads 1 --limit 320 --calibration 64 "
    "--batch-size 64 --strategy swp --search-epochs 1 --search-candidates 200 --epochs 1 --lr 0.02 --divisor 1 "
    "--target torch --export onnx --ray local --quiet"
)
_MARKS = {"worker": "ray::Actor", "driver": "_ray_driver.py", "raylet": "raylet/raylet"}
"""What the command line of a process has in it."""
_SHOTS, _PAUSE_S = 40, 0.3


@dataclass(frozen=True)
class _Process:
    parent: int
    words: str


def _processes() -> dict[int, _Process]:
    """All that are not zombies, by number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(folder.name)] = _Process(int(parent), words)
    return found


def _below(process: int) -> dict[int, _Process]:
    everyone, found = _processes(), {process}
    while more := {each for each, about in everyone.items() if about.parent in found} - found:
        found |= more
    return {each: everyone[each] for each in found - {process} if each in everyone}


def _kill(caller: "subprocess.Popen[bytes]", what: str) -> None:
    if what == "caller":
        caller.kill()
        return
    for _ in range(_SHOTS if what == "workers" else 1):
        marked = [each for each, about in _below(caller.pid).items() if _MARKS[what.removesuffix("s")] in about.words]
        for each in marked if what == "workers" else marked[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        if what == "workers":
            time.sleep(_PAUSE_S)


def _run(folder: Path, out: str, what: str, *more: str) -> tuple[int, str, list[str]]:
    """A run, of which something is killed once candidates are judged: exit code, messages, what is left of it."""
    log, everyone = folder / f"{out}.log", dict[int, _Process]()
    with log.open("wb") as file:
        caller = subprocess.Popen(
            [sys.executable, "-m", "secateur", *_WORDS, "--out", out, *more], cwd=folder, stdout=file, stderr=file
        )
        while caller.poll() is None:
            everyone |= (here := _below(caller.pid))
            if any("ray::Actor.run" in about.words for about in here.values()):
                _kill(caller, what) if what != "nothing" else None
                break
            time.sleep(0.05)
        code = caller.wait()
    until = time.monotonic() + 60
    while (left := everyone.keys() & _processes().keys()) and time.monotonic() < until:
        time.sleep(0.2)
    return code, log.read_text(errors="replace"), [everyone[each].words[:60] for each in left]


def _weights(folder: Path, out: str) -> str | None:
    path = folder / out / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def trial(folder: Path, what: str) -> dict[str, Any]:
    """One kill, and the end of the run."""
    code, said, left = _run(folder, what, what)
    whole, resumed = not (folder / what).exists() or _weights(folder, what) is not None, None
    clear = code == 0 or what == "caller" or (code == 2 and "Error: " in said and "--resume" in said)
    if code:
        resumed, _, more = _run(folder, what, "nothing", "--resume")
        left += more
    same = _weights(folder, what) == _weights(folder, "nothing")
    found = {"killed": what, "exit_code": code, "resumed": resumed, "same": same, "left": left}
    found["good"] = bool(clear and whole and same and not left and "Traceback" not in said)
    return found if found["good"] else {**found, "log": said[-3000:]}


def trials(folder: Path, kinds: list[str]) -> Iterator[dict[str, Any]]:
    """One trial for each kind; "nothing" must have been one."""
    yield from (trial(folder, what) for what in kinds)


def main() -> None:
    folder, *kinds = sys.argv[1:]
    for found in trials(Path(folder), kinds):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
