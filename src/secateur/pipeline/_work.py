"""The work of a run that is not finished: what was found, the healed student, and the training checkpoint.

It lies beside the output folder as ``<out>.work``, so that an interrupted run can go on, and is removed at the end.
"""

import contextlib
import json
import shutil
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
from torch import Tensor

from secateur.artifact import atomic_file
from secateur.errors import ArtifactError
from secateur.pipeline._disk import told_of_disk


class Leftover(Enum):
    """What to do with the work of an interrupted run at the same place."""

    REFUSE = "refuse"
    """Stop with an error that says how to go on."""
    RESUME = "resume"
    """Go on after it, or begin if there is none."""
    DISCARD = "discard"
    """Remove it and begin again."""


@dataclass(frozen=True)
class Cutting:
    """The result of the first half of a run: everything up to the healed student.

    Attributes:
        found: What the search found, as JSON.
        frozen: (axis, reason) pairs of everything that is whole.
        kept_blocks: (block, reason) pairs of the blocks that had to stay.
        architecture: What was kept, as JSON.
        verification: Sliced against masked, as JSON.
        healing: What each repair did, as JSON.
        student: State of the healed student, by name.
    """

    found: Mapping[str, object]
    frozen: tuple[tuple[str, str], ...]
    kept_blocks: tuple[tuple[str, str], ...]
    architecture: Mapping[str, object]
    verification: Mapping[str, object]
    healing: tuple[Mapping[str, object], ...]
    student: Mapping[str, Tensor]


@dataclass(frozen=True)
class Workplace:
    """The folder of an unfinished run.

    Attributes:
        folder: Its path; need not exist yet.
        settings: Everything that makes two runs the same run, as text by name.
    """

    folder: Path
    settings: Mapping[str, str]

    @classmethod
    def open(cls, out: Path, settings: Mapping[str, str], leftover: Leftover) -> "Workplace":
        """Begin beside an output folder.

        Raises:
            ArtifactError: If an interrupted run is there and must not be touched, or is one with other settings.
        """
        place = cls(out.with_name(f"{out.name}.work"), settings)
        if not place.folder.exists():
            return place
        if not (place.folder / _STATE).is_file():
            raise ArtifactError(
                f"{place.folder} must be the work of an interrupted run, or not be there; got something else. "
                "Move it away, or choose another --out."
            )
        if leftover is Leftover.DISCARD:
            shutil.rmtree(place.folder)
        elif leftover is Leftover.REFUSE:
            raise ArtifactError(
                f"`out` must have no unfinished run beside it; got {place.folder}. Go on with it (--resume), or remove "
                "it and begin again (--restart)."
            )
        return place

    @property
    def checkpoint(self) -> Path:
        """The folder for training checkpoints."""
        return self.folder / "checkpoint"

    def write(self, cutting: Cutting) -> None:
        """Keep the first half of the run.

        Raises:
            ArtifactError: If the disk is full; no work folder is left then.
        """
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in cutting.student.items()}
        state = {
            "settings": dict(self.settings),
            "found": dict(cutting.found),
            "frozen": [list(pair) for pair in cutting.frozen],
            "kept_blocks": [list(pair) for pair in cutting.kept_blocks],
            "architecture": dict(cutting.architecture),
            "verification": dict(cutting.verification),
            "healing": [dict(repair) for repair in cutting.healing],
        }
        with told_of_disk(self.folder), self._removed_on_error():
            with atomic_file(self.folder / _STUDENT) as part:
                part.write_bytes(safetensors.torch.save(tensors))
            with atomic_file(self.folder / _STATE) as part:
                part.write_text(json.dumps(state, indent=1))

    @contextlib.contextmanager
    def _removed_on_error(self) -> Generator[None]:
        try:
            yield
        except OSError:
            self.remove()
            raise

    def read(self) -> Cutting | None:
        """The first half of an interrupted run with the same settings; None if there is none.

        Raises:
            ArtifactError: If it is damaged or is that of another run.
        """
        if not (self.folder / _STATE).is_file():
            return None
        try:
            state = cast(dict[str, Any], json.loads((self.folder / _STATE).read_text()))
            student = safetensors.torch.load((self.folder / _STUDENT).read_bytes())
            then = cast(dict[str, str], dict(state["settings"]))
            cutting = Cutting(
                dict(state["found"]),
                tuple((str(axis), str(reason)) for axis, reason in state["frozen"]),
                tuple((str(block), str(reason)) for block, reason in state["kept_blocks"]),
                dict(state["architecture"]),
                dict(state["verification"]),
                tuple(dict(repair) for repair in state["healing"]),
                student,
            )
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ArtifactError(
                f"The unfinished run in {self.folder} is damaged ({error}). Begin again with --restart."
            ) from error
        self._check_same(then)
        return cutting

    def _check_same(self, then: Mapping[str, str]) -> None:
        different = [
            f"{name} was {then.get(name, 'absent')}, now {self.settings.get(name, 'absent')}"
            for name in sorted(then.keys() | self.settings.keys())
            if then.get(name) != self.settings.get(name)
        ]
        if different:
            raise ArtifactError(
                f"A resumed run must have the settings it was begun with; {'; '.join(different)} ({self.folder}). "
                "Use the old settings, or begin again with --restart."
            )

    def remove(self) -> None:
        """Remove the work; the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)


_STATE = "run.json"
_STUDENT = "student.safetensors"
