"""The window of tested versions: stated in pyproject.toml alone, and outside of it there is a warning."""

import importlib.metadata
import tomllib
import warnings
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from secateur._provenance import installed_versions, version_window, warn_outside_window

STATED = {"torch", "torchvision", "timm", "numpy", "onnx", "onnxruntime", "pyarrow", "lightning-fabric"}
"""Packages whose window must be stated."""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch):
    """Other versions than those installed, and another window."""
    real = importlib.metadata.version

    def install(*stated: str, **versions: str) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or real(name))
        if stated:
            monkeypatch.setattr(importlib.metadata, "requires", lambda _name: [*stated])

    return install


def said() -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_outside_window()
    return [str(warning.message) for warning in caught]


def test_every_package_of_the_window_has_a_lowest_and_a_newest_version():
    window = version_window()
    assert window.keys() >= STATED
    for name, versions in window.items():
        assert sorted(str(bound)[0] for bound in versions) == ["<", ">"], name


def test_the_window_is_the_one_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    newest = {r.name: r.specifier for r in map(Requirement, project["optional-dependencies"]["tested"])}
    assert version_window() == {name: lowest[name] & newest[name] for name in newest}


@pytest.mark.parametrize("name", ["pinned", "lowest"])
def test_pinned_and_lowest_versions_lie_inside_of_the_window(name: str):
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    window = version_window()
    assert {pin.name for pin in pins} >= window.keys()
    for pin in pins:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert pin.url is None
        assert window.get(pin.name, pin.specifier).contains(exact.version)


def test_the_lowest_versions_are_the_lowest_bounds():
    lines = (ROOT / "requirements" / "lowest.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    for name, versions in version_window().items():
        (bound,) = (Version(b.version) for b in versions if b.operator == ">=")
        assert min(Version(next(iter(p.specifier)).version) for p in pins if p.name == name) == bound


def test_the_table_of_the_readme_says_the_same():
    table = (ROOT / "README.md").read_text().partition("## Tested versions")[2].partition("## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    found = {name: versions for name, *versions in rows[2:]}
    assert found.pop("Python")[0] == "3.11"
    assert found.keys() >= STATED
    files = [(ROOT / "requirements" / f"{name}.txt").read_text() for name in ("lowest", "pinned")]
    for name, (lowest, pinned, newest) in found.items():
        # Of Python 3.11, where the versions differ with that of Python.
        first = [next(line.split()[0] for line in text.splitlines() if line.startswith(f"{name}==")) for text in files]
        assert first == [f"{name}=={lowest}", f"{name}=={pinned}"]
        assert Version(pinned) <= Version(newest)
        assert version_window()[name].contains(newest)


@pytest.mark.parametrize("torch", ["2.9", "2.9.1", "2.14.1+cu130", "2.15.3"])
def test_no_warning_inside_of_the_window(pretend, torch: str):
    pretend("torch>=2.9", 'torch<2.16; extra == "tested"', torch=torch)
    assert said() == []


@pytest.mark.parametrize("torch", ["2.8.4", "2.16.0", "2.16.0.dev20261130+cpu", "3.0"])
def test_one_warning_names_what_is_outside_and_the_way_out(pretend, torch: str):
    pretend(
        *("torch>=2.9", 'torch<2.16; extra == "tested"', "numpy>=2", 'numpy<2.6; extra == "tested"', "rich>=14"),
        *('ray<1; extra == "ray"',),
        torch=torch,
        numpy="9.1",
        rich="1.0",
    )
    (warning,) = said()
    assert f"not tested with torch {torch} (tested: >=2.9,<2.16), numpy 9.1 (tested: >=2,<2.6)." in warning
    assert "pip install 'secateur[tested]'" in warning


def test_a_folder_that_was_not_installed_has_no_window(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert version_window() == {}
    assert said() == []
    assert installed_versions().keys() == {"python"}
