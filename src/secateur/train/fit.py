"""The public verbs: `fit` a student, `train_with_teacher` one from its teacher."""

import copy
import dataclasses
import warnings
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.distill.objective import Objective
from secateur.distill.taps import AlignedFeatures
from secateur.errors import TrainingError
from secateur.prune.weight_pruning import Sparsify
from secateur.train.callbacks import Meter, Progress, Silent, TerminalProgress
from secateur.train.checkpoint import (
    Checkpointer,
    CheckpointPolicy,
    Saved,
    digest,
    keeping,
    load_checkpoint,
    write_tensors_,
)
from secateur.train.config import Batches, TrainConfig, TrainingData, TrainingTask
from secateur.train.device import Eager, Execution, precision_of, usable
from secateur.train.distributed import check_divisible, gathered
from secateur.train.teacher import TeacherCache
from secateur.train.trainer import Trained, Trainer

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def fit(
    student: nn.Module,
    source: Batches,
    *,
    schedule: TrainConfig,
    objective: Objective,
    teacher: nn.Module | None = None,
    alignment: AlignedFeatures | None = None,
    augment: Any = None,
    validation: Batches | None = None,
    sparsify: Sparsify | None = None,
    remember: Path | None = None,
    checkpoint: Path | None = None,
    saving: CheckpointPolicy = CheckpointPolicy(),  # noqa: B008 - frozen
    execution: Execution = Eager(),  # noqa: B008 - frozen
    progress: Progress = TerminalProgress(),  # noqa: B008 - frozen
    fabric: "Fabric | None" = None,
) -> Trained:
    """Train a copy of a student; nothing that is given is changed.

    The step: images in channels-last order; the teacher in eval mode and without gradients in the same precision as
    the student; the loss in float32; the learning rate of `Schedule.learning_rate_at`. After every epoch the student
    (its moving average, if there is one) is validated in float32; the best epoch is returned, which may be epoch 0,
    the student as it came.

    With a ``checkpoint`` folder every epoch ends with an atomic checkpoint, and a long one has some within. A run that
    finds one there goes on after it, in the middle of an epoch too: on the CPU, with the same number of threads, the
    result is bit-identical to that of an uninterrupted run, and so is the history, but for times. Inside of a
    `secateur.train.stoppable` block it can be asked to stop.

    Args:
        student: A classifier with float32 weights that gives logits (batch, classes).
        source: Training images.
        schedule: Epochs, learning rate, optimizer, precision, seed.
        objective: The loss. Losses of its terms that are modules are learned with the student, in a copy.
        teacher: Needed if the objective asks for it. It keeps its own mode, device and memory order.
        alignment: Where features are compared; needed if ``objective.feature_weight`` > 0.
        augment: Passed to ``source.batches``.
        validation: Images to choose the best epoch on (never the test split); None returns the last epoch.
        sparsify: Prunes single weights meanwhile: the result is masked (`secateur.sparsity.make_permanent_` makes it an
            ordinary model), and the best epoch is chosen among those that end with the final density.
        remember: Folder where the teacher's logits are kept, epoch by epoch: a second run with the same seed, images
            and batches reads them instead of running the teacher, bit for bit. Only for losses of logits.
        checkpoint: Folder for checkpoints; None writes none.
        saving: When checkpoints are written within an epoch.
        execution: How student and teacher are run: `Eager()`, or `Compiled()` by `torch.compile`, on one device.
        progress: `TerminalProgress()`, `Silent()`, or your own.
        fabric: A Fabric for one device, or for several with the strategy ddp, and its precision; None opens one, see
            `open_fabric`. Of several processes, all of which must call this with the same arguments, each takes its
            part of every batch; batch norms are those of the whole batch, and the losses are those of one process. The
            first one writes checkpoints and shows progress; all return the same model.

    Returns:
        The trained model, the history, and the best epoch.

    Raises:
        TrainingError: If settings contradict each other or the data, a loss is not finite, or the checkpoint is of a
            run with other settings.
        Stopped: If that was asked for.
    """
    _check_student(student)
    _check_objective(objective, teacher, alignment)
    if schedule.epochs and len(source) == 0:
        raise TrainingError("`source` must hold at least one image; got none. Check the data folder and its splits.")
    fabric = usable(fabric, schedule.precision)
    if schedule.epochs:
        check_divisible(fabric, min(schedule.batch_size, len(source)), schedule.accumulate)
    else:
        execution = Eager()
    execution.check(fabric)
    progress = progress if fabric.is_global_zero else Silent()
    teacher = teacher if objective.needs_teacher else None
    task = TrainingTask(source, validation, augment, objective, schedule, alignment, fabric, sparsify, execution)
    with torch.inference_mode(mode=False), torch.enable_grad():
        if sparsify is not None:
            student = sparsify.begun(student, schedule.epochs * task.steps)
        engine = Trainer(task, student, teacher, _memory(task, teacher, remember))
        settings = {} if checkpoint is None else _settings(task, student, teacher)
        saved = None if checkpoint is None else load_checkpoint(checkpoint, settings)
        if fabric.world_size > 1:
            _check_together(fabric, saved)
        if saved is not None:
            engine.restore(saved)
        with (
            keeping(checkpoint, saving, fabric) as keeper,
            progress.watch("train", epochs=schedule.epochs, steps=task.steps, done=engine.epoch) as meter,
        ):
            _run(engine, schedule.epochs, meter, keeper, settings)
        model = copy.deepcopy(student).eval()
        write_tensors_(model, engine.result)
    return Trained(
        model=model,
        history=tuple(engine.history),
        best_epoch=engine.epoch if engine.best is None else engine.best.epoch,
        best_accuracy=None if engine.best is None else engine.best.accuracy,
        precision=precision_of(fabric),
        device=str(fabric.device),
    )


