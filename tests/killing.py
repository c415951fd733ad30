"""Commands that are killed at random moments, started again, and compared with what they give uninterrupted.

A process that has imported everything forks once for every run, so that a run costs what it computes; ``kill -9`` of a
forked process is as real as of any other. Run as a script, with a hash seed of its own each time, so that no order of
a set is the same by chance:

    python killing.py whole JOB FOLDER             the uninterrupted run: FOLDER/whole and what it came to
    python killing.py kill JOB FOLDER SEED KILLS   so many kills; one JSON object per line for every trial
    python killing.py stop JOB FOLDER SEED STOPS   the same with SIGINT and SIGTERM

Several of these, with a + between them, share one process that forks.
"""

import contextlib
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # benchmarks
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # Arrow's memory has a thread otherwise; see `warm`.
_TIMES = ("seconds", "images_per_s", "cpu_s", "date", "command")
"""Fields that are never the same twice."""
_BEGINNING_S = 0.1
"""A command that reads its words listens to no signals yet, as while python starts."""
_JITTER_S = 0.02
"""After the moment that was drawn: a process that waits for the disk uses no time of the processor."""


@dataclass(frozen=True)
class Job:
    """A long command.

    Attributes:
        words: Without ``--out`` and ``--resume``; ``benchmarks.study`` stands for that module.
        outcome: Everything that must be equal, of its output folder.
        check: Raises if an output folder is there and is not whole.
        work: What the folder of the unfinished run must begin with, by file name; taken from the uninterrupted run.
    """

    words: tuple[str, ...]
    outcome: Callable[[Path], Any]
    check: Callable[[Path], None]
    work: tuple[str, ...] = ()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_RUN = "--data digits --threads 1 --limit 320 --batch-size 32 --lr 0.02 --quiet"
_COMPRESS = f"compress --model digits_resnet --calibration 64 --export {{none}} {_RUN}"


def artifact(folder: Path) -> Any:
    """The weights' digest, and the manifest and the table of epochs without times."""
    found = _timeless(json.loads((folder / "secateur.json").read_text()))
    # What is measured at the end is for the reader; nothing is decided by it.
    found["metrics"].pop("latency", None)
    found.pop("sha256")  # of all of it, times included
    checks = found["verification"]["checks"]
    found["verification"]["checks"] = [check for check in checks if not check["name"].startswith("Latency")]
    with (folder / "history.csv").open(newline="") as file:
        history = [_timeless(row) for row in csv.DictReader(file)]
    return {"weights": _sha256(folder / "model.safetensors"), "manifest": found, "history": history}


def study(folder: Path) -> Any:
    """Every cell without times, and the digests of all networks."""
    cells = {path.name: _timeless(json.loads(path.read_text())) for path in sorted((folder / "cells").iterdir())}
    models = {path.name: _sha256(path) for path in sorted((folder / "models").glob("*.safetensors"))}
    return {"cells": cells, "models": models, "files": sorted(path.name for path in folder.iterdir())}


def whole_artifact(folder: Path) -> None:
    """An artifact is there as a whole or not at all."""
    if folder.exists():
        import secateur

        secateur.load(folder)


def whole_cells(folder: Path) -> None:
    """Every file of a study that is there is whole."""
    import safetensors.torch

    for path in folder.rglob("[!.]*.json"):
        if "unfinished" not in path.parts:
            json.loads(path.read_text())
    for path in (folder / "models").glob("[!.]*.safetensors"):
        safetensors.torch.load(path.read_bytes())


