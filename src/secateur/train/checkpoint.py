"""Checkpoints: a folder each, complete or absent, without pickle; when they are written, and the tensors in them."""

import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from secateur._files import atomic_folder
from secateur._kinds import settings
from secateur._provenance import changed_settings, sha256_of, sha256_of_tensors
from secateur._runtime import Stopped, StopRequest, accept_stop_requests, copy_model
from secateur.errors import TrainingError
from secateur.train.distributed import mean_over_processes

if TYPE_CHECKING:
    from lightning_fabric import Fabric


Tensors = Mapping[str, Tensor]
"""Tensors by name."""


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer once, also buffers that a state_dict leaves out; no copies."""
    # Not state_dict: a run must resume with buffers that are not persistent too, and shared weights count once.
    return {
        **{name: parameter.detach() for name, parameter in model.named_parameters()},
        **dict(model.named_buffers()),
    }


def clone_tensors(tensors: Tensors) -> dict[str, Tensor]:
    """Return copies on the same devices."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def write_tensors_(model: nn.Module, tensors: Tensors) -> None:
    """Copy values into the model's own tensors, which keep device, type and memory order."""
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            tensor.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return the running tensors of an optimizer, named "<state name>/<parameter name>"."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def write_optimizer_(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors) -> None:
    """Inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        # Running means lie on the device of their parameter; Adam's step count is a scalar on the CPU, as torch has it.
        beside = torch.empty_like(value if kind == "step" else parameter, requires_grad=False)
        optimizer.state[parameter][kind] = beside.copy_(value)


def model_sha256(model: nn.Module) -> str:
    """SHA-256 over names, shapes, types and values of all tensors: equal for equal models only."""
    return sha256_of_tensors(tensors_of(model))


def is_finite(model: nn.Module) -> bool:
    """Whether every parameter is finite; waits for the device."""
    # The norm of all parameters is finite only if each of them is, and is read from the device once.
    return bool(get_total_norm([p.detach() for p in model.parameters()]).isfinite())


def average_decay(decay: float, update: int) -> float:
    """Return the decay of a moving average at its n-th update, n from 0: min(decay, (1 + n) / (10 + n)).

    The lower decay at the beginning keeps the untrained weights from dominating the average.

    References:
        The rule of ``tf.train.ExponentialMovingAverage(num_updates=n)``.
    """
    return min(decay, (1 + update) / (10 + update))


class MovingAverage:
    """An exponential moving average of a model's parameters and floating buffers; other buffers are copied.

    Attributes:
        model: The average, in eval mode.
        decay: Decay per update, before the rule of `average_decay`.
        updates: The number of updates so far.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy_model(model).eval().requires_grad_(requires_grad=False)
        self.decay = decay
        self.updates = 0
        tensors = tensors_of(self.model)
        self._floating = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        # Counters such as num_batches_tracked cannot be averaged.
        self._others = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]

    def update(self, model: nn.Module) -> None:
        """Replace every floating tensor a by decay * a + (1 - decay) * x."""
        mine, theirs = tensors_of(self.model), tensors_of(model)
        average_ = get_ema_multi_avg_fn(average_decay(self.decay, self.updates))
        with torch.no_grad():
            # This rule of torch does not use its third argument, the number of averaged models.
            average_([mine[n] for n in self._floating], [theirs[n] for n in self._floating], None)
            for name in self._others:
                mine[name].copy_(theirs[name])
        self.updates += 1


CHECKPOINT_SCHEMA = 1
KEPT = 2
"""The newest checkpoint and the one before, in case a disk damages the newest."""

