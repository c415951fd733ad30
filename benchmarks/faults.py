"""Kill long commands, fill their disk, or make it read-only, and check that they all continue to the same result.

Every job (tests/killing.py) is run once without interruption. Then it is started, killed with ``kill -9`` at a random
moment (uniform over the processor time of the whole run), sometimes again after it continues, resumed, and compared:
weights to the last bit, architecture, and every number of the manifest except times. After each kill the output
folder must be absent or complete. At the end ``secateur verify`` must pass and no other files may remain. The
uninterrupted run and the trials are processes with different hash seeds.

The tests of disks (tests/full_disk.py) are files that may not grow beyond a size, file systems with too little space,
and folders that become read-only at some moment. The command must end with one clear error and code 2, leave no
partial file, and continue to the same result once there is space.

The surroundings (tests/surroundings.py) are a full, a small and a read-only folder for temporary files, a read-only
home, a user who has neither a name nor a home nor rights, no /dev/shm, and a clock that goes back an hour in the middle
of the run. The command must come to the same result, and `verify` must pass there too.

The processes of Ray (tests/ray_killed.py) are killed with ``kill -9`` while candidates are judged on it: one worker,
every worker again and again, the process that talks to Ray, Ray's own agent, and the command. The weights must be those
without a kill, if need be after ``--resume``, and no process may be left.

The strangers' files (tests/hostile_onnx.py) are ONNX files that are spoiled in eight ways. Each is run as `verify` runs
it, with an audit hook and an eye on private files beside it (inotify): none may be read, and no file may take 20 s.

    OMP_NUM_THREADS=1 python benchmarks/faults.py [--kills 104] [--seed 1] [--mutants 5000]

Writes results/faults.json and .md after every run.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _record import RESULTS, surroundings, table, write_record

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from full_disk import can_freeze, can_mount  # noqa: E402 -- beside the tests, which use it too
from killing import JOBS  # noqa: E402
from surroundings import SURROUNDINGS, can_isolate  # noqa: E402

SHARES = {"uniform": 14, "pca": 10, "weights": 16, "tas": 14, "swp": 14, "latency": 8, "distill": 14, "study": 14}
"""Of the kills."""
SAID = {
    "uniform": "compress, uniform widths",
    "pca": "compress, PCA, moving average",
    "weights": "compress, then weights pruned gradually",
    "tas": "compress, TAS",
    "swp": "compress, SWP",
    "latency": "compress, latency budget, measured before",
    "distill": "distill, after a stage of hints",
    "study": "compare",
}
SIZES = (200, 4_000, 60_000, 200_000, 500_000)
"""Bytes: settings, measurements, students and checkpoints do not fit, one after the other."""
ROOMS = (4, 16, 100, 400, 900, 1300)
"""Kilobytes; a tmpfs of 0 would have no bound."""
FROZEN, STOPS = 4, 4
DISKS = ("swp", "distill")
"""The job with most kinds of files, and a training alone."""

RAY = ("nothing", "worker", "workers", "driver", "raylet", "caller")
"""What is killed, in this order."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=sum(SHARES.values()))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mutants", type=int, default=5000, help="Spoiled ONNX files; 0 leaves their record as it is.")
    parser.add_argument(
        "--job", action="append", choices=[*SHARES], help="Run only these jobs; the records of the others are kept."
    )
    parser.add_argument("--folder", type=Path, help="Folder for failed runs; temporary by default.")
    asked = parser.parse_args()
    jobs, begun, path = asked.job or [*SHARES], surroundings(), RESULTS / "faults.json"
    record: dict[str, Any] = {**begun, "seed": asked.seed, "jobs": {}, "disks": {}, "surroundings": {}}
    if asked.job and path.is_file():
        then = json.loads(path.read_text())
        record |= {"jobs": then["jobs"], "disks": then["disks"], "strangers": then.get("strangers")}
        record["surroundings"] = then.get("surroundings", {})
        record["ray"] = then.get("ray", [])
    if importlib.util.find_spec("ray") is not None:
        with tempfile.TemporaryDirectory() as folder:
            record["ray"] = list(rows("ray_killed.py", asked.seed, [(folder, *RAY)]))
    if asked.mutants:
        record["strangers"] = strangers(asked.mutants, asked.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        for job in jobs:
            (folder / job).mkdir(parents=True)
        for found in rows("killing.py", 0, [("whole", job, folder / job) for job in jobs]):
            entry = {"command": " ".join(JOBS[found["job"]].words), "commit": begun["commit"], **found}
            record["jobs"][found["job"]] = {**entry, "trials": [], "stops": []}
        # There are two rounds, so that an interrupted benchmark has results for every job.
        shares = [(job, round(asked.kills * SHARES[job] / sum(SHARES.values()))) for job in jobs]
        kills = [("kill", job, folder / job, asked.seed, share // 2) for job, share in shares]
        kills += [("kill", job, folder / job, asked.seed + 1000, share - share // 2) for job, share in shares]
        stops = [("stop", job, folder / job, asked.seed, STOPS) for job in jobs]
        for what, wanted in (("trials", kills), ("stops", stops)):
            for found in rows("killing.py", asked.seed + len(what), wanted):
                record["jobs"][found["job"]][what].append(found)
                written(record)
        faults = [fault for job in DISKS if job in jobs for fault in faults_of(job, folder / job, asked.seed)]
        for _, job, *_ in faults:
            record["disks"][job] = {}
        for found in rows("full_disk.py", asked.seed, faults):
            record["disks"][found["job"]].setdefault(found["disk"], []).append(found)
            written(record)
        for job in (job for job in DISKS if job in jobs):
            record["surroundings"][job] = []
            names = [name for name, where in SURROUNDINGS.items() if not where.shell or can_isolate()]
            for found in rows("surroundings.py", asked.seed, [(job, folder / job, *names)]):
                record["surroundings"][job].append(found)
                written(record)


def strangers(count: int, seed: int) -> dict[str, Any]:
    """Return what happened to spoiled ONNX files."""
    command = [sys.executable, str(TESTS / "hostile_onnx.py"), str(count), str(seed)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=TESTS)
    return {**json.loads(found.stdout), "commit": surroundings()["commit"]}


def faults_of(job: str, folder: Path, seed: int) -> list[tuple[object, ...]]:
    """Return the disk faults for one job that this process has the rights to cause."""
    found: list[tuple[object, ...]] = [("limit", job, folder, *SIZES)]
    if can_mount(folder / "mount"):
        found.append(("room", job, folder, *ROOMS))
    if can_freeze(folder / "ice"):
        found.append(("frozen", job, folder, seed, FROZEN))
    return found


def rows(script: str, hash_seed: int, wanted: list[tuple[object, ...]]) -> Iterator[dict[str, Any]]:
    """Yield the rows that one of the scripts prints."""
    if not wanted:
        return
    words = [str(word) for part in wanted for word in ("+", *part)][1:]
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / script), *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")


def written(record: dict[str, Any]) -> None:
    """Write the record and its tables."""
    record["load_average_after"] = surroundings()["load_average"]
    write_record("faults", record)
    (RESULTS / "faults.md").write_text(as_text(record))


def as_text(record: dict[str, Any]) -> str:
    jobs = record["jobs"]
    kills = [
        [
            SAID[name], f"{job['seconds']:.1f}", str(_signals(job["trials"])), str(len(job["trials"])),
            str(sum(trial["same"] for trial in job["trials"])), _verified(job),
            f"{_good(job['stops'])} ({_signals(job['stops'])})",
        ]
        for name, job in jobs.items()
    ]  # fmt: skip
    total = sum(_signals(job["trials"]) for job in jobs.values())
    trials = [trial for job in jobs.values() for trial in job["trials"]]
    disks = [
        [SAID[name], what, str(len(faults)), str(sum(one["exit_code"] == 2 for one in faults)), _good(faults)]
        for name, kinds in record["disks"].items()
        for what, faults in kinds.items()
    ]
    return (
        "# Faults\n\n"
        f"Commit {record['commit']}, {record['date']}, {record['cpu']}, one thread, load average "
        f"{record['load_average']} to {record['load_average_after']}. `{record['command']}`.\n\n"
        f"{total} `kill -9` in {len(trials)} runs; {_good(trials)} ended with the weights of the uninterrupted run to "
        "the last bit, its architecture and its numbers, with nothing left beside them. After every kill the output "
        "folder was absent or whole.\n\n"
        + table(["run", "processor s", "kills", "runs", "same result", "verified", "SIGINT, SIGTERM"], kills)
        + _NOTES
        + table(["run", "disk", "faults", "exit code 2", "good"], disks)
        + _ray(record.get("ray"))
        + _surroundings(record.get("surroundings"))
        + _strangers(record.get("strangers"))
    )


def _ray(found: list[dict[str, Any]] | None) -> str:
    if not found:
        return ""
    rows = [[one["killed"], str(one["exit_code"]), _yes(one["good"])] for one in found]
    return (
        "\n## Processes of Ray\n\nGood: the weights without a kill, if need be after `--resume`, and no "
        "process left.\n\n" + table(["killed", "exit code", "good"], rows)
    )


def _surroundings(found: dict[str, list[dict[str, Any]]] | None) -> str:
    if not found:
        return ""
    rows = [[SAID[job], one["surrounding"], _yes(one["good"])] for job, trials in found.items() for one in trials]
    return (
        "\n## Surroundings\n\nGood: the result of the uninterrupted run, verified there, nothing left beside it, and "
        "no message of a library.\n\n" + table(["run", "surrounding", "good"], rows)
    )


def _yes(good: bool) -> str:
    return "yes" if good else "no"


def _strangers(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    return (
        f"\n## Files of strangers\n\n{found['mutants']} spoiled ONNX files ({', '.join(found['kinds'])}), commit "
        f"{found['commit']}, seed {found['seed']}: {found['reads']} foreign reads, {found['stalls']} of more than "
        f"20 s, longest {found['longest_s']:g} s. {found['ran']} ran, {found['stopped']} were stopped, "
        f"{found['ended_runtimes']} ended their runtime, all others were refused.\n"
    )


_NOTES = """
The last column: runs that were sent SIGINT or SIGTERM instead (how often), ended with 130 or 143, and went on to the
same result. Loops write a checkpoint every three steps here, not every ten minutes. What is measured at the end for the
report (two exports and two seconds) is left out; no result depends on it. Under a latency budget the runs begin with
the measurements of the uninterrupted one, as no time is the same twice.

## Disks

limit: no file may be larger than a size (`RLIMIT_FSIZE`). room: a tmpfs with little room, enlarged afterward. frozen:
folders in which nothing can be written from a random moment on (`chattr +i`), and again afterward. Good: ended with
one clear error and code 2 (or did its work, where there was enough room), nothing half-written, and went on to the
result of the uninterrupted run.

"""


def _signals(trials: list[dict[str, Any]]) -> int:
    return sum(len(trial["kills_at"]) for trial in trials)


def _verified(job: dict[str, Any]) -> str:
    checked = [trial["verified"] for trial in job["trials"] if trial["verified"] is not None]
    return f"{sum(checked)} of {len(checked)}" if checked else "no artifact"


def _good(faults: list[dict[str, Any]]) -> str:
    return f"{sum(one['good'] for one in faults)} of {len(faults)}"


if __name__ == "__main__":
    main()
