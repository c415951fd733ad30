"""Files of a few kilobytes that claim terabytes: all of them together stay below a bound of memory, in a process that
could not take more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BOUND = 512 * 2**20
"""Bytes by which the process may grow, whatever it is given; docs/safety.md says it."""


@pytest.mark.long
def test_files_with_huge_claims_take_little_memory(tmp_path: Path):
    tests = Path(__file__).parents[1]
    paths = [str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(tests / "memory_bombs.py"), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    cases, grown = map(int, done.stdout.split()[-2:])
    assert cases >= 15
    assert grown < BOUND, f"grew by {grown / 2**20:.0f} MiB"
