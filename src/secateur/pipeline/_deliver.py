"""The last part of a run: check, write and export, all in a draft folder that appears whole or not at all."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from secateur.artifact import Edit, Provenance, Recipe, amend, atomic_folder, edits_between, save, weights_bytes
from secateur.cost import counted_macs, counted_params
from secateur.latency import LatencyRecord
from secateur.pipeline._checks import copied, latency_between, on_time, reload_check, shown_latency
from secateur.pipeline._disk import told_of_disk
from secateur.pipeline._export import Samples
from secateur.pipeline._export_checks import Exports, deliver_exports
from secateur.pipeline._halfway import describe_healing
from secateur.pipeline._plan import Delivery, Plan
from secateur.pipeline._probe import probe_json
from secateur.pipeline._result import Halfway
from secateur.pipeline._searched import fairness, judged_stages, search_epochs
from secateur.pipeline._slow import slow_because
from secateur.cost._budget import is_timed
from secateur.pipeline._work import workplace_of
from secateur.pipeline._zeros import within
from secateur.report import (
    BlockFate,
    Check,
    FrozenAxis,
    LayerWidth,
    Measured,
    RunReport,
    Step,
    TrainedEpoch,
    sizes_in_order,
    write_report,
)
from secateur.search import Found
from secateur.sparsity import nonzero_params
from secateur.train import Trained


@dataclass(frozen=True, eq=False)
class Finished:
    """A run whose computing is done.

    Attributes:
        plan: What was asked for.
        half: Original, graph, search.
        student: The final model, on the device of the run.
        trained: The recovery, or None.
        steps: Test accuracy on the way, the original first and the student last.
        images: A few normalised training images, on the CPU.
        original_validation: Accuracy of the original on the validation images, a fraction; None without a recovery.
    """

    plan: Plan
    half: Halfway
    student: nn.Module
    trained: Trained | None
    steps: tuple[Step, ...]
    images: Tensor
    original_validation: float | None


def report_of(
    run: Finished, checks: tuple[Check, ...] = (), latency: tuple[LatencyRecord, ...] = (), notes: tuple[str, ...] = ()
) -> RunReport:
    """Every number of a run as plain data."""
    plan, half = run.plan, run.half
    provenance = Provenance.here(plan.command, plan.seed)
    sizes, widths, gone = sizes_in_order(half.graph), half.found.architecture.widths, _gone_axes(half)
    history = () if run.trained is None else run.trained.history
    return RunReport(
        model=plan.name,
        data=f"{plan.data.name}: {len(plan.data.train)} training, {len(plan.data.validation)} validation and "
        f"{len(plan.data.test)} test images",
        strategy=half.found.strategy,
        budget=str(plan.budget),
        choices=plan.chosen,
        before=_measured(half.original, half.found.original.macs, run.steps[0]),
        after=_measured(run.student, half.found.cost.macs, run.steps[-1]),
        latency=tuple(map(shown_latency, latency)),
        steps=run.steps,
        widths=tuple(
            LayerWidth(name, size, 0 if name in gone else widths.get(name, size)) for name, size in sizes.items()
        ),
        frozen=tuple(FrozenAxis(a.name, a.size, a.frozen_because) for a in half.graph.axes if a.frozen_because),
        blocks=tuple(
            BlockFate(block.name, block.name in half.found.architecture.removed_blocks, block.kept_because or "")
            for block in half.graph.blocks
        ),
        search=search_epochs(half.found.notes, sizes),
        stages=judged_stages(half.found.notes, half.found.original.macs),
        fairness=fairness(half.found.notes),
        macs_limit=_macs_limit(half.found),
        training=tuple(
            TrainedEpoch(record.epoch, record.train_loss, record.validation_accuracy)
            for record in history
            if record.train_loss is not None
        ),
        original_validation_accuracy=run.original_validation,
        checks=(*_checks_of_the_cut(run), *checks),
        notes=(*notes, *_doubts(run), *map(describe_healing, half.healing)),
        command=provenance.command,
        seed=provenance.seed,
        versions=provenance.versions,
        machine=provenance.machine,
        date=provenance.date,
    )


def _macs_limit(found: Found) -> float | None:
    """The budget's bound on the MACs as a fraction of the original's."""
    limit = found.budget.limits(found.original).get("macs")
    return None if limit is None or not found.original.macs else limit / found.original.macs


def _gone_axes(half: Halfway) -> set[str]:
    """The axes of which nothing is left, because every layer that has them went with a block."""
    removed = half.found.architecture.removed_blocks
    tensors = {tensor for name in removed for tensor in half.graph.blocks_by_name[name].tensors}
    return {axis.name for axis in half.graph.axes if all(site.tensor in tensors for site in axis.sites)}


def deliver(run: Finished, delivery: Delivery) -> tuple[RunReport, tuple[Path, ...]]:
    """Write the artifact, the exports and the report.

    Returns:
        The whole report, and the files in their final places.
    """
    tell = run.plan.tell
    with told_of_disk(delivery.folder), atomic_folder(delivery.folder) as draft:
        save(draft, run.student, _recipe(run, delivery))
        checks = [reload_check(run.student, run.images, draft, _own_factory(run))]
        exports = deliver_exports(run.student, Samples(run.images, run.plan.data), draft, delivery.formats)
        latency, proof, notes = timed(run)
        checks += [*exports.checks, *proof]
        notes = (*notes, *exports.notes)
        report = replace(report_of(run, tuple(checks), latency, notes), exports=exports.shown)
        write_report(draft / "report.html", report)
        workplace_of(delivery.folder).hand_on_history(draft)
        amend(draft, metrics=_metrics(run, report), verification=_verification(run, report, exports))
        names = sorted(path.name for path in draft.iterdir())
    for note in (*notes, *_doubts(run)):
        tell(f"Note: {note}")
    for check in report.checks:
        tell(f"{'Checked' if check.passed else 'FAILED'}: {check.name}. {check.detail}".rstrip())
    return report, tuple(delivery.folder / name for name in names)


def timed(run: Finished) -> tuple[tuple[LatencyRecord, ...], tuple[Check, ...], tuple[str, ...]]:
    """The times of both models: on the target first if the budget limits the latency there, which is then checked."""
    original, student, plan = run.half.original, run.student, run.plan
    usual, notes = latency_between(original, student, run.images)
    macs = run.half.found.cost.macs / max(run.half.found.original.macs, 1)
    if not is_timed(plan.budget):
        return usual, (), (*notes, *(cause for first in usual[:1] for cause in slow_because(run.half, macs, first)))
    record, check = on_time(plan.budget, plan.target, original, student, run.images)
    # What was measured on the target is not measured twice.
    same = (record.runtime, record.threads, record.batch_size)
    others = (other for other in usual if (other.runtime, other.threads, other.batch_size) != same)
    return (record, *others), (check,), (*notes, *slow_because(run.half, macs, record))


def _checks_of_the_cut(run: Finished) -> tuple[Check, ...]:
    half, proof = run.half, run.half.verification
    found, params = half.found, counted_params(run.student)
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


def _recipe(run: Finished, delivery: Delivery) -> Recipe:
    plan, half, source = run.plan, run.half, delivery.source
    return Recipe(
        source={"kind": "factory", "name": type(plan.model).__qualname__} if source is None else source.to_json(),
        architecture=half.found.architecture,
        edits=_edits(plan, run.student, delivery),
        input_shape=plan.data.size,
        mean=plan.data.mean,
        std=plan.data.std,
        classes=plan.data.classes,
        cost_before=half.found.original.to_json(),
        cost_after=half.found.cost.to_json(),
        provenance=Provenance.here(plan.command, plan.seed),
    )


def _edits(plan: Plan, student: nn.Module, delivery: Delivery) -> tuple[Edit, ...]:
    # Against the model as its source builds it: the model that was given may be a cut one already.
    pristine = plan.model if delivery.source is None else delivery.source.build(trust_source=True)
    return edits_between(pristine, student)


def _doubts(run: Finished) -> tuple[str, ...]:
    """What a reader must know before believing the rest."""
    found: list[str] = []
    if run.plan.pruning is not None:
        found.append(
            "Weights at zero make the file smaller, not the network faster: ordinary runtimes compute with them as "
            "with any number. What is faster is so for its cut channels."
        )
    first, chance = run.steps[0].accuracy, 1 / len(run.plan.data.classes)
    if first.top1 <= 2 * chance:
        found.append(
            f"The original is right on {100 * first.top1:.1f} % of the test images, about what guessing gives "
            f"({100 * chance:.1f} %). Check its weights (--weights) and normalisation (--mean, --std)."
        )
    if run.trained is not None and run.trained.best_epoch == 0 and run.plan.pruning is None:
        found.append(
            "No epoch was better on the validation images than the student before training, which is kept. If the "
            "original was trained on these images, they favour the student that has changed least."
        )
    return tuple(found)


def _own_factory(run: Finished) -> Callable[[], nn.Module] | None:
    """Builds the original where the artifact does not name how."""
    delivery = run.plan.delivery
    own = delivery is not None and delivery.source is None
    return (lambda: copied(run.plan.model)) if own else None


def _metrics(run: Finished, report: RunReport) -> dict[str, object]:
    trained = run.trained
    return {
        "test_accuracy": [{"step": s.name, "top1": s.accuracy.top1, "n": s.accuracy.n} for s in report.steps],
        "size_bytes": {"before": report.before.size_bytes, "after": report.after.size_bytes},
        "nonzero": {"before": report.before.nonzero, "after": report.after.nonzero},
        "performance_efficiency": None if report.efficiency is None else list(report.efficiency),
        "pruning": None if run.plan.pruning is None else repr(run.plan.pruning),
        "latency": [asdict(latency) for latency in report.latency],
        "history": [] if trained is None else [record.to_json() for record in trained.history],
        "best_epoch": None if trained is None else trained.best_epoch,
        "healing": [asdict(repair) for repair in run.half.healing],
        "search": {"strategy": report.strategy, "budget": report.budget, **run.half.found.notes},
        "choices": asdict(run.plan.choices),
        "heads": run.plan.heads.value,
        "branches": run.plan.branches.value,
        "space": asdict(run.plan.space),
    }


def _verification(run: Finished, report: RunReport, exports: Exports) -> dict[str, object]:
    return {
        **exports.to_json(),
        "checks": [asdict(check) for check in report.checks],
        "probe": probe_json(copied(run.student).cpu(), run.plan.data.size),
    }


def _measured(model: nn.Module, macs: int, step: Step) -> Measured:
    return Measured(macs, counted_params(model), weights_bytes(model), step.accuracy, nonzero_params(model))
