"""What a release consists of: version and changelog agree, files for readers are whole, and the wheel works."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import secateur

ROOT = Path(__file__).resolve().parents[2]


def test_the_version_is_the_same_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert secateur.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert released[0] == version


def test_every_file_beside_the_source_is_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"][
        "package-data"
    ]
    package = ROOT / "src" / "secateur"
    packaged = {path for pattern in patterns["secateur"] for path in package.glob(pattern)}
    others = {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
    assert others <= packaged


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("build") is None, reason="the package build is not installed (extra dev)")
@pytest.mark.skipif(importlib.util.find_spec("uv") is None, reason="the package uv is not installed (extra dev)")
def test_the_wheel_works_in_an_empty_environment():
    found = subprocess.run(
        [sys.executable, ROOT / "tools" / "smoke.py"], capture_output=True, text=True, timeout=1800, check=False
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
