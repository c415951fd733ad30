"""Distill any teacher into any student, with the trainer, checks and artifact that a cut student has."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur._batches import move, take
from secateur._caller_state import in_default_state
from secateur._kinds import settings
from secateur._provenance import warn_outside_window
from secateur._runtime import copy_model
from secateur.architecture import Architecture
from secateur.cost.macs import count_macs, count_params
from secateur.data.dataset import ImageData, draw_calibration
from secateur.data.loaders import OwnData, run_data
from secateur.distill.objective import Objective, Term
from secateur.errors import TrainingError
from secateur.export.formats import Format
from secateur.models.source import ModelSource
from secateur.pipeline.config import LoggedRun, Output, RunConfig, TrainResult, describe_data, safe_config
from secateur.pipeline.evidence import measured_step, with_pairs
from secateur.pipeline.exports import checked_output
from secateur.pipeline.finalize import Finished, data_doubts, finalize, measured_model, report_of
from secateur.pipeline.workspace import (
    CLASSIFICATION,
    RunDirectory,
    check_model_fits_data,
    check_own_loop,
    fabric_for,
    shared_run_directory,
)
from secateur.report.pictures import example_pictures
from secateur.report.run import Step
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.tasks.imitation import Imitation
from secateur.train.checkpoint import model_sha256
from secateur.train.config import RunSettings, TrainConfig
from secateur.train.device import Eager, Execution
from secateur.train.fit import Trained, train_with_teacher
from secateur.train.own_loop import Recover, recover_with
from secateur.train.recipes import distill_after_hints

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@settings
class HintStage:
    """A first stage that trains with hints only, see `secateur.train.distill_after_hints`.

    Attributes:
        hints: Losses of features.
        train: Epochs, batch size, learning rate, optimizer of the stage.
    """

    hints: tuple[Term, ...]
    train: TrainConfig


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A student or teacher with its name and origin.

    Attributes:
        model: The model; it is not changed.
        name: Name for the report; empty means the name of its class.
        source: How it is built, so that the artifact can be loaded; with None, loading needs ``factory=``.
        architecture: What is kept of the model that ``source`` builds; complete if it is not a cut model.
    """

    model: nn.Module
    name: str = ""
    source: ModelSource | None = None
    architecture: Architecture = Architecture()  # noqa: RUF009 - frozen

    @property
    def called(self) -> str:
        """The name, or that of the class."""
        return self.name or type(self.model).__name__


@dataclass(frozen=True, eq=False)
class DistillPlan(LoggedRun):
    """One run of `distill_model`, checked and complete; see there for the fields."""

    student: ModelSpec
    teacher: ModelSpec
    data: ImageData | OwnData
    task: Task
    train: TrainConfig
    recover: Recover | None
    objective: Objective
    hint_stage: HintStage | None
    teacher_cache: Path | None
    execution: Execution
    run: RunConfig
    fabric: "Fabric"

    def settings(self) -> dict[str, str]:
        """Return what decides the result, as text by name, beside the settings that training checkpoints hold."""
        data = self.data
        return {
            "student": model_sha256(self.student.model),
            "teacher": model_sha256(self.teacher.model),
            "data": describe_data(data),
            "augment": repr(data.augment),
            **({} if isinstance(self.task, Classification) else {"task": repr(self.task)}),
            "hints": "none" if self.hint_stage is None else repr(self.hint_stage.train),
            "seed": str(self.run.seed),
        }

    @property
    def losses(self) -> str:
        """The objective in words."""
        if self.recover is not None:
            return f"trained beside {self.teacher.called} by a loop of the user's own"
        found = [f"{self.objective.kd_weight:g} kd (T = {self.objective.temperature:g})"] * bool(
            self.objective.kd_weight
        )
        found += [f"{self.objective.label_weight:g} labels"] * bool(self.objective.label_weight)
        found += [f"{term.weight:g} {term.name}" for term in self.objective.terms]
        first = "" if self.hint_stage is None else f", after {self.hint_stage.train.epochs} epochs of hints"
        return f"distilled from {self.teacher.called}: {' + '.join(found)}{first}"


_IMAGES = 8


