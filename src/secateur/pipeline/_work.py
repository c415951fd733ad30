"""The work of a run that is not finished: checkpoints of the search, what was measured, what was found, the cut
student, checkpoints of the training.

It lies beside the output folder as ``<out>.work``, from the first moment on, so that an interrupted run can go on; it
is removed at the end, and when a run ends before there is anything to go on from. One process at a time has it.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from secateur.artifact import atomic_file, atomic_folder, this_machine
from secateur.errors import ArtifactError
from secateur.pipeline._disk import LOCK, held, sweep, told_of_disk, vanish
from secateur.train import CsvLog, Progress


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


@contextlib.contextmanager
def workplace(
    out: Path, settings: Mapping[str, str], leftover: Leftover, surroundings: Mapping[str, str] | None = None
) -> Generator["Workplace"]:
    """The work of a run, until the run is finished.

    Args:
        out: The output folder that the work is for.
        settings: Everything that makes two runs the same run, as text by name.
        leftover: What to do with the work of an interrupted run.
        surroundings: What the last bits of the results depend on beside them, as text by name, see
            `surroundings_of`: a run that goes on among others warns.

    Raises:
        ArtifactError: If an interrupted run is there and must not be touched, is damaged, or is one with other
            settings; if another process is at it; or if the folder cannot be written.
    """
    place, here = workplace_of(out), dict(surroundings or {})
    if place.folder.exists():
        _meet(place.folder, settings, leftover)
    if not place.folder.exists():
        with told_of_disk(place.folder), atomic_folder(place.folder) as draft:
            (draft / _SETTINGS).write_text(json.dumps(dict(settings), indent=1))
            (draft / _SURROUNDINGS).write_text(json.dumps(here, indent=1))
            (draft / LOCK).touch()  # With the rest: a disk that is full then leaves nothing.
    with contextlib.ExitStack() as stack:
        with told_of_disk(place.folder):
            stack.enter_context(held(place.folder))
        sweep(out, place.folder)
        _compare(place.folder, here)
        try:
            yield place
        except BaseException:
            if place.empty:
                place.remove()
            raise
        place.remove()


def workplace_of(out: Path) -> "Workplace":
    """Where the work of a run with this output folder lies, whether there is any or not."""
    return Workplace(out.with_name(f"{out.name}.work"))


def surroundings_of(device: torch.device) -> dict[str, str]:
    """What the last bits of a result depend on beside the settings of a run."""
    machine = this_machine()
    found = {
        "device": device.type if device.type == "cpu" else machine.get("accelerator", device.type),
        "threads": str(torch.get_num_threads()),
        "processor": machine.get("cpu", ""),
        "torch": torch.__version__,
    }
    return {name: str(value) for name, value in found.items()}


def _compare(folder: Path, here: Mapping[str, str]) -> None:
    """Warn of a run that goes on elsewhere."""
    try:
        then = cast(dict[str, str], dict(json.loads((folder / _SURROUNDINGS).read_text())))
    except (OSError, ValueError, TypeError):
        return
    different = [f"{name} was {then[name]}, now {text}" for name, text in here.items() if then.get(name, text) != text]
    if different:
        warnings.warn(
            f"The run goes on in other surroundings than it was begun in: {'; '.join(different)}. Its result may "
            "differ in the last bits from that of an uninterrupted run, and by what follows from them.",
            stacklevel=4,
        )


def _meet(folder: Path, settings: Mapping[str, str], leftover: Leftover) -> None:
    """What is there already is refused, gone on with, or removed."""
    if not (folder / _SETTINGS).is_file():
        raise ArtifactError(
            f"{folder} must be the work of an interrupted run, or not be there; got something else. "
            "Move it away, or choose another --out."
        )
    if leftover is Leftover.REFUSE:
        raise ArtifactError(
            f"`out` must have no unfinished run beside it; got {folder}. Go on with it (--resume), or remove "
            "it and begin again (--restart)."
        )
    if leftover is Leftover.DISCARD:
        with told_of_disk(folder), held(folder):
            vanish(folder)
        return
    try:
        then = cast(dict[str, str], dict(json.loads((folder / _SETTINGS).read_text())))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder, error) from error
    different = [
        f"{name} was {then.get(name, 'absent')}, now {settings.get(name, 'absent')}"
        for name in sorted(then.keys() | settings.keys())
        if then.get(name) != settings.get(name)
    ]
    if different:
        raise ArtifactError(
            f"A resumed run must have the settings it was begun with; {'; '.join(different)} ({folder}). "
            "Use the old settings, or begin again with --restart."
        )


@dataclass(frozen=True)
class Workplace:
    """The folder of an unfinished run."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The folder for training checkpoints."""
        return self.folder / "checkpoint"

    def search_checkpoint(self, search: int) -> Path:
        """The folder for checkpoints of a search; the searches of one run are numbered from 0."""
        return self.folder / f"search-{search}"

    @property
    def measurements(self) -> Path:
        """The file for what was measured, see `Measurements`."""
        return self.folder / _MEASURED

    def logged(self, progress: Progress) -> Progress:
        """The same, with a table of all epochs kept in the work."""
        return CsvLog(self.folder / _HISTORY, progress)

    def hand_on_history(self, draft: Path) -> None:
        """Copy the table of all epochs beside the report; nothing if there were none."""
        if (self.folder / _HISTORY).is_file():
            shutil.copyfile(self.folder / _HISTORY, draft / _HISTORY)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to go on from: no file beside those that every run begins with.

        Measurements by which nothing was found yet count as nothing: a bound that turns out to be out of reach must not
        leave an unfinished run, and the cache of the machine knows most of them. So does a table of epochs
        without the checkpoints that its rows are of.
        """
        files = (path for path in self.folder.rglob("*") if not path.is_dir())
        nothing = (_SETTINGS, _SURROUNDINGS, _MEASURED, _HISTORY, LOCK)
        return all(path.parent == self.folder and path.name in nothing for path in files)

    def write(self, cutting: Cutting) -> None:
        """Keep the first half of the run.

        Raises:
            ArtifactError: If the disk is full; what was there before is as it was.
        """
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in cutting.student.items()}
        state = {
            "found": dict(cutting.found),
            "frozen": [list(pair) for pair in cutting.frozen],
            "kept_blocks": [list(pair) for pair in cutting.kept_blocks],
            "architecture": dict(cutting.architecture),
            "verification": dict(cutting.verification),
            "healing": [dict(repair) for repair in cutting.healing],
        }
        with told_of_disk(self.folder), self._undone_on_error():
            with atomic_file(self.folder / _STUDENT) as part:
                part.write_bytes(safetensors.torch.save(tensors))
            with atomic_file(self.folder / _STATE) as part:
                part.write_text(json.dumps(state, indent=1))

    @contextlib.contextmanager
    def _undone_on_error(self) -> Generator[None]:
        try:
            yield
        except OSError:
            (self.folder / _STUDENT).unlink(missing_ok=True)
            raise

    def read(self) -> Cutting | None:
        """The first half of an interrupted run; None if it was interrupted before the cut.

        Raises:
            ArtifactError: If it is damaged.
        """
        if not (self.folder / _STATE).is_file():
            return None
        try:
            state = cast(dict[str, Any], json.loads((self.folder / _STATE).read_text()))
            student = safetensors.torch.load((self.folder / _STUDENT).read_bytes())
            return Cutting(
                dict(state["found"]),
                tuple((str(axis), str(reason)) for axis, reason in state["frozen"]),
                tuple((str(block), str(reason)) for block, reason in state["kept_blocks"]),
                dict(state["architecture"]),
                dict(state["verification"]),
                tuple(dict(repair) for repair in state["healing"]),
                student,
            )
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise _damaged(self.folder, error) from error

    def remove(self) -> None:
        """Remove the work, as far as it can be; the run is finished."""
        with contextlib.suppress(OSError):
            vanish(self.folder)


def _damaged(folder: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"The unfinished run in {folder} is damaged ({error}). Begin again with --restart.")


_SETTINGS = "settings.json"
_SURROUNDINGS = "surroundings.json"
_MEASURED = "measured.json"
_STATE = "run.json"
_HISTORY = "history.csv"
_STUDENT = "student.safetensors"
