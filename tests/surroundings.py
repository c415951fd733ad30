"""Commands in poor surroundings: no room for temporary files, no home, no rights, no /dev/shm, a clock that jumps.

    python surroundings.py JOB FOLDER NAME...    FOLDER is one that ``killing.py whole`` has filled

Each command is a new process, because libraries look around when they are imported. One JSON object per line: the exit
codes of the job and of ``verify``, whether the result is that of the uninterrupted run, and what is left beside it.
All but the clock need the right to mount.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from killing import JOBS, Job, whole_artifact

_LATENCY = (
    "from secateur.pipeline import distill, finalize\n"
    "for module in (distill, finalize): module.latency_between = module.latency_on = lambda *_: ((), ())\n"
    "finalize.both_files = lambda *_: ()\n"
)
_RUN = f"import sys\n{_LATENCY}from secateur.cli import main\nmain(sys.argv[1:])\n"
_CLOCK = (
    "import threading, time\n"
    "real, real_ns, hours = time.time, time.time_ns, []\n"
    "time.time = lambda: real() - 3600 * len(hours)\n"
    "time.time_ns = lambda: real_ns() - 3600 * 10**9 * len(hours)\n"
    "timer = threading.Timer(3, lambda: hours.append(1)); timer.daemon = True; timer.start()\n"
)
_NOISE = ("Traceback", "telemetry", "joblib")
"""What libraries say about their surroundings must not be heard."""


@dataclass(frozen=True)
class Surrounding:
    """Where a command runs.

    Attributes:
        shell: Lines of bash in a mount namespace of their own, before the command; empty needs no namespace.
        program: Python that runs the command.
    """

    shell: str = ""
    program: str = _RUN


def _everywhere(mount: str) -> str:
    """The folders in which Python looks for room, on one file system."""
    return f"{mount} $ROOM; mount --bind $ROOM /tmp; mount --bind $ROOM /var/tmp; export TMPDIR=$ROOM"


_OTHER_USER = (
    # Where Python itself lies in a home that only its owner may enter.
    "if [[ $BASE == $HOME/* ]]; then mount --bind $BASE $ROOM; mount -t tmpfs -o mode=755 tmpfs $HOME;"
    " mkdir -p $BASE; mount --bind $ROOM $BASE; fi; chmod 777 $PWD; unset HOME USER LOGNAME XDG_CACHE_HOME\n"
    'set -- setpriv --reuid 54321 --regid 54321 --clear-groups "$@"'
)
SURROUNDINGS = {
    "full TMPDIR": Surrounding(_everywhere("mount -t tmpfs -o size=4k tmpfs") + "; head -c 4k /dev/zero >$ROOM/full"),
    "16 kB in TMPDIR": Surrounding(_everywhere("mount -t tmpfs -o size=16k tmpfs")),
    "read-only TMPDIR": Surrounding(_everywhere("mount -t tmpfs -o ro tmpfs")),
    "read-only home": Surrounding("mount -t tmpfs -o ro tmpfs $ROOM; export HOME=$ROOM; unset XDG_CACHE_HOME"),
    "a user without name, home and rights": Surrounding(_OTHER_USER),
    "no /dev/shm": Surrounding("mount -t tmpfs -o ro,mode=555 tmpfs /dev/shm"),
    "a clock that goes back an hour": Surrounding(program=_CLOCK + _RUN),
}


def can_isolate() -> bool:
    """Whether this process may have a mount namespace of its own."""
    tools = all(shutil.which(tool) for tool in ("unshare", "setpriv", "bash"))
    return tools and subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


def run_in(surrounding: Surrounding, words: list[str], room: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder; ``room`` is an empty folder to mount something on."""
    command = [sys.executable, "-c", surrounding.program, *words]
    if surrounding.shell:
        lines = f'mount --make-rprivate /\n{surrounding.shell}\nexec "$@"'
        command = ["unshare", "-m", "bash", "-c", lines, "-", *command]
    environment = os.environ | {"ROOM": str(room), "BASE": sys.base_prefix, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def trial(job: Job, folder: Path, name: str) -> dict[str, Any]:
    """A run and its check in a surrounding, compared with the uninterrupted run."""
    room, place = folder / "mounted", folder / "surrounded"
    for each in (room, place):
        shutil.rmtree(each, ignore_errors=True)
        each.mkdir()
    surrounding = SURROUNDINGS[name]
    words = [word.replace("{none}", "") for word in job.words]
    done = run_in(surrounding, [*words, "--out", "out"], room, place)
    whole = json.loads((folder / "whole.json").read_text())["outcome"]
    job.check(place / "out")
    same = done.returncode == 0 and json.loads(json.dumps(job.outcome(place / "out"))) == whole
    left = sorted(path.name for path in place.iterdir() if path.name != "out")
    verified = None
    if done.returncode == 0 and job.check is whole_artifact:
        verified = run_in(surrounding, ["verify", "out"], room, place).returncode
    # Without any other place Python puts temporary files into the current folder, where torch leaves an empty one.
    left = [path for path in left if not path.startswith("torchinductor_")]
    noise = [line for line in done.stderr.splitlines() if any(word in line for word in _NOISE)]
    found = {"exit_code": done.returncode, "same": same, "verified": verified, "left": left, "noise": noise}
    found["good"] = same and not verified and not left and not noise
    return found if found["good"] else {**found, "log": done.stderr[-3000:]}


def trials(job: Job, folder: Path, names: list[str]) -> Iterator[dict[str, Any]]:
    """One trial for each surrounding."""
    for name in names:
        yield {"surrounding": name, **trial(job, folder, name)}


def main() -> None:
    job, folder, *names = sys.argv[1:]
    for found in trials(JOBS[job], Path(folder), names):
        print(json.dumps({"job": job, **found}), flush=True)


if __name__ == "__main__":
    main()
