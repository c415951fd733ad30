"""Train a student: `fit` on any images, `train_with_teacher` on a data set and from a teacher."""

import dataclasses
import logging
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._caller_state import in_default_state
from secateur._provenance import sha256_of
from secateur._runtime import copy_model
from secateur.distill.objective import Objective
from secateur.distill.taps import AlignedFeatures
from secateur.errors import TrainingError
from secateur.prune.weight_pruning import Sparsify
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.tasks.imitation import Imitation
from secateur.train.callbacks import DivergenceError
from secateur.train.checkpoint import model_sha256, write_tensors_
from secateur.train.config import Batches, RunSettings, TrainConfig, TrainingData
from secateur.train.device import Eager, Precision, fabric_precision, resolve_fabric
from secateur.train.distributed import check_divisible
from secateur.train.supervised import EpochRecord, SupervisedRun, SupervisedStep
from secateur.train.teacher import TeacherCache
from secateur.train.trainer import Trainer

_LOGGER = logging.getLogger("secateur")


@dataclass(frozen=True)
class Trained:
    """A trained student and how it was trained.

    Attributes:
        model: A new module in eval mode, on the device of the student that was given.
        history: One record per epoch; with a validation split it begins with epoch 0, before training.
        best_epoch: The epoch that the model is from.
        best_score: Its validation score, by the metric of the task; None if there was no validation split, so that the
            model is from the last epoch.
        precision: The number formats used in training.
        device: The device used in training, such as "cpu".
        divergences: A sentence for each time that the training diverged, see `TrainConfig.restarts`.
        gave_up: Whether it diverged even after all restarts. The model is then the best epoch before that, or the
            student as it was given.
    """

    model: nn.Module
    history: tuple[EpochRecord, ...]
    best_epoch: int
    best_score: float | None
    precision: Precision
    device: str
    divergences: tuple[str, ...] = ()
    gave_up: bool = False


@in_default_state
def fit(
    student: nn.Module,
    source: Batches,
    *,
    train: TrainConfig,
    objective: Objective,
    teacher: nn.Module | None = None,
    alignment: AlignedFeatures | None = None,
    augment: Any = None,
    validation: Batches | None = None,
    sparsify: Sparsify | None = None,
    teacher_cache: Path | None = None,
    task: Task = Classification(),  # noqa: B008 - frozen
    run: RunSettings = RunSettings(),  # noqa: B008 - frozen
) -> Trained:
    """Train a copy of a student; nothing that is given is changed.

    A step computes the student on images in channels-last order, the teacher in eval mode without gradients and in the
    same precision, and the loss in float32. After every epoch the student (its moving average, if there is one) is
    validated in float32. The best epoch is returned, which may be epoch 0, the student as it was given.

    Inside of a `secateur.train.stoppable` block the run can be asked to stop. With several processes batch norms are
    those of the whole batch, and the losses are those of one process.

    Args:
        student: A model with float32 weights.
        source: Training images.
        train: Epochs, batch size, learning rate, optimizer, precision and seed.
        objective: The loss. Losses of its terms that are modules are trained with the student, in a copy.
        teacher: Needed if the objective asks for it. It keeps its own mode, device and memory order.
        alignment: Where features are compared; needed if ``objective.feature_weight`` > 0.
        augment: Passed to ``source.batches``.
        validation: Images to choose the best epoch on (never the test split); None returns the last epoch.
        sparsify: Prunes single weights during the training. The result is masked (`secateur.prune.make_permanent_`
            makes it an ordinary model), and the best epoch is chosen among those with the final density.
        teacher_cache: Folder where the teacher's logits are kept, epoch by epoch. Another run with the same seed,
            images and batches reads them instead of running the teacher, bit for bit. Only for losses of logits.
        task: What outputs and targets mean, the loss with labels, and the metric that the best epoch is chosen by.
        run: Checkpoints, execution, callbacks and device. See `RunSettings` for resuming and several processes.

    Returns:
        The trained model, the history, and the best epoch.

    Raises:
        TrainingError: If settings contradict each other or the data, a loss is not finite (and ``train.restarts`` is
            0), or the checkpoint is of a run with other settings.
        Stopped: If that was requested.
    """
    _check_student(student)
    _check_objective(objective, teacher, alignment)
    if isinstance(task, Imitation) and (teacher is None or objective.label_weight):
        raise TrainingError(
            "`objective` must learn from the teacher alone for Imitation, which has no labels; got "
            f"label_weight={objective.label_weight:g}. Use Objective(kd_weight=1, label_weight=0)."
        )
    if train.epochs and len(source) == 0:
        raise TrainingError("`source` must hold at least one image; got none. Check the data folder and its splits.")
    fabric, execution = resolve_fabric(run.fabric, train.precision), run.execution
    if train.epochs:
        check_divisible(fabric, min(train.batch_size, len(source)), train.accumulate)
    else:
        execution = Eager()  # Nothing is compiled where nothing is trained.
    execution.check(fabric)
    # A teacher that no loss asks for would only cost time.
    teacher = teacher if objective.needs_teacher else None
    job = SupervisedRun(source, validation, augment, objective, train, alignment, fabric, sparsify, execution, task)
    # The caller may be in inference mode or without gradients, where modules cannot be trained.
    with torch.inference_mode(mode=False), torch.enable_grad():
        given = student
        if sparsify is not None:
            student = sparsify.start(student, train.epochs * job.steps)
        step = SupervisedStep(job, student, teacher, _cache(job, teacher, teacher_cache))
        trainer = Trainer(step, train.restarts)
        settings = {} if run.folder is None else _settings(job, student, teacher)
        trainer.resume(run.folder, settings)
        gave_up = None
        try:
            trainer.run(run, partial(trainer.saved, settings))
        except DivergenceError as problem:
            if not train.restarts:
                raise
            gave_up = f"The training diverged again: {str(problem).partition('. ')[0]}. It was given up."
            if fabric.is_global_zero:
                _LOGGER.warning(gave_up)
        if gave_up and step.best is None:
            model = copy_model(given if sparsify is None else sparsify.start(given, 0)).eval()
        else:
            # The trained copy lies on the device in channels-last order; the caller gets its own kind of model back.
            model = copy_model(student).eval()
            write_tensors_(model, step.result(trainer.average))
    return Trained(
        model=model,
        history=tuple(EpochRecord.from_json(record) for record in trainer.history),
        best_epoch=(0 if gave_up else trainer.epoch) if step.best is None else step.best.epoch,
        best_score=None if step.best is None else step.best.score,
        precision=fabric_precision(fabric),
        device=str(fabric.device),
        divergences=(*trainer.divergences, *([gave_up] if gave_up else [])),
        gave_up=gave_up is not None,
    )


