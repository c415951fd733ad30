"""A student of any kind learns from a teacher of any kind: the same engine, checks and artifact as for a cut one."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.artifact import (
    Provenance,
    Recipe,
    amend,
    atomic_folder,
    edits_between,
    save,
    warn_outside_window,
    weights_bytes,
)
from secateur.cost import counted_macs, counted_params
from secateur.data import ImageData, calibration
from secateur.distill import Objective
from secateur.pipeline._checks import copied, latency_between, reload_check, shown_latency
from secateur.pipeline._compress import silent
from secateur.pipeline._disk import told_of_disk
from secateur.pipeline._export import Samples
from secateur.pipeline._export_checks import Exports, deliver_exports
from secateur.pipeline._formats import Format, check_formats
from secateur.pipeline._outset import check_belongs, check_output, own_copy
from secateur.pipeline._probe import probe_json
from secateur.pipeline._pupil import Distilled, Hinting, Lesson, Pupil
from secateur.pipeline._together import fabric_for, shared_workplace
from secateur.pipeline._work import Leftover, workplace_of
from secateur.report import Check, Measured, MeasuredAccuracy, RunReport, Step, TrainedEpoch, write_report
from secateur.sparsity import nonzero_params
from secateur.train import (
    Eager,
    Execution,
    Progress,
    Saving,
    Schedule,
    TerminalProgress,
    Trained,
    distill,
    distill_after_hints,
    evaluate,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_IMAGES = 8


def distill_into(
    student: Pupil,
    *,
    teacher: Pupil,
    data: ImageData,
    schedule: Schedule,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    hinting: Hinting | None = None,
    remember: Path | None = None,
    out: Path | None = None,
    export: Sequence[Format] = (Format.ONNX,),
    leftover: Leftover = Leftover.REFUSE,
    saving: Saving = Saving(),  # noqa: B008 - frozen
    execution: Execution = Eager(),  # noqa: B008 - frozen
    seed: int = 0,
    device: torch.device | None = None,
    fabric: "Fabric | None" = None,
    progress: Progress = TerminalProgress(),  # noqa: B008 - frozen
    tell: Callable[[str], None] = silent,
    command: str = "",
) -> Distilled:
    """Distil any teacher into any student, verify the result and write it as an artifact.

    Args:
        student: Learns; a copy is trained.
        teacher: A trained classifier of the same classes.
        data: The best epoch is chosen on the validation images; the test images are for the report alone.
        schedule: Of the training. Its seed is replaced by ``seed``.
        objective: The losses, see `secateur.distill.Objective`; no aligned features, which only a cut student has.
        hinting: A stage of hints first; None goes without.
        remember: Folder for the teacher's logits, see `secateur.train.fit`.
        out: Folder for the artifact, the exports and the report; None writes nothing. Until the end the work lies in
            ``<out>.work``, from which an interrupted run goes on.
        export: Files for other runtimes; only with ``out``.
        leftover: What to do with an interrupted run at the same ``out``.
        saving: When checkpoints are written, beside those at the ends of epochs; only with ``out``.
        execution: How both are run, see `secateur.train.fit`.
        seed: Of order, augmentation and dropout.
        device: Where to compute; None means the accelerator if there is one.
        fabric: Instead of a device, see `compress`.
        progress: Shows the training.
        tell: Receives one sentence per step.
        command: The exact command or call, for the record.

    Returns:
        The student and everything that was measured.

    Raises:
        SecateurError: One of its subclasses, with the way out.
    """
    fabric = fabric_for(fabric, schedule.precision, device, out)
    if fabric.is_global_zero:
        warn_outside_window()
    execution.check(fabric)
    images = calibration(data.train, min(_IMAGES, len(data.train)), device=fabric.device, seed=seed)[0][0]
    for pupil in (teacher, student):
        check_belongs(own_copy(pupil.model, fabric.device), data, images)
    if out is not None:
        check_output(out)
        check_formats(export)
    run = Lesson(
        student, teacher, data, replace(schedule, seed=seed), objective, hinting, fabric, command, saving, execution
    )
    tell = tell if fabric.is_global_zero else silent
    if out is None:
        trained, steps = _learn(run, remember, None, progress, tell)
        return Distilled(trained.model, trained, _report(run, trained, steps))
    with shared_workplace(fabric, out, run.settings(), leftover) as work:
        trained, steps = _learn(run, remember, work.checkpoint, work.logged(progress), tell)
        if not fabric.is_global_zero:
            return Distilled(trained.model, trained, _report(run, trained, steps))
        learnt = _Learnt(run, trained, steps, images.detach().cpu())
        report, files = _deliver(learnt, out, tuple(dict.fromkeys(export)), tell)
    return Distilled(trained.model, trained, report, out, files)


def _learn(
    run: Lesson, remember: Path | None, checkpoint: Path | None, progress: Progress, tell: Callable[[str], None]
) -> tuple[Trained, tuple[Step, ...]]:
    steps = [
        _step(run, "teacher", run.teacher.model, tell),
        _step(run, "student before", run.student.model, tell),
    ]
    if run.hinting is None:
        trained = distill(
            run.student.model,
            teacher=run.teacher.model,
            data=run.data,
            schedule=run.schedule,
            objective=run.objective,
            remember=remember,
            checkpoint=checkpoint,
            saving=run.saving,
            execution=run.execution,
            progress=progress,
            fabric=run.fabric,
        )
    else:
        trained = distill_after_hints(
            run.student.model,
            teacher=run.teacher.model,
            data=run.data,
            hints=run.hinting.hints,
            hint_schedule=replace(run.hinting.schedule, seed=run.schedule.seed),
            schedule=run.schedule,
            objective=run.objective,
            checkpoint=checkpoint,
            saving=run.saving,
            execution=run.execution,
            progress=progress,
            fabric=run.fabric,
        )
    steps.append(_step(run, "distilled", trained.model, tell))
    return trained, tuple(steps)


def _step(run: Lesson, name: str, model: nn.Module, tell: Callable[[str], None]) -> Step:
    found = evaluate(model, run.data.test, device=run.fabric.device)
    tell(f"Test accuracy, {name}: {100 * found.top1:.2f} % of {found.n} images.")
    return Step(name, MeasuredAccuracy(found.top1, found.n))


def _measured(model: nn.Module, data: ImageData, step: Step) -> Measured:
    macs = counted_macs(copied(model).cpu(), torch.zeros(1, *data.size))
    return Measured(macs, counted_params(model), weights_bytes(model), step.accuracy, nonzero_params(model))


def _report(run: Lesson, trained: Trained, steps: tuple[Step, ...], **more: object) -> RunReport:
    provenance, data = Provenance.here(run.command, run.schedule.seed), run.data
    report = RunReport(
        model=f"{run.student.called} from {run.teacher.called}",
        data=f"{data.name}: {len(data.train)} training, {len(data.validation)} validation and {len(data.test)} test "
        "images",
        strategy=run.losses,
        before=_measured(run.teacher.model, data, steps[0]),
        after=_measured(trained.model, data, steps[-1]),
        steps=steps,
        training=tuple(
            TrainedEpoch(record.epoch, record.train_loss, record.validation_accuracy)
            for record in trained.history
            if record.train_loss is not None
        ),
        command=provenance.command,
        seed=provenance.seed,
        versions=provenance.versions,
        machine=provenance.machine,
        date=provenance.date,
    )
    return replace(report, **more)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class _Learnt:
    run: Lesson
    trained: Trained
    steps: tuple[Step, ...]
    images: Tensor


def _deliver(
    learnt: _Learnt, out: Path, formats: tuple[Format, ...], tell: Callable[[str], None]
) -> tuple[RunReport, tuple[Path, ...]]:
    run, trained, images = learnt.run, learnt.trained, learnt.images
    student, given = trained.model, run.student
    with told_of_disk(out), atomic_folder(out) as draft:
        save(draft, student, _recipe(run, student))
        own = (lambda: copied(given.model)) if given.source is None else None
        checks: list[Check] = [reload_check(student, images, draft, own)]
        exports = deliver_exports(student, Samples(images, run.data), draft, formats)
        checks += exports.checks
        latency, notes = latency_between(run.teacher.model, student, images)
        report = _report(
            run,
            trained,
            learnt.steps,
            checks=tuple(checks),
            latency=tuple(map(shown_latency, latency)),
            notes=(*notes, *exports.notes),
            exports=exports.shown,
        )
        write_report(draft / "report.html", report)
        workplace_of(out).hand_on_history(draft)
        amend(draft, metrics=_metrics(run, trained, report), verification=_verification(run, student, report, exports))
        names = sorted(path.name for path in draft.iterdir())
    for check in report.checks:
        tell(f"{'Checked' if check.passed else 'FAILED'}: {check.name}. {check.detail}".rstrip())
    return report, tuple(out / name for name in names)


def _recipe(run: Lesson, student: nn.Module) -> Recipe:
    given, data = run.student, run.data
    pristine = given.model if given.source is None else given.source.build(trust_source=True)
    example = torch.zeros(1, *data.size)
    costs = [
        {"macs": counted_macs(copied(model).cpu(), example), "params": counted_params(model)}
        for model in (run.teacher.model, student)
    ]
    return Recipe(
        source={"kind": "factory", "name": given.called} if given.source is None else given.source.to_json(),
        architecture=given.architecture,
        edits=edits_between(pristine, student),
        input_shape=data.size,
        mean=data.mean,
        std=data.std,
        classes=data.classes,
        cost_before=costs[0],
        cost_after=costs[1],
        provenance=Provenance.here(run.command, run.schedule.seed),
    )


def _metrics(run: Lesson, trained: Trained, report: RunReport) -> dict[str, object]:
    return {
        "test_accuracy": [{"step": s.name, "top1": s.accuracy.top1, "n": s.accuracy.n} for s in report.steps],
        "size_bytes": {"before": report.before.size_bytes, "after": report.after.size_bytes},
        "performance_efficiency": None if report.efficiency is None else list(report.efficiency),
        "history": [record.to_json() for record in trained.history],
        "best_epoch": trained.best_epoch,
        "distillation": {"teacher": run.teacher.called, "losses": run.losses},
    }


def _verification(run: Lesson, student: nn.Module, report: RunReport, exports: Exports) -> dict[str, object]:
    return {
        **exports.to_json(),
        "checks": [asdict(check) for check in report.checks],
        "probe": probe_json(copied(student).cpu(), run.data.size),
    }