def train_with_teacher(
    student: nn.Module,
    *,
    teacher: nn.Module,
    data: TrainingData,
    schedule: TrainConfig,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    alignment: AlignedFeatures | None = None,
    sparsify: Sparsify | None = None,
    remember: Path | None = None,
    checkpoint: Path | None = None,
    saving: CheckpointPolicy = CheckpointPolicy(),  # noqa: B008 - frozen
    execution: Execution = Eager(),  # noqa: B008 - frozen
    progress: Progress = TerminalProgress(),  # noqa: B008 - frozen
    fabric: "Fabric | None" = None,
) -> Trained:
    """Recover a student's accuracy from its teacher: `fit` on ``data.train``, validated on ``data.validation``.

    Args:
        student: Usually a cut of the teacher.
        teacher: Usually the original model.
        data: Its training split with its augmentation, and its validation split; never its test split.
        schedule: See `fit`.
        objective: See `fit`.
        alignment: ``AlignedFeatures.of(graph, architecture)`` for a cut student; needed if
            ``objective.feature_weight`` > 0.
        sparsify: See `fit`.
        remember: See `fit`.
        checkpoint: See `fit`.
        saving: See `fit`.
        execution: See `fit`.
        progress: See `fit`.
        fabric: See `fit`.

    Returns:
        See `fit`.

    Raises:
        TrainingError: See `fit`.
    """
    return fit(
        student,
        data.train,
        schedule=schedule,
        objective=objective,
        teacher=teacher,
        alignment=alignment,
        augment=data.augment,
        validation=data.validation if len(data.validation) else None,
        sparsify=sparsify,
        remember=remember,
        checkpoint=checkpoint,
        saving=saving,
        execution=execution,
        progress=progress,
        fabric=fabric,
    )


