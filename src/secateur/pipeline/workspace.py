"""The work of an unfinished run, and what is checked before any work begins.

A run keeps its checkpoints, measurements and cut student beside the output folder, in ``<out>.work``, from its first
moment on, so that an interrupted run can be resumed. The folder is removed at the end, and when a run ends before there
is anything to resume from. One process at a time uses it; of a run on several processes it is the first one.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from secateur._batches import call_model, first_output, float_tensors, take, unusual
from secateur._files import LOCK, atomic_folder, clean_stale, disk_errors, locked, remove_dir_atomic, write_atomic
from secateur._provenance import changed_settings, this_machine
from secateur._runtime import check_hashable, copy_model
from secateur.cost.budget import Budget
from secateur.data.dataset import ImageData
from secateur.data.loaders import OwnData
from secateur.errors import ArtifactError, ModelError, TrainingError
from secateur.export.artifact import OWN_FILES, refuse_foreign, refuse_no_folder
from secateur.models.weights import diverged_tensors
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.tasks.imitation import Imitation
from secateur.train.callbacks import Callbacks, CsvLog
from secateur.train.device import Precision, open_fabric, resolve_fabric
from secateur.train.own_loop import Recover

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class OnExisting(Enum):
    """What to do with an unfinished run that lies beside the output folder."""

    ERROR = "error"
    """Stop with an error that says how to continue."""
    RESUME = "resume"
    """Continue it; begin a new run if there is none."""
    OVERWRITE = "overwrite"
    """Remove it and begin a new run."""


@dataclass(frozen=True)
class CutState:
    """The result of the first half of a run: everything up to the repaired student.

    Attributes:
        search: The result of the search, as JSON.
        frozen: (axis, reason) pairs of everything that is whole.
        kept_blocks: (block, reason) pairs of the blocks that had to stay.
        architecture: What was kept, as JSON.
        verification: Sliced against masked, as JSON.
        repairs: What each repair did, as JSON.
        student: State of the repaired student, by name.
        widths_follow: Whether numbers that describe widths were set.
    """

    search: Mapping[str, object]
    frozen: tuple[tuple[str, str], ...]
    kept_blocks: tuple[tuple[str, str], ...]
    architecture: Mapping[str, object]
    verification: Mapping[str, object]
    repairs: tuple[Mapping[str, object], ...]
    student: Mapping[str, Tensor]
    widths_follow: bool = True


@contextlib.contextmanager
def open_run_directory(
    out: Path, settings: Mapping[str, str], on_existing: OnExisting, environment: Mapping[str, str] | None = None
) -> Generator["RunDirectory"]:
    """Yield the work of a run until the run is finished.

    Args:
        out: The output folder of the run.
        settings: Everything that makes two runs the same run, as text by name.
        on_existing: What to do with the work of an interrupted run.
        environment: What the last bits of the results depend on beside the settings, as text by name, see
            `environment_of`. A run that is resumed in another environment warns.

    Raises:
        ArtifactError: If an interrupted run is there and must not be touched, is damaged, or is one with other
            settings; if another process uses it; or if the folder cannot be written.
    """
    place, here = run_directory_path(out), dict(environment or {})
    if place.folder.exists():
        _meet(place.folder, settings, on_existing)
    if not place.folder.exists():
        with disk_errors(place.folder), atomic_folder(place.folder, must_be_new=True) as draft:
            (draft / _SETTINGS).write_text(json.dumps(dict(settings), indent=1))
            (draft / _SURROUNDINGS).write_text(json.dumps(here, indent=1))
            (draft / LOCK).touch()  # Together with the rest, so that a full disk leaves nothing.
    with contextlib.ExitStack() as stack:
        with disk_errors(place.folder):
            stack.enter_context(locked(place.folder))
        clean_stale(out, place.folder, own=OWN_FILES)
        _compare(place.folder, here)
        try:
            yield place
        except BaseException as error:
            # What was measured until an interrupt need not be measured again; after an error it is of no use.
            if place.empty and not (isinstance(error, KeyboardInterrupt) and place.measurements.is_file()):
                place.remove()
            raise
        place.remove()


def check_unfinished(out: Path, on_existing: OnExisting) -> None:
    """Refuse an output folder beside which an unfinished run lies that must not be touched.

    Raises:
        ArtifactError: If so.
    """
    folder = run_directory_path(out).folder
    if on_existing is OnExisting.ERROR and folder.exists():
        _meet(folder, {}, on_existing)


def run_directory_path(out: Path) -> "RunDirectory":
    """Return the place of the work of a run with this output folder, whether there is any or not."""
    return RunDirectory(out.parent / f"{out.name}.work")


def environment_of(device: torch.device) -> dict[str, str]:
    """Return what the last bits of a result depend on beside the settings of a run."""
    machine = this_machine()
    found = {
        "device": device.type if device.type == "cpu" else machine.get("accelerator", device.type),
        "threads": str(torch.get_num_threads()),
        "processor": machine.get("cpu", ""),
        "torch": torch.__version__,
    }
    return {name: str(value) for name, value in found.items()}


def _compare(folder: Path, here: Mapping[str, str]) -> None:
    """Warn of a run that is resumed on different hardware or versions."""
    try:
        then = cast(dict[str, str], dict(json.loads((folder / _SURROUNDINGS).read_text())))
    except (OSError, ValueError, TypeError, RecursionError):
        return
    if changes := changed_settings({**here, **then}, here):
        warnings.warn(
            f"The run is resumed on different hardware or versions: {changes}. Its result may differ in the last bits "
            "from that of an uninterrupted run, and by what follows from them.",
            stacklevel=4,
        )


def _meet(folder: Path, settings: Mapping[str, str], on_existing: OnExisting) -> None:
    """Refuse, resume or remove what is there already."""
    if not (folder / _SETTINGS).is_file():
        raise ArtifactError(
            f"{folder} must be the work of an interrupted run, or not be there; got something else. "
            "Move it away, or choose another --out."
        )
    if on_existing is OnExisting.ERROR:
        with disk_errors(folder), locked(folder):  # If a process is at work there, that is the reason to give.
            pass
        raise ArtifactError(
            f"`out` must have no unfinished run beside it; got {folder}. Go on with it (--resume), or remove "
            "it and begin again (--restart)."
        )
    if on_existing is OnExisting.OVERWRITE:
        with disk_errors(folder), locked(folder):
            remove_dir_atomic(folder)
        return
    try:
        then = cast(dict[str, str], dict(json.loads((folder / _SETTINGS).read_text())))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(folder, error) from error
    if changes := changed_settings(then, settings):
        raise ArtifactError(
            f"A resumed run must have the settings it was begun with; {changes} ({folder}). "
            "Use the old settings, or begin again with --restart."
        )


@dataclass(frozen=True)
class RunDirectory:
    """The folder of an unfinished run."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        """Folder for checkpoints of the training."""
        return self.folder / "checkpoint"

    @property
    def own_loop(self) -> Path:
        """Folder for checkpoints of a training loop of the user's own, and for its result."""
        return self.folder / "recover"

    def search_checkpoint(self, search: int) -> Path:
        """Return the folder for checkpoints of a search; the searches of one run are numbered from 0."""
        return self.folder / f"search-{search}"

    @property
    def measurements(self) -> Path:
        """File for everything measured, see `secateur.search.latency.Measurements`."""
        return self.folder / _MEASURED

    @property
    def choice(self) -> Path:
        """File for what was found out about candidates, see `secateur.search.candidates.CandidateRecords`."""
        return self.folder / _CHOICE

    def logged(self, progress: Callbacks) -> Callbacks:
        """Return callbacks that also keep a table of all epochs in the work."""
        return CsvLog(self.folder / _HISTORY, progress)

    def hand_on_history(self, draft: Path) -> None:
        """Copy the table of all epochs to a finished artifact; do nothing if there were no epochs."""
        if (self.folder / _HISTORY).is_file():
            shutil.copyfile(self.folder / _HISTORY, draft / _HISTORY)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to resume from: no file beside those that every run begins with.

        Measurements without a result count as nothing: a bound that turns out to be out of reach must not leave an
        unfinished run, and the cache of the machine has most of them. Only an interrupted run keeps them. A table of
        epochs without checkpoints counts as nothing too.
        """
        files = (path for path in self.folder.rglob("*") if not path.is_dir())
        nothing = (_SETTINGS, _SURROUNDINGS, _MEASURED, _HISTORY, LOCK)
        return all(path.parent == self.folder and path.name in nothing for path in files)

    def write(self, cutting: CutState) -> None:
        """Store the first half of the run.

        Raises:
            ArtifactError: If the disk is full; what was there before is as it was.
        """
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in cutting.student.items()}
        state = {
            "search": dict(cutting.search),
            "frozen": [list(pair) for pair in cutting.frozen],
            "kept_blocks": [list(pair) for pair in cutting.kept_blocks],
            "architecture": dict(cutting.architecture),
            "verification": dict(cutting.verification),
            "repairs": [dict(repair) for repair in cutting.repairs],
            "widths_follow": cutting.widths_follow,
        }
        with disk_errors(self.folder), self._undone_on_error():
            write_atomic(self.folder / _STUDENT, safetensors.torch.save(tensors))
            write_atomic(self.folder / _STATE, json.dumps(state, indent=1))

    @contextlib.contextmanager
    def _undone_on_error(self) -> Generator[None]:
        try:
            yield
        except OSError:
            (self.folder / _STUDENT).unlink(missing_ok=True)
            raise

    def read(self) -> CutState | None:
        """Return the first half of an interrupted run; None if it was interrupted before the cut.

        Raises:
            ArtifactError: If it is damaged.
        """
        if not (self.folder / _STATE).is_file():
            return None
        try:
            state = cast(dict[str, Any], json.loads((self.folder / _STATE).read_text()))
            student = safetensors.torch.load((self.folder / _STUDENT).read_bytes())
            return CutState(
                dict(state["search"]),
                tuple((str(axis), str(reason)) for axis, reason in state["frozen"]),
                tuple((str(block), str(reason)) for block, reason in state["kept_blocks"]),
                dict(state["architecture"]),
                dict(state["verification"]),
                tuple(dict(repair) for repair in state["repairs"]),
                student,
                bool(state.get("widths_follow", True)),
            )
        except (OSError, ValueError, LookupError, TypeError, RecursionError, safetensors.SafetensorError) as error:
            raise _damaged(self.folder, error) from error

    def remove(self) -> None:
        """Remove the work of a finished run, as far as possible."""
        with contextlib.suppress(OSError):
            remove_dir_atomic(self.folder)


def _damaged(folder: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"The unfinished run in {folder} is damaged ({error}). Begin again with --restart.")


_SETTINGS = "settings.json"
_SURROUNDINGS = "surroundings.json"
_MEASURED = "measured.json"
_CHOICE = "choice.json"
_STATE = "run.json"
_HISTORY = "history.csv"
_STUDENT = "student.safetensors"


def check_output(folder: Path) -> None:
    """Refuse an output folder that could not be written at the end of the run.

    Args:
        folder: The place of the artifact.

    Raises:
        ArtifactError: If it is a file, holds something else than an artifact, or cannot be made there.
    """
    refuse_no_folder(folder, "out")
    # What else is in the folder of an unfinished run has appeared during it, and stays.
    if not (run_directory_path(folder).folder / _SETTINGS).is_file():
        refuse_foreign(folder, "out")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ArtifactError(
            f"`out` must lie in a folder that can be written; got {folder}, and {above} cannot be. "
            "Choose another path, or change its permissions."
        )


CLASSIFICATION = Classification()


def check_has_weights(model: nn.Module) -> None:
    """Refuse a model whose tensors hold no values, cannot be computed with, or that PyTorch cannot list.

    Raises:
        ModelError: With the names of some.
    """
    check_hashable(model)
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta]
    if empty:
        raise ModelError(
            f"`model` must have weights; {len(empty)} of its tensors are on the meta device, which holds no values: "
            f"{', '.join(empty[:3])}. Load its weights first, or make it on the CPU."
        )
    state = model.state_dict()
    strange = {
        name: unusual(value) if isinstance(value, Tensor) else f"no tensor but of the type {type(value).__name__}"
        for name, value in state.items()
        if not name.endswith("_extra_state")  # Whatever a module keeps there; an artifact says that it cannot.
    }
    for name, what in strange.items():
        if what:
            raise ModelError(
                f"`model` must have ordinary tensors to cut and to store; {name[:80]} is {what}. Compress the model in "
                "float32; quantize the result (--export int8)."
            )


def check_model_fits_data(
    model: nn.Module, data: ImageData | OwnData, images: Any, task: Task = CLASSIFICATION, targets: Any = None
) -> None:
    """Refuse a model that does not do its task on the data's images.

    Args:
        model: In any mode; a copy runs.
        data: For its name, sizes and classes.
        images: A few of its normalized images, or other inputs, on the model's device.
        task: What the model is for.
        targets: The targets of the images; None only for `Imitation`.

    Raises:
        TrainingError: If there are no targets, or they do not fit the task.
        ModelError: If the model cannot run the images, or its output is not finite logits for the data's classes.
    """
    size = "x".join(map(str, data.size))
    if not isinstance(task, Imitation):
        task.check_targets(images, targets)
    broken = diverged_tensors(model, model.state_dict())
    if broken:
        raise ModelError(
            f"`model` must have finite weights; got NaN or infinity in {len(broken)} tensor(s): {broken[:5]}. "
            "Load other weights: these come from a training that diverged, or a damaged file."
        )
    runner = copy_model(model).eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            outputs = call_model(runner, take(images, slice(2)))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        given = next((str(tensor.dtype) for tensor in float_tensors(images)), "")
        others = sorted({str(p.dtype) for p in model.parameters() if p.is_floating_point()} - {given})
        if given and others:
            raise ModelError(
                f"`model` must have weights of the type of the images, {given}; got {', '.join(others)}, and "
                f"{type(model).__name__} stopped with: {reason}. Convert it with model.float(); training can still "
                "compute in half precision (--precision bf16-mixed)."
            ) from error
        raise ModelError(
            f"`model` must run the images of {data.name} ({size}); {type(model).__name__} stopped with: {reason}. "
            "Choose the image size (--image-size) and channels that the model was made for."
        ) from error
    for tensor in float_tensors(outputs):
        if unusual(tensor):
            raise ModelError(
                f"`model` must return ordinary tensors; {type(model).__name__} returned one {unusual(tensor)}."
            )
    if not isinstance(task, Classification) or not data.classes:
        task.check(outputs, outputs if isinstance(task, Imitation) else take(targets, slice(2)))
        if not all(bool(torch.isfinite(tensor).all()) for tensor in float_tensors(outputs)):
            raise ModelError(
                f"`model` must give finite outputs for the inputs of {data.name}; got NaN or infinity. Check its "
                "weights and how the inputs are normalized."
            )
        return
    logits = first_output(outputs)
    if logits is None or logits.shape != (len(images[:2]), len(data.classes)):
        got = type(outputs).__name__ if logits is None else f"shape {tuple(logits.shape)}"
        raise ModelError(
            f"`model` must return one logit for each of the {len(data.classes)} classes of {data.name}, here shape "
            f"({len(images[:2])}, {len(data.classes)}); got {got}. Use a model with that many classes. Put one "
            "that returns other tensors first into a module whose forward pass returns the logits."
        )
    if not bool(torch.isfinite(logits).all()):
        raise ModelError(
            f"`model` must give finite logits for the images of {data.name}; got NaN or infinity. "
            "Check its weights and the normalization (--mean, --std)."
        )


def fabric_for(
    fabric: "Fabric | None", precision: Precision | None, device: torch.device | None, out: Path | None
) -> "Fabric":
    """Return the caller's Fabric, or one for a device in this process.

    Raises:
        TrainingError: If both are given, the Fabric cannot be used, or its processes have no folder to share.
    """
    if fabric is None:
        return open_fabric(precision, device=device)
    if device is not None:
        raise TrainingError(
            f"`device` must be left out with `fabric`, which has one; got {device}. Give one of the two."
        )
    if fabric.world_size > 1 and out is None:
        raise TrainingError(
            f"`out` must be given with {fabric.world_size} processes; got None. The first process passes its "
            "results to the others there: name a folder that all machines share."
        )
    return resolve_fabric(fabric, precision)


def check_own_loop(loop: Recover | None, fabric: "Fabric", budget: Budget | None = None) -> None:
    """Refuse a training loop of the user's own where it cannot take the place of the distillation.

    Raises:
        TrainingError: If it is no function, if there are several processes, or if single weights are pruned, which
            needs masks at every step.
    """
    if loop is None:
        return
    if fabric.world_size > 1:
        raise TrainingError(
            f"`recover` must run in one process; got {fabric.world_size}. Start the run in one, and several within "
            "your loop."
        )
    if budget is not None and budget.nonzero is not None:
        raise TrainingError(
            "`recover` must be left out where the budget bounds `nonzero`, because single weights are pruned step by "
            "step; got both. Bound macs, params, size or latency, or let Secateur train."
        )


@contextmanager
def first_alone(fabric: "Fabric") -> Generator[None]:
    """Run a block in the first process before all others begin it.

    If it fails there, the others wait until torchrun ends them.
    """
    if not fabric.is_global_zero:
        fabric.barrier()
    yield
    if fabric.is_global_zero and fabric.world_size > 1:
        fabric.barrier()


@contextmanager
def shared_run_directory(
    fabric: "Fabric", out: Path | None, settings: Mapping[str, str], on_existing: OnExisting
) -> Generator[RunDirectory | None]:
    """Yield the work of a run until it is finished, see `open_run_directory`; None for a run that writes nothing.

    The first of several processes opens it; the others read it only after an unfinished run there was resumed or
    removed.
    """
    if out is None:
        yield None
        return
    with ExitStack() as stack:
        with first_alone(fabric):
            if fabric.is_global_zero:
                work = stack.enter_context(
                    open_run_directory(out, settings, on_existing, environment_of(fabric.device))
                )
            else:
                work = run_directory_path(out)
        yield work