JOBS = {
    "uniform": Job(
        _words(f"{_COMPRESS} --strategy uniform --divisor 1 --budget macs=50% --epochs 3"), artifact, whole_artifact
    ),
    "pca": Job(
        _words(f"{_COMPRESS} --strategy pca --divisor 1 --budget params=40% --epochs 3 --ema 0.9"),
        artifact,
        whole_artifact,
    ),
    "weights": Job(
        _words(f"{_COMPRESS} --strategy knapsack --divisor 1 --budget macs=60%,nonzero=20% --epochs 3"),
        artifact,
        whole_artifact,
    ),
    "tas": Job(
        _words(f"{_COMPRESS} --strategy tas --search-epochs 2 --budget macs=50% --epochs 1"), artifact, whole_artifact
    ),
    "swp": Job(
        _words(f"{_COMPRESS} --strategy swp --search-epochs 2 --search-candidates 12 --budget macs=50% --epochs 1"),
        artifact,
        whole_artifact,
    ),
    "latency": Job(
        _words(f"{_COMPRESS} --strategy uniform --divisor 4 --budget latency=85% --target-batch 64 --epochs 2"),
        artifact,
        whole_artifact,
        work=("settings.json", "measured.json"),
    ),
    "distill": Job(
        _words(
            f"distill --teacher digits_resnet --student digits_resnet --epochs 3 --loss kd --loss hint {_RUN} "
            "--hint-epochs 1 --export {none}"
        ),
        artifact,
        whole_artifact,
    ),
    "study": Job(
        _words(
            f"benchmarks.study --family resnet --seeds 1 --weights-kept 0.3 --macs-kept 0.5 "
            f"--teacher-epochs 1 --student-epochs 1 --recovery-images 64 --test-images 64 {_RUN}"
        ),
        study,
        whole_cells,
    ),
}


