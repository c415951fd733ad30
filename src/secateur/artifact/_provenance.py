"""Where a result came from: command, seed, versions, machine, date."""

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from secateur.artifact._schema import Fields

_TESTED = {"extra": "tested"}
"""The extra in pyproject.toml that says where the window of tested versions ends."""


def _nothing() -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Provenance:
    """How to make a result again.

    Attributes:
        command: The exact command or call.
        seed: The seed of the run, or None if none was used.
        versions: Package name to version.
        machine: What it ran on, in words: ``cpu``, ``cores``, ``system``, ``accelerator``.
        date: ISO 8601, UTC.
    """

    command: str = ""
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=_nothing)
    machine: Mapping[str, str] = field(default_factory=_nothing)
    date: str = ""

    @classmethod
    def here(cls, command: str, seed: int | None = None) -> "Provenance":
        """The provenance of a result made now, by this process, on this machine."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(command, seed, installed_versions(), this_machine(), date)

    def to_json(self) -> dict[str, object]:
        """A JSON object."""
        return {
            "command": self.command,
            "seed": self.seed,
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "date": self.date,
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> "Provenance":
        """Inverse of `to_json`, checked."""
        return cls(
            command=fields.text("command"),
            seed=fields.optional_integer("seed"),
            versions=fields.text_by_name("versions"),
            machine=fields.text_by_name("machine"),
            date=fields.text("date"),
        )


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result, as installed here."""
    found = {"python": platform.python_version()}
    for name in ("secateur", *tested_window()):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def tested_window() -> dict[str, SpecifierSet]:
    """The versions that are tested, by name of the package: lowest and newest.

    They are stated in pyproject.toml alone, and read from the metadata of the installed package. The result is empty
    where Secateur is imported from a folder without having been installed.
    """
    try:
        stated = importlib.metadata.requires("secateur") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(text) for text in stated]
    applying = [r for r in requirements if r.marker is None or r.marker.evaluate(_TESTED)]
    ending = {r.name for r in applying if r.marker is not None and not r.marker.evaluate({"extra": ""})}
    window: dict[str, SpecifierSet] = {}
    for requirement in applying:
        if requirement.name in ending:
            window[requirement.name] = window.get(requirement.name, SpecifierSet()) & requirement.specifier
    return window


def warn_outside_window() -> None:
    """Warn of installed packages whose versions lie outside of the tested window; once, with all of them."""
    window, here = tested_window(), installed_versions()
    outside = [
        f"{name} {here[name]} (tested: {','.join(sorted(map(str, versions), reverse=True))})"
        for name, versions in window.items()
        if name in here and not versions.contains(here[name], prereleases=True)
    ]
    if outside:
        warnings.warn(
            f"Secateur was not tested with {', '.join(outside)}. Its own checks tell whether the result is right; "
            "`pip install 'secateur[tested]'` installs tested versions.",
            stacklevel=3,
        )


def this_machine() -> dict[str, str]:
    """The machine in words: processor, logical cores, system and accelerator (if there is one)."""
    found = {
        "cpu": _processor(),
        "cores": str(os.cpu_count() or 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"