@in_default_state
def distill_model(
    student: ModelSpec,
    *,
    teacher: ModelSpec,
    data: Any,
    train: TrainConfig | Recover,
    task: Task = CLASSIFICATION,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    hint_stage: HintStage | None = None,
    teacher_cache: Path | None = None,
    execution: Execution = Eager(),  # noqa: B008 - frozen
    out: Path | str | None = None,
    export: str | Sequence[Format | str] = (Format.ONNX,),
    run: RunConfig = RunConfig(),  # noqa: B008 - frozen
) -> TrainResult:
    """Distill any teacher into any student, verify the result and write it as an artifact.

    Args:
        student: A copy of it is trained.
        teacher: A trained classifier of the same classes.
        data: See `compress`. The best epoch is chosen on the validation images; those of the test are for the report.
        train: Epochs, batch size, learning rate, optimizer. ``run.seed`` replaces its seed. Or a training loop of your
            own, a function that takes (student, teacher, data, context) and returns the student, see
            `secateur.train.Recover`; then ``objective``, ``teacher_cache`` and ``execution`` have no effect.
        task: What outputs and targets mean, see `secateur.tasks`.
        objective: The losses; aligned features are not among them, which only a cut student has.
        hint_stage: Trained first; None goes without.
        teacher_cache: Folder for the teacher's logits, see `secateur.train.fit`.
        execution: How both are run, see `secateur.train.fit`.
        out: Folder for the artifact, the exports and the report; None writes nothing. Until the end the work lies in
            ``<out>.work``, from which an interrupted run is resumed.
        export: Files for other runtimes, such as ``"onnx,int8"``; only with ``out``.
        run: Seed, device, callbacks, checkpoints, and what to do with an unfinished run at the same ``out``.

    Returns:
        The student and everything that was measured.

    Raises:
        SecateurError: One of its subclasses, with the way out.
    """
    recover, train = (None, train) if isinstance(train, TrainConfig) else (train, TrainConfig(epochs=0))
    output = checked_output(out, export, student.model, source=student.source, name=student.called, run=run)
    place = None if output is None else output.folder
    fabric = fabric_for(run.fabric, train.precision, run.device, place)
    check_own_loop(recover, fabric)
    if recover is not None and hint_stage is not None:
        raise TrainingError("`hint_stage` must be left out with a training loop of your own; got both.")
    if fabric.is_global_zero:
        warn_outside_window()
    execution.check(fabric)
    data = run_data(data, run.seed)
    if isinstance(task, Imitation):
        objective = replace(objective, label_weight=0.0, kd_weight=objective.kd_weight or 1.0)
    images, targets = draw_calibration(data.train, min(_IMAGES, len(data.train)), device=fabric.device, seed=run.seed)[
        0
    ]
    for spec in (teacher, student):
        check_model_fits_data(copy_model(spec.model).to(fabric.device).eval(), data, images, task, targets)
    plan = DistillPlan(
        student=student,
        teacher=teacher,
        data=data,
        task=task,
        train=safe_config(train, run.seed),
        recover=recover,
        objective=objective,
        hint_stage=hint_stage,
        teacher_cache=teacher_cache,
        execution=execution,
        run=run,
        fabric=fabric,
    )
    with shared_run_directory(fabric, place, plan.settings(), run.on_existing) as work:
        if work is not None:
            plan = replace(plan, run=replace(run, callbacks=work.logged(run.callbacks)))
        student_after, trained, steps = _learn(plan, work, images)
        on_cpu = move(images, torch.device("cpu"))
        finished = _finished(plan, student_after, trained, steps=steps, images=on_cpu, output=output)
        report, folder, files = finalize(finished)
    return TrainResult(student_after, trained, report, folder, files)


def _learn(
    plan: DistillPlan, work: RunDirectory | None, images: Any
) -> tuple[nn.Module, Trained | None, tuple[Step, ...]]:
    steps = [
        _step(plan, "teacher", plan.teacher.model),
        _step(plan, "student before", plan.student.model),
    ]
    if plan.recover is not None:
        model = recover_with(
            plan.recover,
            plan.student.model,
            teacher=plan.teacher.model,
            data=plan.data,
            task=plan.task,
            device=plan.fabric.device,
            seed=plan.run.seed,
            folder=None if work is None else work.own_loop,
            example=images,
        )
        return model, None, (*steps, _step(plan, "trained", model))
    checkpoint = None if work is None else work.checkpoint
    run = RunSettings(checkpoint, plan.run.checkpoints, plan.execution, plan.run.callbacks, plan.fabric)
    if plan.hint_stage is None:
        trained = train_with_teacher(
            plan.student.model,
            teacher=plan.teacher.model,
            data=plan.data,
            train=plan.train,
            objective=plan.objective,
            teacher_cache=plan.teacher_cache,
            task=plan.task,
            run=run,
        )
    else:
        trained = distill_after_hints(
            plan.student.model,
            teacher=plan.teacher.model,
            data=plan.data,
            hints=plan.hint_stage.hints,
            hint_train=safe_config(plan.hint_stage.train, plan.run.seed),
            train=plan.train,
            objective=plan.objective,
            task=plan.task,
            run=run,
        )
    steps.append(_step(plan, "distilled", trained.model))
    return trained.model, trained, tuple(steps)


def _step(plan: DistillPlan, name: str, model: nn.Module) -> Step:
    batch = plan.train.batch_size
    return measured_step(
        plan, name, model, data=plan.data, task=plan.task, trained_with=batch, original=plan.teacher.model
    )


def _finished(
    plan: DistillPlan,
    student: nn.Module,
    trained: Trained | None,
    *,
    steps: tuple[Step, ...],
    images: Any,
    output: Output | None,
) -> Finished:
    """The run as `finalize` takes it."""
    teacher, example = plan.teacher.model, take(images, slice(1))
    macs = [count_macs(copy_model(model).eval().cpu(), example) for model in (teacher, student)]
    measured = (measured_model(teacher, macs[0], steps[0]), measured_model(student, macs[1], steps[-1]))
    name = f"{plan.student.called} from {plan.teacher.called}"
    report = report_of(name, plan.data, measured, strategy=plan.losses, steps=steps, trained=trained, run=plan.run)
    doubts = (*data_doubts("teacher", steps[0], plan.data), *(() if trained is None else trained.divergences))
    pictures = ()
    if output is not None and plan.fabric.is_global_zero:
        names = ("teacher", "student")
        pictures = example_pictures(plan.task, plan.data, teacher, student, names=names)
    return Finished(
        report=replace(with_pairs(report, plan.data), notes=doubts, warnings=doubts, pictures=pictures),
        original=teacher,
        student=student,
        given=plan.student.model,
        trained=trained,
        images=images,
        data=plan.data,
        architecture=plan.student.architecture,
        costs=(
            {"macs": macs[0], "params": count_params(teacher)},
            {"macs": macs[1], "params": count_params(student)},
        ),
        output=output,
        run=plan.run,
        fabric=plan.fabric,
        log=plan.log,
        doubts=doubts,
        metrics={"distillation": {"teacher": plan.teacher.called, "losses": plan.losses}},
    )
