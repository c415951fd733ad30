"""Checkpoints: a folder each, complete or absent, without pickle."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import TrainingError

SCHEMA = 1
KEPT = 2
"""The newest checkpoint and the one before, in case a disk damages the newest."""

_NAME = re.compile(r"epoch-(\d{6,})(?:-step-(\d{6,}))?")
_PARTIAL = "partial-"


@dataclass(frozen=True)
class Saved:
    """What one checkpoint holds.

    Attributes:
        epoch: Epochs done.
        tensors: By name, on the CPU.
        numbers: JSON data.
        settings: What must be equal to go on from here.
        step: Steps done of the epoch after these; 0 at the end of an epoch.
    """

    epoch: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]
    settings: Mapping[str, str]
    step: int = 0

    @property
    def name(self) -> str:
        """Of its folder: ``epoch-000007``, or ``epoch-000007-step-000120`` within the epoch after that."""
        return f"epoch-{self.epoch:06d}" + (f"-step-{self.step:06d}" if self.step else "")

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with a prefix, by the rest of their names."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def save_checkpoint(folder: Path, saved: Saved) -> None:
    """Write ``folder/epoch-000007`` (see `Saved.name`) in one step, then remove all but the last `KEPT`.

    A process killed at any moment leaves complete checkpoints only (and a ``partial-`` folder, removed later).

    Raises:
        TrainingError: If the folder cannot be written, or the disk is full.
    """
    from safetensors import SafetensorError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
        _write(partial, saved)
        target = folder / saved.name
        if target.exists():  # A damaged one, passed over when this run was resumed.
            shutil.rmtree(target)
        partial.replace(target)
        _flush(folder)
        for old in _complete(folder)[KEPT:]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        for leftover in folder.glob(f"{_PARTIAL}*"):  # Half of a checkpoint must not take the room of a full disk.
            shutil.rmtree(leftover, ignore_errors=True)
        raise TrainingError(
            f"`checkpoint` must be a folder that can be written; got {folder} ({error}). Free some space or mend the "
            "permissions and start again: the run goes on after its last complete checkpoint."
        ) from error


def _write(partial: Path, saved: Saved) -> None:
    from safetensors.torch import save_file

    # Cloned: safetensors refuses tensors that share memory or are not contiguous (channels-last).
    tensors = {
        name: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, t in saved.tensors.items()
    }
    save_file(tensors, partial / "tensors.safetensors")
    state = {
        "schema": SCHEMA,
        "epoch": saved.epoch,
        "step": saved.step,
        "sha256": _sha256(partial / "tensors.safetensors"),
        "settings": dict(saved.settings),
        "numbers": dict(saved.numbers),
    }
    (partial / "state.json").write_text(json.dumps(state, indent=1))
    for path in (partial / "tensors.safetensors", partial / "state.json", partial):
        _flush(path)


def load_checkpoint(folder: Path, settings: Mapping[str, str]) -> Saved | None:
    """The newest good checkpoint of the folder, or None if it has none yet.

    Args:
        folder: Where `save_checkpoint` wrote.
        settings: The settings of the run that wants to go on.

    Raises:
        TrainingError: If the checkpoint is of a run with other settings, every checkpoint is damaged, or the
            folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"`checkpoint` must be a folder; got the file {folder}. Name another folder.")
    reasons: list[str] = []
    for path in _complete(folder):
        try:
            saved = _read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reasons.append(f"{path.name}: {error}")
            continue
        if reasons:
            warnings.warn(f"going on from {path}, because later ones are damaged: {'; '.join(reasons)}", stacklevel=2)
        _check_settings(path, saved.settings, settings)
        return saved
    if reasons:
        raise TrainingError(
            f"`checkpoint` must hold a readable checkpoint; got only damaged ones in {folder} "
            f"({'; '.join(reasons)}). Delete the folder to start again."
        )
    return None


def _read(path: Path) -> Saved:
    from safetensors import SafetensorError
    from safetensors.torch import load

    state = json.loads((path / "state.json").read_text())
    if state["schema"] != SCHEMA:
        raise ValueError(f"schema {state['schema']} was written by another version (this one reads {SCHEMA})")
    content = (path / "tensors.safetensors").read_bytes()
    if hashlib.sha256(content).hexdigest() != state["sha256"]:
        raise ValueError("tensors.safetensors does not have the recorded SHA-256")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    numbers, settings = dict(state["numbers"]), dict(state["settings"])
    return Saved(int(state["epoch"]), tensors, numbers, settings, int(state.get("step", 0)))


def _check_settings(path: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    different = [
        f"{name} was {then.get(name, 'absent')}, now {now.get(name, 'absent')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if different:
        raise TrainingError(
            f"`checkpoint` must be continued with the settings it was begun with; got others than in {path}: "
            f"{'; '.join(different)}. Use the old settings, or another folder for a new run."
        )


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    found = {path: match for path in folder.glob("epoch-*") if (match := _NAME.fullmatch(path.name))}
    return sorted(found, key=lambda path: (int(found[path][1]), int(found[path][2] or 0)), reverse=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Have the system write a file or folder to disk, so that a power cut cannot undo the order of the steps."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
