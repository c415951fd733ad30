"""Train a network on labels from its beginning, with the trainer, checks and artifact that compressed ones have."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur._batches import move, take
from secateur._caller_state import in_default_state
from secateur._provenance import warn_outside_window
from secateur._runtime import copy_model
from secateur.cost.macs import count_macs, count_params
from secateur.data.dataset import ImageData, draw_calibration
from secateur.data.loaders import OwnData
from secateur.distill.objective import Objective
from secateur.errors import TrainingError
from secateur.export.formats import Format
from secateur.pipeline.config import LoggedRun, Output, RunConfig, TrainResult, describe_data, safe_config
from secateur.pipeline.distill import ModelSpec
from secateur.pipeline.evidence import measured_step
from secateur.pipeline.exports import checked_output
from secateur.pipeline.finalize import Finished, data_doubts, finalize, measured_model, report_of
from secateur.pipeline.workspace import check_model_fits_data, fabric_for, shared_run_directory
from secateur.report.run import Step
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.tasks.imitation import Imitation
from secateur.train.checkpoint import model_sha256
from secateur.train.config import RunSettings, TrainConfig
from secateur.train.device import Eager, Execution
from secateur.train.fit import Trained, fit

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True, eq=False)
class TrainPlan(LoggedRun):
    """One run of `train_model`, checked and complete; see there for the fields."""

    model: ModelSpec
    data: ImageData | OwnData
    train: TrainConfig
    recipe: str
    objective: Objective
    execution: Execution
    task: Task
    run: RunConfig
    fabric: "Fabric"

    def settings(self) -> dict[str, str]:
        """Return what decides the result, as text by name, beside the settings that training checkpoints hold."""
        data = self.data
        return {
            "model": model_sha256(self.model.model),
            "data": describe_data(data),
            "augment": repr(data.augment),
            "task": repr(self.task),
            "seed": str(self.run.seed),
        }

    def measured(self, name: str, model: nn.Module) -> Step:
        """Measure a network on the test images."""
        return measured_step(self, name, model, data=self.data, task=self.task, trained_with=self.train.batch_size)


_IMAGES = 8


@in_default_state
def train_model(
    model: ModelSpec,
    *,
    data: ImageData | OwnData,
    train: TrainConfig,
    recipe: str = "",
    label_smoothing: float = 0.0,
    task: Task = Classification(),  # noqa: B008 - frozen
    execution: Execution = Eager(),  # noqa: B008 - frozen
    out: Path | str | None = None,
    export: str | Sequence[Format | str] = (Format.ONNX,),
    run: RunConfig = RunConfig(),  # noqa: B008 - frozen
) -> TrainResult:
    """Train a network on the labels of its data, verify the result and write it as an artifact.

    Args:
        model: A copy of it is trained, from the weights that it has.
        data: The best epoch is chosen on the validation images; the test images are for the report alone.
        train: Epochs, batch size, learning rate, optimizer. ``run.seed`` replaces its seed.
        recipe: The name of a recipe, for the report.
        label_smoothing: See `Objective`; classification only.
        task: What outputs and targets mean; any but `Imitation`.
        execution: How the network is run, see `secateur.train.fit`.
        out: Folder for the artifact, the exports and the report; None writes nothing. Until the end the work lies in
            ``<out>.work``, from which an interrupted run is resumed.
        export: Files for other runtimes, such as ``"onnx,int8"``; only with ``out``.
        run: Seed, device, callbacks, checkpoints, and what to do with an unfinished run at the same ``out``.

    Returns:
        The trained network and everything that was measured.

    Raises:
        SecateurError: One of its subclasses, with the way out.
    """
    if train.epochs < 1:
        raise TrainingError(f"`train` must have epochs; got {train.epochs}. Give it one or more.")
    if isinstance(task, Imitation):
        raise TrainingError(f"`task` must have labels to learn from; got {task!r}. Imitation is for compressing.")
    output = checked_output(out, export, model.model, source=model.source, name=model.called, run=run)
    place = None if output is None else output.folder
    fabric = fabric_for(run.fabric, train.precision, run.device, place)
    if fabric.is_global_zero:
        warn_outside_window()
    execution.check(fabric)
    batch = draw_calibration(data.train, min(_IMAGES, len(data.train)), device=fabric.device, seed=run.seed)[0]
    check_model_fits_data(copy_model(model.model).to(fabric.device).eval(), data, batch[0], task, batch[1])
    plan = TrainPlan(
        model=model,
        data=data,
        train=safe_config(train, run.seed),
        recipe=recipe,
        objective=Objective.of_labels(label_smoothing=label_smoothing),
        execution=execution,
        task=task,
        run=run,
        fabric=fabric,
    )
    with shared_run_directory(fabric, place, plan.settings(), run.on_existing) as work:
        if work is not None:
            plan = replace(plan, run=replace(run, callbacks=work.logged(run.callbacks)))
        trained, steps = _learn(plan, None if work is None else work.checkpoint)
        images = move(batch[0], torch.device("cpu"))
        report, folder, files = finalize(_finished(plan, trained, steps, images, output))
    return TrainResult(trained.model, trained, report, folder, files)


def _learn(plan: TrainPlan, checkpoint: Path | None) -> tuple[Trained, tuple[Step, ...]]:
    data = plan.data
    before = plan.measured("before", plan.model.model)
    trained = fit(
        plan.model.model,
        data.train,
        train=plan.train,
        objective=plan.objective,
        augment=data.augment,
        validation=data.validation if len(data.validation) else None,
        task=plan.task,
        run=RunSettings(checkpoint, plan.run.checkpoints, plan.execution, plan.run.callbacks, plan.fabric),
    )
    return trained, (before, plan.measured("trained", trained.model))


def _finished(
    plan: TrainPlan, trained: Trained, steps: tuple[Step, ...], images: Any, output: Output | None
) -> Finished:
    """The run as `finalize` takes it."""
    before, after, data = plan.model.model, trained.model, plan.data
    example = take(images, slice(1))
    macs, params = count_macs(copy_model(before).eval().cpu(), example), count_params(before)
    measured = (measured_model(before, macs, steps[0]), measured_model(after, macs, steps[-1]))
    words = f"trained on labels for {plan.train.epochs} epochs{f' by {plan.recipe}' if plan.recipe else ''}"
    report = report_of(plan.model.called, data, measured, strategy=words, steps=steps, trained=trained, run=plan.run)
    own = data.notes if isinstance(data, OwnData) else ()
    # A network that has learned nothing is no base for anything: the report says so.
    doubts = (*own, *data_doubts("trained model", steps[-1], data), *trained.divergences)
    cost = {"macs": macs, "params": params}
    return Finished(
        report=replace(report, notes=doubts, compresses=False),
        original=before,
        student=after,
        given=before,
        trained=trained,
        images=images,
        data=data,
        architecture=plan.model.architecture,
        costs=(cost, cost),
        output=output,
        run=plan.run,
        fabric=plan.fabric,
        log=plan.log,
        doubts=doubts,
        metrics={"training": {"recipe": plan.recipe, "train": repr(plan.train), "augment": repr(data.augment)}},
    )
