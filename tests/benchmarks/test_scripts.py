"""Every benchmark script can be imported, and describes its arguments."""

import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WITHOUT_HELP = {"latency.py"}
"""Scripts that take only names."""

RUN_ALL = """
import runpy, sys
scripts, sys.path[0] = sys.argv[1:], sys.argv[1].rpartition("/")[0]
for script in scripts:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, script
"""


def test_help_of_every_script() -> None:
    scripts = [str(path) for path in sorted(BENCHMARKS.glob("[a-z]*.py")) if path.name not in WITHOUT_HELP]
    # One process for all: each would import torch, timm and torchvision again.
    command = [sys.executable, "-c", RUN_ALL, *scripts]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("usage: ") == len(scripts) > 15
    assert [Path(path).name for path in scripts if f"usage: {Path(path).name} " not in ended.stdout] == []