def _memory(task: TrainingTask, teacher: nn.Module | None, folder: Path | None) -> TeacherCache | None:
    if folder is None or teacher is None:
        if folder is not None:
            warnings.warn("`remember` has no effect: the objective asks for no teacher.", stacklevel=3)
        return None
    if task.fabric.world_size > 1:
        raise TrainingError(
            f"`remember` must go with one process; got {task.fabric.world_size}. Leave it out, or take one device."
        )
    objective = task.objective
    listening = ["feature_weight"] if objective.feature_weight else [term.name for term in objective.terms if term.taps]
    if listening:
        raise TrainingError(
            f"`remember` must go with losses of logits alone; {', '.join(listening)} listens inside of the teacher, "
            "which must run. Leave `remember` out."
        )
    settings = {"teacher": digest(teacher), "precision": precision_of(task.fabric).name}
    if task.execution != Eager():
        settings["execution"] = repr(task.execution)
    return TeacherCache(folder, task.schedule.seed, settings)


def _run(engine: Trainer, epochs: int, meter: Meter, keeper: Checkpointer, settings: dict[str, str]) -> None:
    def state() -> Saved:
        return engine.saved(settings)

    if not engine.history:
        engine.validate_start(meter)
    while engine.epoch < epochs:
        engine.train_epoch(meter, lambda: keeper.between(state))
        keeper.save(state)


def _check_together(fabric: "Fabric", saved: Saved | None) -> None:
    """Refuse processes that have found different checkpoints."""
    own = torch.tensor([-1, 0] if saved is None else [saved.epoch, saved.step])
    if len(gathered(fabric, own).unique(dim=0)) > 1:
        raise TrainingError(
            "`checkpoint` must be one folder that all processes see; got different checkpoints in them. "
            "Use a folder that all machines share."
        )


def _check_student(student: nn.Module) -> None:
    parameters = dict(student.named_parameters())
    if not any(p.requires_grad for p in parameters.values()):
        raise TrainingError(
            f"`student` must have trainable parameters; got {len(parameters)}, none of which requires a gradient. "
            "Call student.requires_grad_()."
        )
    for name, parameter in parameters.items():
        if parameter.dtype is not torch.float32:
            raise TrainingError(f"`student` must have float32 weights; got {parameter.dtype} ({name}). Call .float().")


def _check_objective(objective: Objective, teacher: nn.Module | None, alignment: AlignedFeatures | None) -> None:
    if objective.needs_teacher and teacher is None:
        raise TrainingError(f"`teacher` must be given for {objective}; got None. Or use Objective.of_labels().")
    if objective.feature_weight and alignment is None:
        raise TrainingError(
            f"`alignment` must be given because feature_weight is {objective.feature_weight}; got None. "
            "Use AlignedFeatures.of(graph, architecture), or set feature_weight=0."
        )
    if teacher is not None and not objective.needs_teacher:
        warnings.warn("`teacher` has no effect: kd_weight and feature_weight are 0.", stacklevel=3)
    if alignment is not None and not objective.feature_weight:
        warnings.warn("`alignment` has no effect: feature_weight is 0.", stacklevel=3)


def _settings(task: TrainingTask, student: nn.Module, teacher: nn.Module | None) -> dict[str, str]:
    """Everything that must be equal for a run to be the same run."""
    settings = {
        f"{part}.{field.name}": repr(getattr(value, field.name))
        for part, value in (("schedule", task.schedule), ("objective", task.objective))
        for field in dataclasses.fields(value)
    }
    settings["schedule.precision"] = precision_of(task.fabric).name
    settings["source"] = f"{len(task.source)} images"
    settings["validation"] = "none" if task.validation is None else f"{len(task.validation)} images"
    settings["augment"] = repr(task.augment)
    settings["alignment"] = "none" if task.alignment is None else sha256(repr(task.alignment).encode()).hexdigest()
    settings["student"] = digest(student)
    settings["teacher"] = "none" if teacher is None else digest(teacher)
    if task.execution != Eager():
        settings["execution"] = repr(task.execution)
    if task.fabric.world_size > 1:
        settings["processes"] = str(task.fabric.world_size)
    if task.sparsify is not None:
        settings["sparsify"] = repr(task.sparsify)
    if task.objective.terms:  # Not its repr, which would hold addresses of functions.
        settings["objective.terms"] = "; ".join(term.description for term in task.objective.terms)
        settings["losses"] = digest(task.objective.learned)
    return settings