def warm() -> None:
    """Import whatever the commands need, by running one; a single thread must be left."""
    import lightning_fabric  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch

    import secateur.cli  # noqa: F401
    from secateur.pipeline import distill as _foreign
    from secateur.pipeline import finalize as _deliver
    from secateur.train import checkpoint as _saving

    torch.set_num_threads(1)
    # Two exports and two seconds of measuring for every run, of which nothing depends.
    for module in (_deliver, _foreign):
        module.latency_between = lambda *_: ((), ())  # type: ignore[attr-defined]
        module.latency_on = lambda *_: ((), ())  # type: ignore[attr-defined]
        module.both_files = lambda *_: ()  # type: ignore[attr-defined]
    # Checkpoints within epochs too: every third step, not every ten minutes.
    keeper = _saving.Checkpointer.__init__
    _saving.Checkpointer.__init__ = lambda self, folder, _, *more: keeper(
        self, folder, _saving.CheckpointPolicy(steps=3), *more
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        Path(os.devnull).open("w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(nothing),
    ):
        words = [word.replace("{none}", "") for word in JOBS["uniform"].words]
        assert _command([*words, "--out", f"{folder}/out"]) == 0
        assert _command(["verify", f"{folder}/out"]) == 0
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process of several threads must not fork"


def forked(words: Sequence[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Run a command in a process of its own, prepared by something that runs there first; gives its id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        prepare()
        code = _command(words)
    finally:
        os._exit(code)


def _command(words: Sequence[str]) -> int:
    from benchmarks.study.__main__ import main as study
    from secateur.cli import main

    try:
        if words[0] == "benchmarks.study":
            study(words[1:])
        else:
            main(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 98
    return 0


def ended(child: int) -> int:
    """Wait for a process: its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def computed(child: int, moment_s: float) -> bool:
    """Wait until a process has used so much time of the processor, which others may have too; False if it has ended."""
    clock = (~child << 3) | 2  # CPUCLOCK_SCHED of the process, as clock_getcpuclockid(3) makes it.
    while time.clock_gettime(clock) < moment_s:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.001)
    return True


def killed(child: int, moment_s: float, draw: random.Random, number: int) -> int:
    """Send a signal as soon as a process has used so much time of the processor; its exit code."""
    if computed(child, moment_s):
        time.sleep(_JITTER_S * draw.random())
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)
    return ended(child)


def started(job: Job, out: Path, log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Begin a run, or go on with it: the same words."""
    words = [word.replace("{none}", "") for word in job.words]
    return forked([*words, "--out", str(out), "--resume"], log, prepare)


def run_whole(job: Job, folder: Path) -> dict[str, Any]:
    """The uninterrupted run: what it came to, and the processor's seconds that it took.

    Where times are measured, a run is killed at its end first; what it has measured is what all others begin with.
    """
    out, log = folder / "whole", folder / "whole.log"
    if job.work:
        work = folder / "whole.work"
        child = started(job, out, log)
        while not (work / "run.json").exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0), log.read_text()
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        ended(child)
        (folder / "begin").mkdir()
        for name in job.work:
            shutil.copy(work / name, folder / "begin" / name)
        shutil.rmtree(work)
        shutil.copytree(folder / "begin", work)
    before = time.clock_gettime(time.CLOCK_MONOTONIC), os.times()
    code = ended(started(job, out, log))
    assert code == 0, log.read_text()
    used = os.times()
    seconds = used.children_user + used.children_system - before[1].children_user - before[1].children_system
    found = {"seconds": seconds, "outcome": job.outcome(out)}
    (folder / "whole.json").write_text(json.dumps(found))
    return found


def trial(
    job: Job, folder: Path, whole: dict[str, Any], draw: random.Random, *, most: int, numbers: Sequence[int]
) -> dict[str, Any]:
    """One run, sent one of some signals up to ``most`` times at random moments, resumed, and compared."""
    room = folder / f"trial-{draw.randrange(10**9)}"
    out, log = room / "out", room / "log"
    room.mkdir()
    if job.work:
        shutil.copytree(folder / "begin", room / "out.work")
    moments, code, hit = list[float](), 1, True
    while hit and len(moments) < most:
        number, moment = draw.choice(numbers), whole["seconds"] * draw.random()
        code = killed(started(job, out, log), moment, draw, number)
        hit = code in _ends_of(number, moment)
        job.check(out)
        moments += [moment] if hit else []
    if hit:
        code = ended(started(job, out, log))
    found = {"kills_at": moments, "exit_code": code, "same": False, "left": [], "verified": None}
    if code == 0:
        found["same"] = json.loads(json.dumps(job.outcome(out))) == whole["outcome"]
        found["left"] = sorted(path.name for path in room.iterdir() if path not in (out, log))
        if job.check is whole_artifact:
            found["verified"] = ended(forked(["verify", str(out)], log)) == 0
    found["good"] = bool(found["same"]) and not found["left"] and found["verified"] is not False
    if found["good"]:
        shutil.rmtree(room)
    else:
        found["room"], found["log"] = str(room), log.read_text()[-3000:]
    return found


def _ends_of(number: int, moment_s: float) -> tuple[int, ...]:
    """The exit codes that a signal may lead to."""
    if number == signal.SIGKILL:
        return (-number,)
    return (128 + number, -number) if moment_s < _BEGINNING_S else (128 + number,)


def trials(job: Job, folder: Path, seed: int, count: int, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Trials until so many signals have hit."""
    whole, draw, done = json.loads((folder / "whole.json").read_text()), random.Random(seed), 0
    while done < count:
        found = trial(job, folder, whole, draw, most=min(draw.choice((1, 1, 2, 3)), count - done), numbers=numbers)
        done += len(found["kills_at"])
        yield found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _timeless(inner) for name, inner in value.items() if name not in _TIMES}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def asked(words: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The parts of a list with a + between them."""
    text = "\n".join(words)
    yield from (tuple(part.strip("\n").split("\n")) for part in text.split("\n+\n"))


def main() -> None:
    warm()
    for what, name, folder, *numbers in asked(sys.argv[1:]):
        job, place = JOBS[name], Path(folder)
        if what == "whole":
            print(json.dumps({"job": name, "seconds": run_whole(job, place)["seconds"]}), flush=True)
            continue
        seed, count = map(int, numbers)
        signals = (signal.SIGKILL,) if what == "kill" else (signal.SIGINT, signal.SIGTERM)
        for found in trials(job, place, seed, count, signals):
            print(json.dumps({"job": name, **found}), flush=True)


if __name__ == "__main__":
    main()
