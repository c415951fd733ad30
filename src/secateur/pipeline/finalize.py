"""Why a network with fewer multiply-accumulates is hardly faster.

What a search noted on its way, for the report.

The last part of a run: check, write and export, all in a draft folder that appears whole or not at all."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from secateur._files import atomic_folder, disk_errors
from secateur._provenance import Provenance
from secateur.cost.budget import is_timed
from secateur.cost.macs import counted_macs, counted_params
from secateur.cost.measure import LatencyRecord
from secateur.export.artifact import amend, save, weights_bytes
from secateur.export.edits import Edit, edits_between
from secateur.export.manifest import Recipe
from secateur.pipeline.checks import (
    check_latency,
    copy_in_eval_mode,
    latency_between,
    probe_json,
    reload_check,
    shown_latency,
)
from secateur.pipeline.config import CompressResult, CutStudent, Output, Plan
from secateur.pipeline.exports import Exports, Samples, deliver_exports
from secateur.pipeline.search_and_cut import describe_repair, within
from secateur.pipeline.workspace import run_directory_path
from secateur.prune.masks import nonzero_params
from secateur.report.graph_drawing import sizes_in_order
from secateur.report.html import write_report
from secateur.report.run import (
    BlockFate,
    Check,
    FrozenAxis,
    LayerWidth,
    Measured,
    RunReport,
    SearchEpoch,
    Step,
    TrainedEpoch,
)
from secateur.search.base import SearchResult
from secateur.train.fit import Trained

_NOTABLE = 0.1
"""Part of the MACs that must be gone before anybody expects a faster network."""
_PAID = 0.5
"""Part of that which the time must have fallen by."""
_ALIGNED = 8


def slow_because(cut_student: CutStudent, macs: float, record: LatencyRecord) -> tuple[str, ...]:
    """A sentence with the cause, if the MACs fell and the time did not; none otherwise.

    Args:
        cut_student: Widths, and what the search noted of the latency.
        macs: Of the student / of the original.
        record: Both, measured.
    """
    time = 1 / record.speedup.median
    if 1 - macs < _NOTABLE or 1 - time >= _PAID * (1 - macs):
        return ()
    said = (
        f"The MACs fell by {100 * (1 - macs):.0f} %, the time on {record.runtime} by {100 * (1 - time):.0f} % only "
        f"({record.threads} thread{'s' if record.threads > 1 else ''}, batch {record.batch_size})."
    )
    return (f"{said} {_cause(cut_student)}",)


def _cause(cut_student: CutStudent) -> str:
    widths = cut_student.search.architecture.widths
    odd = [name for name, width in widths.items() if width % _ALIGNED]
    if 4 * len(odd) > len(widths):
        return (
            f"{len(odd)} of {len(widths)} widths are no multiple of {_ALIGNED}, for which kernels are made: set a "
            "divisor (--divisor 8), or bound the latency, and the divisor is found by measuring (--budget latency=50%)."
        )
    noted = cut_student.search.notes.get("latency")
    parts = cast(Mapping[str, Mapping[str, float]], noted).get("parts", {}) if isinstance(noted, Mapping) else {}
    elsewhere = 1 - parts.get("layers", 1.0)
    if elsewhere > 0.4:
        return (
            f"About {100 * elsewhere:.0f} % of it is not spent in convolutions and linear layers, but in activations, "
            "sums and what every pass costs: fewer blocks (--remove-blocks) take that away, fewer channels hardly."
        )
    return (
        "Its layers are so small that what a layer costs whatever its width weighs most, or are bound by memory: fewer "
        "blocks (--remove-blocks), a larger batch or another runtime may gain more."
    )


@dataclass(frozen=True, eq=False)
class Finished:
    """A run whose computing is done.

    Attributes:
        plan: What was asked for.
        cut_student: Original, graph, search.
        student: The final model, on the device of the run.
        trained: The recovery, or None.
        steps: Test accuracy on the way, the original first and the student last.
        images: A few normalized training images, on the CPU.
        original_validation: Accuracy of the original on the validation images, a fraction; None without a recovery.
    """

    plan: Plan
    cut_student: CutStudent
    student: nn.Module
    trained: Trained | None
    steps: tuple[Step, ...]
    images: Tensor
    original_validation: float | None


def report_of(
    run: Finished, checks: tuple[Check, ...] = (), latency: tuple[LatencyRecord, ...] = (), notes: tuple[str, ...] = ()
) -> RunReport:
    """Every number of a run as plain data."""
    plan, cut_student = run.plan, run.cut_student
    provenance = Provenance.here(plan.run.command, plan.run.seed)
    sizes, widths, gone = (
        sizes_in_order(cut_student.graph),
        cut_student.search.architecture.widths,
        _gone_axes(cut_student),
    )
    history = () if run.trained is None else run.trained.history
    return RunReport(
        model=plan.name,
        data=f"{plan.data.name}: {len(plan.data.train)} training, {len(plan.data.validation)} validation and "
        f"{len(plan.data.test)} test images",
        strategy=cut_student.search.strategy,
        budget=str(plan.budget),
        choices=str(plan.cut),
        before=_measured(cut_student.original, cut_student.search.original.macs, run.steps[0]),
        after=_measured(run.student, cut_student.search.cost.macs, run.steps[-1]),
        latency=tuple(map(shown_latency, latency)),
        steps=run.steps,
        widths=tuple(
            LayerWidth(name, size, 0 if name in gone else widths.get(name, size)) for name, size in sizes.items()
        ),
        frozen=tuple(FrozenAxis(a.name, a.size, a.frozen_because) for a in cut_student.graph.axes if a.frozen_because),
        blocks=tuple(
            BlockFate(
                block.name, block.name in cut_student.search.architecture.removed_blocks, block.kept_because or ""
            )
            for block in cut_student.graph.blocks
        ),
        search=tuple(_in_order(epoch, sizes) for epoch in cut_student.search.history.epochs),
        stages=cut_student.search.history.stages,
        fairness=cut_student.search.history.fairness,
        macs_limit=_macs_limit(cut_student.search),
        training=tuple(
            TrainedEpoch(record.epoch, record.train_loss, record.validation_accuracy)
            for record in history
            if record.train_loss is not None
        ),
        original_validation_accuracy=run.original_validation,
        checks=(*_checks_of_the_cut(run), *checks),
        notes=(*notes, *_doubts(run), *map(describe_repair, cut_student.repairs)),
        command=provenance.command,
        seed=provenance.seed,
        versions=provenance.versions,
        machine=provenance.machine,
        date=provenance.date,
    )


def _in_order(epoch: SearchEpoch, sizes: Mapping[str, int]) -> SearchEpoch:
    """An epoch of a search with its axes in order of execution."""
    by_axis = {width.axis: width for width in epoch.widths}
    return replace(epoch, widths=tuple(by_axis[axis] for axis in sizes if axis in by_axis))


def _macs_limit(found: SearchResult) -> float | None:
    """The budget's bound on the MACs as a fraction of the original's."""
    limit = found.budget.limits(found.original).get("macs")
    return None if limit is None or not found.original.macs else limit / found.original.macs


def _gone_axes(cut_student: CutStudent) -> set[str]:
    """The axes of which nothing is left, because every layer that has them went with a block."""
    removed = cut_student.search.architecture.removed_blocks
    tensors = {tensor for name in removed for tensor in cut_student.graph.blocks_by_name[name].tensors}
    return {axis.name for axis in cut_student.graph.axes if all(site.tensor in tensors for site in axis.sites)}


def finalize(run: Finished) -> CompressResult:
    """Check the finished student, write what was asked for, and return it on the device of the caller's model."""
    plan, cut_student = run.plan, run.cut_student
    files: tuple[Path, ...] = ()
    folder: Path | None = None
    if not plan.fabric.is_global_zero:
        report = report_of(run, (), (), ())
    elif plan.output is None:
        latency, proof, notes = timed(run) if is_timed(plan.budget) else ((), (), ())
        report = report_of(run, proof, latency, notes)
    else:
        report, files = deliver(run, plan.output)
        folder = plan.output.folder
    home = next((p.device for p in plan.model.parameters()), torch.device("cpu"))
    return CompressResult(
        run.student.to(home), cut_student.graph, cut_student.search, cut_student.verification, run.trained, report,
        folder, files,
    )  # fmt: skip