_NAME = re.compile(r"epoch-(\d{6,})(?:-step-(\d{6,}))?")
_DRAFTS = ".epoch-*.part"
"""Unfinished checkpoints of processes that were killed."""


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds.

    Attributes:
        epoch: Epochs done.
        tensors: Tensors by name; on the CPU if the checkpoint was read from a file.
        numbers: A JSON object.
        settings: Settings that must be equal to resume from here.
        step: Steps done of the next epoch; 0 at the end of an epoch.
    """

    epoch: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]
    settings: Mapping[str, str]
    step: int = 0

    @property
    def name(self) -> str:
        """Name of its folder: ``epoch-000007``, or ``epoch-000007-step-000120`` within the epoch after that."""
        return f"epoch-{self.epoch:06d}" + (f"-step-{self.step:06d}" if self.step else "")

    def under(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors whose names begin with a prefix, by the rest of their names."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def save_checkpoint(folder: Path, saved: Checkpoint) -> None:
    """Write ``folder/epoch-000007`` (see `Checkpoint.name`) in one step, then remove all but the last `KEPT`.

    A process killed at any moment leaves complete checkpoints only (and a hidden draft, removed later).

    Raises:
        TrainingError: If the folder cannot be written, or the disk is full.
    """
    from safetensors import SafetensorError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(_DRAFTS):
            shutil.rmtree(leftover)
        # What is replaced is a damaged checkpoint, passed over when this run was resumed.
        with atomic_folder(folder / saved.name) as draft:
            _write(draft, saved)
        # Last, so that a full disk or a crash in between leaves the older ones.
        for old in _complete(folder)[KEPT:]:
            shutil.rmtree(old)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"`checkpoint` must be a folder that can be written; got {folder} ({error}). Free some space or fix the "
            "permissions and start again: the run is resumed after its last complete checkpoint."
        ) from error


def _write(draft: Path, saved: Checkpoint) -> None:
    from safetensors.torch import save_file

    # Cloned: safetensors refuses tensors that share memory or are not contiguous (channels-last).
    tensors = {
        name: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, t in saved.tensors.items()
    }
    save_file(tensors, draft / "tensors.safetensors")
    state = {
        "schema": CHECKPOINT_SCHEMA,
        "epoch": saved.epoch,
        "step": saved.step,
        "sha256": sha256_of(draft / "tensors.safetensors"),
        "settings": dict(saved.settings),
        "numbers": dict(saved.numbers),
    }
    (draft / "state.json").write_text(json.dumps(state, indent=1))


def load_checkpoint(folder: Path, settings: Mapping[str, str]) -> Checkpoint | None:
    """Return the newest good checkpoint of a folder, or None if it has none yet.

    Args:
        folder: The folder that `save_checkpoint` wrote to.
        settings: The settings of the run to be resumed.

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


def _read(path: Path) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load

    state = json.loads((path / "state.json").read_text())
    if state["schema"] != CHECKPOINT_SCHEMA:
        raise ValueError(
            f"schema {state['schema']} was written by another version (this one reads {CHECKPOINT_SCHEMA})"
        )
    # Checked and parsed from the same bytes: the file may change between two reads.
    content = (path / "tensors.safetensors").read_bytes()
    if sha256_of(content) != state["sha256"]:
        raise ValueError("tensors.safetensors does not have the recorded SHA-256")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    numbers, settings = dict(state["numbers"]), dict(state["settings"])
    return Checkpoint(int(state["epoch"]), tensors, numbers, settings, int(state.get("step", 0)))