@in_default_state
def train_with_teacher(
    student: nn.Module,
    *,
    teacher: nn.Module,
    data: TrainingData,
    train: TrainConfig,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    alignment: AlignedFeatures | None = None,
    sparsify: Sparsify | None = None,
    teacher_cache: Path | None = None,
    task: Task = Classification(),  # noqa: B008 - frozen
    run: RunSettings = RunSettings(),  # noqa: B008 - frozen
) -> Trained:
    """Recover a student's accuracy from its teacher: `fit` on ``data.train``, validated on ``data.validation``.

    Args:
        student: Usually a cut of the teacher.
        teacher: Usually the original model.
        data: Its training split with its augmentation, and its validation split; never its test split.
        train: See `fit`.
        objective: See `fit`.
        alignment: ``AlignedFeatures.of(graph, architecture)`` for a cut student; needed if
            ``objective.feature_weight`` > 0.
        sparsify: See `fit`.
        teacher_cache: See `fit`.
        task: See `fit`.
        run: See `fit`.

    Returns:
        See `fit`.

    Raises:
        TrainingError: See `fit`.
    """
    return fit(
        student,
        data.train,
        train=train,
        objective=objective,
        teacher=teacher,
        alignment=alignment,
        augment=data.augment,
        validation=data.validation if len(data.validation) else None,
        sparsify=sparsify,
        teacher_cache=teacher_cache,
        task=task,
        run=run,
    )


def _cache(job: SupervisedRun, teacher: nn.Module | None, folder: Path | None) -> TeacherCache | None:
    if folder is None or teacher is None:
        if folder is not None:
            warnings.warn("`teacher_cache` has no effect: the objective asks for no teacher.", stacklevel=3)
        return None
    if job.fabric.world_size > 1:
        raise TrainingError(
            f"`teacher_cache` must go with one process; got {job.fabric.world_size}. Leave it out, or take one device."
        )
    objective = job.objective
    inside = ["feature_weight"] if objective.feature_weight else [term.name for term in objective.terms if term.taps]
    if inside:
        raise TrainingError(
            f"`teacher_cache` must go with losses of logits alone; {', '.join(inside)} needs features of the teacher, "
            "which must run. Leave `teacher_cache` out."
        )
    settings = {"teacher": model_sha256(teacher), "precision": fabric_precision(job.fabric).name}
    if job.execution != Eager():
        settings["execution"] = repr(job.execution)
    return TeacherCache(folder, job.train.seed, settings)


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


def _settings(job: SupervisedRun, student: nn.Module, teacher: nn.Module | None) -> dict[str, str]:
    """Everything that must be equal for a run to be the same run."""
    settings = {
        f"{part}.{field.name}": repr(getattr(value, field.name))
        for part, value in (("train", job.train), ("objective", job.objective))
        for field in dataclasses.fields(value)
    }
    # None means another precision on another machine.
    settings["train.precision"] = fabric_precision(job.fabric).name
    settings["source"] = f"{len(job.source)} images"
    settings["validation"] = "none" if job.validation is None else f"{len(job.validation)} images"
    settings["task"] = repr(job.task)
    settings["augment"] = repr(job.augment)
    settings["alignment"] = "none" if job.alignment is None else sha256_of(repr(job.alignment))
    settings["student"] = model_sha256(student)
    settings["teacher"] = "none" if teacher is None else model_sha256(teacher)
    if job.execution != Eager():
        settings["execution"] = repr(job.execution)
    # Dropout differs between the parts of a batch, so the number of processes is part of the run.
    if job.fabric.world_size > 1:
        settings["processes"] = str(job.fabric.world_size)
    if job.sparsify is not None:
        settings["sparsify"] = repr(job.sparsify)
    if job.objective.terms:  # Not its repr, which would hold addresses of functions.
        settings["objective.terms"] = "; ".join(term.description for term in job.objective.terms)
        settings["losses"] = model_sha256(job.objective.learned)
    return settings