def deliver(run: Finished, output: Output) -> tuple[RunReport, tuple[Path, ...]]:
    """Write the artifact, the exports and the report.

    Returns:
        The whole report, and the files in their final places.
    """
    with disk_errors(output.folder), atomic_folder(output.folder) as draft:
        save(draft, run.student, _recipe(run, output))
        checks = [reload_check(run.student, run.images, draft, _own_factory(run))]
        exports = deliver_exports(run.student, Samples(run.images, run.plan.data), draft, output.formats)
        latency, proof, notes = timed(run)
        checks += [*exports.checks, *proof]
        notes = (*notes, *exports.notes)
        report = replace(report_of(run, tuple(checks), latency, notes), exports=exports.shown)
        write_report(draft / "report.html", report)
        run_directory_path(output.folder).hand_on_history(draft)
        amend(draft, metrics=_metrics(run, report), verification=_verification(run, report, exports))
        names = sorted(path.name for path in draft.iterdir())
    for note in (*notes, *_doubts(run)):
        run.plan.log(f"Note: {note}")
    for check in report.checks:
        run.plan.log(f"{'Checked' if check.passed else 'FAILED'}: {check.name}. {check.detail}".rstrip())
    return report, tuple(output.folder / name for name in names)


def timed(run: Finished) -> tuple[tuple[LatencyRecord, ...], tuple[Check, ...], tuple[str, ...]]:
    """The times of both models: on the target first if the budget limits the latency there, which is then checked."""
    original, student, plan = run.cut_student.original, run.student, run.plan
    usual, notes = latency_between(original, student, run.images)
    macs = run.cut_student.search.cost.macs / max(run.cut_student.search.original.macs, 1)
    if not is_timed(plan.budget):
        return (
            usual,
            (),
            (*notes, *(cause for first in usual[:1] for cause in slow_because(run.cut_student, macs, first))),
        )
    record, check = check_latency(plan.budget, plan.target, original, student, run.images)
    # What was measured on the target is not measured twice.
    same = (record.runtime, record.threads, record.batch_size)
    others = (other for other in usual if (other.runtime, other.threads, other.batch_size) != same)
    return (record, *others), (check,), (*notes, *slow_because(run.cut_student, macs, record))


