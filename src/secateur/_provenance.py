"""Where a result came from: command, seed, versions, machine and date; digests of data; comparison of settings."""

import hashlib
import importlib.metadata
import json
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
from torch import Tensor

from secateur._json import Fields

_TESTED = {"extra": "tested"}
"""The extra in pyproject.toml that says where the window of tested versions ends."""


def _nothing() -> dict[str, str]:
    return {}


@dataclass(frozen=True)
class Provenance:
    """How to reproduce a result.

    Attributes:
        command: The exact command or call.
        seed: The seed of the run, or None if none was used.
        versions: Package name to version.
        machine: What it ran on, as text: ``cpu``, ``cores``, ``system``, ``accelerator``.
        date: ISO 8601, UTC.
    """

    command: str = ""
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=_nothing)
    machine: Mapping[str, str] = field(default_factory=_nothing)
    date: str = ""

    @classmethod
    def here(cls, command: str, seed: int | None = None) -> "Provenance":
        """Return the provenance of a result of this process on this machine, made now."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(command, seed, installed_versions(), this_machine(), date)

    def to_json(self) -> dict[str, object]:
        """Return a JSON object."""
        return {
            "command": self.command,
            "seed": self.seed,
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "date": self.date,
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> "Provenance":
        """Read and check what `to_json` wrote."""
        return cls(
            command=fields.text("command"),
            seed=fields.optional_integer("seed"),
            versions=fields.text_by_name("versions"),
            machine=fields.text_by_name("machine"),
            date=fields.text("date"),
        )


def installed_versions() -> dict[str, str]:
    """Return the installed versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in ("secateur", *version_window()):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def version_window() -> dict[str, SpecifierSet]:
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
    window, here = version_window(), installed_versions()
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
    """Describe the machine: processor, logical cores, system and accelerator (if there is one)."""
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


def sha256_of(content: bytes | str | Path) -> str:
    """Return the SHA-256 of bytes, of text as UTF-8, or of a file, in hexadecimal digits."""
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def sha256_of_json(data: object) -> str:
    """Return the SHA-256 of JSON data, whatever the order of its keys.

    Raises:
        TypeError: If the data holds something that JSON cannot.
        ValueError: If the data holds NaN or infinity.
    """
    return sha256_of(json.dumps(data, sort_keys=True, allow_nan=False))


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, shapes, dtypes and values of tensors, whatever their order."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def changed_settings(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say which settings differ, such as ``epochs was 2, now 3; seed was 0, now 1``; empty if all are equal."""
    return "; ".join(
        f"{name} was {then.get(name, 'absent')}, now {now.get(name, 'absent')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    )