def _check_settings(path: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    if changes := changed_settings(then, now):
        raise TrainingError(
            f"`checkpoint` must be continued with the settings it was begun with; got others than in {path}: "
            f"{changes}. Use the old settings, or another folder for a new run."
        )


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints, newest first."""
    found = {path: match for path in folder.glob("epoch-*") if (match := _NAME.fullmatch(path.name))}
    # As numbers: names with seven digits would come before those with six.
    return sorted(found, key=lambda path: (int(found[path][1]), int(found[path][2] or 0)), reverse=True)


@settings
class CheckpointPolicy:
    """When a loop writes checkpoints within an epoch, beside those at the end of every epoch.

    Attributes:
        seconds: Age of the last checkpoint at which the next is written, > 0; infinity for never.
        steps: Steps after the last checkpoint at which the next is written, >= 1; None for never.
    """

    seconds: float = 600.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.seconds) or self.seconds <= 0:
            raise TrainingError(f"`seconds` between checkpoints must be positive; got {self.seconds}. 600 is usual.")
        if self.steps is not None and self.steps < 1:
            raise TrainingError(f"`steps` between checkpoints must be at least 1; got {self.steps}. None is never.")


class Checkpointer:
    """Writes the checkpoints of a loop when they are due, at the same step in all processes.

    Args:
        folder: Folder for checkpoints; None writes none.
        policy: When they are written.
        request: Whether the loop was asked to stop.
        fabric: The processes of the loop; the first one writes.
    """

    def __init__(self, folder: Path | None, policy: CheckpointPolicy, request: StopRequest, fabric: "Fabric") -> None:
        self._folder, self._policy, self._request, self._fabric = folder, policy, request, fabric
        self._steps, self._written = 0, monotonic()

    def between(self, state: Callable[[], Checkpoint]) -> None:
        """Write a checkpoint if one is due, and stop the loop if that was requested; call this after every step.

        Args:
            state: Returns what a checkpoint holds.

        Raises:
            Stopped: After a checkpoint.
            TrainingError: If the checkpoint cannot be written.
        """
        self._steps += 1
        due = monotonic() - self._written >= self._policy.seconds
        due = due or (self._policy.steps is not None and self._steps >= self._policy.steps)
        due, stop = self._agreed(due, self._request.asked)
        if due or stop:
            self.save(state)
        if stop:
            raise Stopped(self._folder)

    def save(self, state: Callable[[], Checkpoint]) -> None:
        """Write a checkpoint now.

        Raises:
            TrainingError: If it cannot be written.
        """
        self._steps, self._written = 0, monotonic()
        if self._folder is None:
            return
        saved = state()  # In all processes, because it may gather something from each.
        if self._fabric.is_global_zero:
            save_checkpoint(self._folder, saved)
        # No process continues, or ends, before the checkpoint is written.
        if self._fabric.world_size > 1:
            self._fabric.barrier()

    def replace_all(self, state: Callable[[], Checkpoint]) -> None:
        """Remove all checkpoints, and write one now: the loop goes back to an earlier epoch.

        Raises:
            TrainingError: If it cannot be written.
        """
        # Removed before the new one is written: a later epoch of the training that failed must never be resumed.
        if self._folder is not None and self._fabric.is_global_zero:
            for old in _complete(self._folder):
                shutil.rmtree(old, ignore_errors=True)
        self.save(state)

    def end(self) -> None:
        """Stop if that was requested since the last step; call this at the end of the loop.

        Raises:
            Stopped: If so.
        """
        if self._agreed(self._request.asked)[0]:
            raise Stopped(self._folder)

    def _agreed(self, *wishes: bool) -> tuple[bool, ...]:
        """Whether any process wishes it: clocks and signals differ, and all processes must do the same."""
        if self._fabric.world_size == 1:
            return wishes  # Nothing travels, and no clock of the device is waited for.
        said = torch.tensor(wishes, dtype=torch.float32, device=self._fabric.device)
        return tuple(wish > 0 for wish in mean_over_processes(self._fabric, said).tolist())


@contextmanager
def checkpointing(folder: Path | None, policy: CheckpointPolicy, fabric: "Fabric") -> Generator[Checkpointer]:
    """Return a context for a loop that writes checkpoints and ends with `Stopped` when a `stoppable` block asks for it.

    Args:
        folder: Folder for checkpoints; None writes none.
        policy: When they are written within an epoch.
        fabric: The processes of the loop.
    """
    with accept_stop_requests() as request:
        checkpointer = Checkpointer(folder, policy, request, fabric)
        yield checkpointer
        # Not in a `finally`: a loop that fails must end with its own error.
        checkpointer.end()