def _checks_of_the_cut(run: Finished) -> tuple[Check, ...]:
    cut_student, proof = run.cut_student, run.cut_student.verification
    found, params = cut_student.search, counted_params(run.student)
    macs = counted_macs(run.student, run.images[:1].to(run.plan.device))
    few, zeros = within(run.plan.budget, run.student, found.original)
    return (
        Check(
            "Sliced model = original with the removed channels zeroed",
            proof.max_rel <= proof.tolerance,
            proof.max_abs,
            proof.max_rel,
            proof.tolerance,
            f"in {proof.dtype}",
        ),
        Check(
            "Costs from the graph = costs counted on the cut model",
            (macs, params) == (found.cost.macs, found.cost.params),
            detail=f"counted {macs} MACs, {params} parameters; computed {found.cost.macs}, {found.cost.params}",
        ),
        Check(
            "Within the budget",
            found.budget.allows(found.cost, found.original) and few,
            detail=f"{found.budget}: {100 * found.cost.macs / max(found.original.macs, 1):.2f} % of the MACs, "
            f"{100 * found.cost.params / max(found.original.params, 1):.2f} % of the parameters{zeros}",
        ),
    )


def _recipe(run: Finished, output: Output) -> Recipe:
    plan, cut_student, source = run.plan, run.cut_student, output.source
    return Recipe(
        source={"kind": "factory", "name": type(plan.model).__qualname__} if source is None else source.to_json(),
        architecture=cut_student.search.architecture,
        edits=_edits(plan, run.student, output),
        input_shape=plan.data.size,
        mean=plan.data.mean,
        std=plan.data.std,
        classes=plan.data.classes,
        cost_before=cut_student.search.original.to_json(),
        cost_after=cut_student.search.cost.to_json(),
        provenance=Provenance.here(plan.run.command, plan.run.seed),
    )


