"""Long commands, killed, stopped or without room at random moments: all go on to the same result.

A smaller number of the faults of benchmarks/faults.py, by the same code.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from killing import JOBS
from surroundings import SURROUNDINGS, can_isolate

TESTS = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="forks, and clocks of Linux"),
]


def rows(script: str, hash_seed: int, *words: object) -> list[dict[str, Any]]:
    """What one of the two scripts prints; each process has a hash seed of its own."""
    environment = os.environ | {"PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(TESTS / script), *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module", params=JOBS)
def begun(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A job and the folder of its uninterrupted run."""
    folder = tmp_path_factory.mktemp(request.param)
    rows("killing.py", 0, "whole", request.param, folder)
    return request.param, folder


def test_killed_runs_go_on_to_the_same(begun: tuple[str, Path]) -> None:
    """Weights to the last bit, the architecture, all numbers but times; whole or absent after every kill."""
    job, folder = begun
    trials = rows("killing.py", 1, "kill", job, folder, 5, 3)
    assert sum(len(trial["kills_at"]) for trial in trials) == 3
    assert all(trial["good"] for trial in trials), trials


def _untimed(job: str) -> None:
    if JOBS[job].work:
        pytest.skip("what ends in good order before it has found anything leaves no measurements, and no time recurs")


def test_stopped_runs_go_on_to_the_same(begun: tuple[str, Path]) -> None:
    job, folder = begun
    _untimed(job)
    trials = rows("killing.py", 2, "stop", job, folder, 6, 2)
    assert sum(len(trial["kills_at"]) for trial in trials) == 2
    assert all(trial["good"] for trial in trials), trials


def test_full_disks_are_said_and_gone_on_from(begun: tuple[str, Path]) -> None:
    job, folder = begun
    _untimed(job)
    faults = rows("full_disk.py", 3, "limit", job, folder, 200, 60_000)
    assert faults[0]["exit_code"] == 2
    assert all(fault["good"] for fault in faults), faults


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_killed_processes_of_ray_change_nothing(tmp_path: Path) -> None:
    """Work is done again, or the run says so and goes on; no process is left."""
    for found in rows("ray_killed.py", 0, tmp_path, "nothing", "worker", "driver"):
        assert found["good"], found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uniform")
    rows("killing.py", 0, "whole", "uniform", folder)
    return folder


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_poor_surroundings_change_nothing(name: str, uninterrupted: Path) -> None:
    """The same result, verified, in silence, with nothing left beside it."""
    if SURROUNDINGS[name].shell and not can_isolate():
        pytest.skip("needs the right to mount")
    # Some hide the temporary files, and that of another user hides the home, in which this file may lie.
    above = None if "user" in name else TESTS.parent
    with tempfile.TemporaryDirectory(dir=above, prefix=".surroundings-") as place:
        shutil.copytree(uninterrupted, place, dirs_exist_ok=True)
        Path(place).chmod(0o755)
        (found,) = rows("surroundings.py", 0, "uniform", place, name)
    assert found["good"], found