def _edits(plan: Plan, student: nn.Module, output: Output) -> tuple[Edit, ...]:
    # Against the model as its source builds it: the model that was given may be a cut one already.
    pristine = plan.model if output.source is None else output.source.build(trust_source=True)
    return edits_between(pristine, student)


def _doubts(run: Finished) -> tuple[str, ...]:
    """What a reader must know before believing the rest."""
    found: list[str] = []
    if run.plan.cut.weight_pruning is not None:
        found.append(
            "Weights at zero make the file smaller, not the network faster: ordinary runtimes compute with them as "
            "with any number. What is faster is so for its cut channels."
        )
    first, chance = run.steps[0].accuracy, 1 / len(run.plan.data.classes)
    if first.top1 <= 2 * chance:
        found.append(
            f"The original is right on {100 * first.top1:.1f} % of the test images, about what guessing gives "
            f"({100 * chance:.1f} %). Check its weights (--weights) and normalization (--mean, --std)."
        )
    if run.trained is not None and run.trained.best_epoch == 0 and run.plan.cut.weight_pruning is None:
        found.append(
            "No epoch was better on the validation images than the student before training, which is kept. If the "
            "original was trained on these images, they favor the student that has changed least."
        )
    return tuple(found)


def _own_factory(run: Finished) -> Callable[[], nn.Module] | None:
    """Builds the original where the artifact does not name how."""
    output = run.plan.output
    own = output is not None and output.source is None
    return (lambda: copy_in_eval_mode(run.plan.model)) if own else None


def _metrics(run: Finished, report: RunReport) -> dict[str, object]:
    trained = run.trained
    return {
        "test_accuracy": [{"step": s.name, "top1": s.accuracy.top1, "n": s.accuracy.n} for s in report.steps],
        "size_bytes": {"before": report.before.size_bytes, "after": report.after.size_bytes},
        "nonzero": {"before": report.before.nonzero, "after": report.after.nonzero},
        "performance_efficiency": None if report.efficiency is None else list(report.efficiency),
        "pruning": None if run.plan.cut.weight_pruning is None else repr(run.plan.cut.weight_pruning),
        "latency": [asdict(latency) for latency in report.latency],
        "history": [] if trained is None else [record.to_json() for record in trained.history],
        "best_epoch": None if trained is None else trained.best_epoch,
        "repairs": [asdict(repair) for repair in run.cut_student.repairs],
        "search": {"strategy": report.strategy, "budget": report.budget, **run.cut_student.search.notes},
        "choices": asdict(run.plan.cut.selection),
        "heads": run.plan.cut.heads.value,
        "branches": run.plan.cut.branches.value,
        "space": asdict(run.plan.cut.space),
    }


def _verification(run: Finished, report: RunReport, exports: Exports) -> dict[str, object]:
    return {
        **exports.to_json(),
        "checks": [asdict(check) for check in report.checks],
        "probe": probe_json(copy_in_eval_mode(run.student).cpu(), run.plan.data.size),
    }


def _measured(model: nn.Module, macs: int, step: Step) -> Measured:
    return Measured(macs, counted_params(model), weights_bytes(model), step.accuracy, nonzero_params(model))
