"""Compress a model: a trained network and a budget go in, a smaller verified one comes out."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from secateur._batches import batch_length, call_model, float_tensors, move, take, targets_of, with_targets
from secateur._caller_state import in_default_state
from secateur._provenance import warn_outside_window
from secateur._runtime import copy_model
from secateur.cost.budget import Budget, limits_latency
from secateur.cost.denormals import count_denormals, flush_denormals_
from secateur.cost.macs import count_macs, count_params
from secateur.cost.runtimes import OnnxRuntime, Target
from secateur.data.dataset import ImageData, draw_calibration
from secateur.data.loaders import BatchSplit, ItemSplit, OwnData, evaluation_batch, run_data
from secateur.distill.taps import AlignedFeatures
from secateur.errors import TrainingError
from secateur.export.formats import Format
from secateur.graph.graph import StandIn
from secateur.models.source import ModelSource
from secateur.pipeline.config import (
    CompressResult,
    CutConfig,
    CutStudent,
    Plan,
    RecoveryConfig,
    RunConfig,
    safe_config,
    strategy_of_run,
)
from secateur.pipeline.evidence import layer_sensitivity, measured_step, with_pairs
from secateur.pipeline.exports import checked_output
from secateur.pipeline.finalize import Finished, data_doubts, finalize, measured_model, report_of
from secateur.pipeline.search_and_cut import (
    ImageBatches,
    describe_repair,
    search_and_cut,
    with_zeros,
    within,
    zeros_for,
)
from secateur.pipeline.workspace import (
    RunDirectory,
    check_has_weights,
    check_model_fits_data,
    check_own_loop,
    fabric_for,
    first_alone,
    shared_run_directory,
)
from secateur.prune.masks import nonzero_params
from secateur.prune.weight_pruning import Sparsify, WeightPruning, WeightScore
from secateur.report.graph_layers import axis_sizes_in_order, macs_of_layers
from secateur.report.pictures import example_pictures
from secateur.report.run import BlockFate, Check, FrozenAxis, LayerCost, LayerWidth, RunReport, SearchEpoch, Step
from secateur.search.base import Strategy
from secateur.search.candidates import describe_choice
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification, check_labels
from secateur.tasks.imitation import Imitation
from secateur.train.callbacks import Silent
from secateur.train.config import RunSettings
from secateur.train.evaluate import evaluate
from secateur.train.fit import Trained, train_with_teacher
from secateur.train.own_loop import Recover, recover_with


@in_default_state
def compress(
    model: nn.Module,
    data: Any,
    budget: Budget | str,
    *,
    task: Task = Classification(),  # noqa: B008 - frozen
    strategy: Strategy | None = None,
    cut: CutConfig = CutConfig(),  # noqa: B008 - frozen
    recovery: RecoveryConfig | Recover = RecoveryConfig(),  # noqa: B008 - frozen
    target: Target = OnnxRuntime(),  # noqa: B008 - frozen
    out: Path | str | None = None,
    export: str | Sequence[Format | str] = (Format.ONNX,),
    source: ModelSource | None = None,
    run: RunConfig = RunConfig(),  # noqa: B008 - frozen
) -> CompressResult:
    """Find which channels to keep, cut, repair, recover accuracy by distillation, verify, and write the artifact.

    Nothing is chosen on the test split: its accuracy is measured for the report. Everything is checked before it is
    written: sliced equals masked, costs equal counted ones, a reloaded artifact gives the same bits, exported files
    agree with the model. Every step is logged to the logger ``secateur`` at level INFO.

    Args:
        model: A trained model; not changed.
        data: Training, validation and test images, see `secateur.load_data`; or a Dataset, a DataLoader or a list of
            batches of your own, or (train, validation) or (train, validation, test) of these, see
            `secateur.data.own_data`.
        budget: Upper bounds on the cost, such as ``"macs=50%"``; ``"nonzero=20%"`` bounds the parameters that are not
            zero, by pruning single weights while the student recovers, after the channels were cut to the other bounds.
        task: What outputs and targets mean, see `secateur.tasks`. `Imitation` needs no labels.
        strategy: How the architecture is found; None means `Fastest`: the networks of several strategies are compared.
            Where the budget limits the latency it means `RemoveBlocks` around `Knapsack`, as blocks take time that
            narrower layers hardly save. If ``cut.space`` has no divisor, the networks of several are compared too,
            unless the strategy trains. With both given, nothing is compared.
        cut: What may be cut, and how the cut model is made.
        recovery: How the cut model regains accuracy; or a training loop of your own, a function that takes (student,
            teacher, data, context) and returns the student, see `secateur.train.Recover`.
        target: The runtime, threads and batch size that candidates are compared on and that the latency in the report
            is for, see `secateur.cost`. A bound on latency is met by predicting from a table of layers, then measuring
            and correcting until the network is within the bound, and measuring again at the end; if ``cut.space`` has
            no divisor, 8, 16 and 32 are tried.
        out: Folder for the artifact, the exports and the report; None writes nothing. The folder appears whole at the
            end. Until then the work lies in ``<out>.work``, from which an interrupted run is resumed, also in the
            middle of a search or training of hours.
        export: Files for other runtimes, such as ``"onnx,int8"``; only with ``out``.
        source: How the original is built, so that the artifact can be loaded without its code; see
            `secateur.load_model`. Without it, loading needs ``factory=``.
        run: Seed, device, callbacks, checkpoints, and what to do with an unfinished run at the same ``out``.

    Returns:
        The compressed model and everything that was measured. Of several processes, every one returns the model, and
        only the first what was written.

    Raises:
        SecateurError: One of its subclasses, with the way out, if anything cannot be used; nothing half-written is
            left then.
    """
    recovery = recovery if isinstance(recovery, RecoveryConfig) else RecoveryConfig(recover=recovery)
    output = checked_output(out, export, model, source=source, name=type(model).__qualname__, run=run)
    limits = Budget.parse(budget) if isinstance(budget, str) else budget
    fabric = fabric_for(run.fabric, recovery.train.precision, run.device, None if output is None else output.folder)
    if fabric.is_global_zero:
        warn_outside_window()
    check_own_loop(recovery.recover, fabric, limits)
    if recovery.train.epochs and recovery.recover is None:
        recovery.execution.check(fabric)  # A search of hours would otherwise end with this error.
    check_has_weights(model)
    images = run_data(data, run.seed)
    cut = replace(
        cut,
        init=cut.init.settled(trains=recovery.trains),
        calibration_images=min(cut.calibration_images, len(images.train)),
        weight_pruning=with_task(_weight_pruning(limits, cut.weight_pruning), task),
    )
    plan = Plan(
        model=model,
        data=images,
        task=task,
        budget=limits,
        strategy=with_task(strategy_of_run(strategy, limits, cut.space, target), task),
        cut=cut,
        recovery=_recovery_for(task, images, recovery, run.seed),
        target=target,
        output=output,
        run=run if fabric.is_global_zero else replace(run, callbacks=Silent()),
        fabric=fabric,
    )
    batches = draw_calibration(images.train, cut.calibration_images, device=fabric.device, seed=run.seed)
    original = copy_model(model).to(fabric.device).eval()
    check_model_fits_data(original, images, batches[0][0], task, batches[0][1])
    batches = _labeled(task, images, batches)
    cut.init.check(original, recovery.train)
    with shared_run_directory(
        fabric, None if output is None else output.folder, plan.settings(), run.on_existing
    ) as work:
        if work is not None:
            plan = replace(plan, run=replace(plan.run, callbacks=work.logged(plan.run.callbacks)))
        if cut.flush_denormals:
            _flush_denormals_(plan, original, batches[0][0])
        if output is not None and source is None:
            plan.log(
                "The artifact will need factory=, a function that builds the original, to be loaded: no `source` was "
                "given that says how."
            )
        steps = [_measured(plan, "original", original)]
        task.observe_(original)
        with first_alone(fabric):
            cut_student = search_and_cut(plan, original, batches, work)
        for each in (cut_student.original, cut_student.student):
            task.unobserve_(each)
        trained, student = _recover(plan, cut_student, batches, work, steps)
        finished = _finished(
            plan,
            cut_student,
            trained,
            student=student,
            steps=tuple(steps),
            images=move(batches[0][0], torch.device("cpu")),
        )
        report, folder, files = finalize(finished)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return CompressResult(
        model=student.to(device),
        graph=cut_student.graph,
        search=cut_student.search,
        verification=cut_student.verification,
        trained=trained,
        report=report,
        folder=folder,
        files=files,
        described=cut_student.described,
    )


def _recovery_for(task: Task, data: ImageData | OwnData, recovery: RecoveryConfig, seed: int) -> RecoveryConfig:
    """The recovery with the batches of the user's loader, and without labels where the task has none."""
    train, objective = safe_config(recovery.train, seed), recovery.objective
    if isinstance(data.train, ItemSplit | BatchSplit) and data.train.batch_size is not None:
        train = replace(train, batch_size=data.train.batch_size)
    if isinstance(task, Imitation):
        objective = replace(objective, label_weight=0.0, kd_weight=objective.kd_weight or 1.0)
    return replace(recovery, train=train, objective=objective)


def _labeled(
    task: Task, data: ImageData | OwnData, batches: Sequence[tuple[Any, Any]]
) -> tuple[tuple[Any, Tensor], ...]:
    """The batches with labels or targets that importances and searches can learn from; -1, no class, without any."""
    if isinstance(task, Classification):
        classes = len(data.classes) or 2**31
        for _, labels in batches:
            check_labels(labels, classes)
        return tuple(batches)
    if not isinstance(task, Imitation):
        for inputs, targets in batches:
            task.check_targets(inputs, targets)
    return tuple(
        (inputs, torch.full((batch_length(inputs),), -1)) if targets is None else with_targets(inputs, targets)
        for inputs, targets in batches
    )


Configured = TypeVar("Configured")


def with_task(config: Configured, task: Task) -> Configured:
    """Return a strategy or a pruning whose parts, however deep, have the task of the run.

    Args:
        config: A frozen dataclass. Its fields named ``task`` get the task, and scores of weights its loss, unless they
            have a loss already; fields that are configurations too are searched. The same object if nothing changes.
        task: The task of the run.
    """
    if isinstance(task, Classification) or not is_dataclass(config) or isinstance(config, type | Task):
        return config
    changes: dict[str, Any] = {}
    for each in fields(config):
        value = getattr(config, each.name)
        if each.name == "task" and isinstance(value, Task):
            changes[each.name] = task
        elif each.name == "loss" and value is None and isinstance(config, WeightScore):
            changes[each.name] = task.loss
        elif isinstance(value, tuple):
            items = cast("tuple[Any, ...]", value)
            made = [with_task(item, task) for item in items]
            if any(new is not old for new, old in zip(made, items, strict=True)):
                changes[each.name] = tuple(made)
        elif each.init and (new := with_task(value, task)) is not value:
            changes[each.name] = new
    return replace(config, **changes) if changes else config


def _flush_denormals_(plan: Plan, original: nn.Module, images: Any) -> None:
    """Set the denormal numbers of the original to 0, and say what that changes."""
    found = count_denormals(original)
    with torch.no_grad():
        before = torch.cat([t.double().flatten() for t in float_tensors(call_model(original, images))])
        flush_denormals_(original)
        after = torch.cat([t.double().flatten() for t in float_tensors(call_model(original, images))])
    largest = float((after - before).abs().max()) if after.shape == before.shape else float("inf")
    plan.log(
        f"Set {sum(found.counts.values())} denormal numbers to 0 ({100 * found.fraction:.3g} % of all); outputs change "
        f"by at most {largest:.2g} ({largest / max(float(before.abs().max()), 1e-30):.1g} of the largest)."
    )


def _weight_pruning(budget: Budget, pruning: WeightPruning | None) -> WeightPruning | None:
    """How single weights are pruned; None if the budget does not ask for it."""
    if budget.nonzero is None:
        if pruning is not None:
            warnings.warn("`weight_pruning` has no effect: the budget does not bound `nonzero`.", stacklevel=3)
        return None
    return pruning or WeightPruning()


def _recover(
    plan: Plan, cut_student: CutStudent, batches: ImageBatches, work: RunDirectory | None, steps: list[Step]
) -> tuple[Trained | None, nn.Module]:
    """Train the cut student, by the user's own loop if there is one, with single weights at zero if the budget says so.

    Returns:
        The training or None, and the final student.
    """
    student = cut_student.student
    steps.append(_measured(plan, plan.cut.init.done, student))
    if plan.recovery.recover is not None:
        student = recover_with(
            plan.recovery.recover,
            student,
            teacher=cut_student.original,
            data=plan.data,
            task=plan.task,
            device=plan.device,
            seed=plan.run.seed,
            folder=None if work is None else work.own_loop,
            example=batches[0][0],
        )
        steps.append(_measured(plan, "recovered", student))
        return None, student
    zeros = zeros_for(plan, cut_student, [(inputs, targets_of(labels)) for inputs, labels in batches])
    trained = _train(plan, cut_student, work, zeros)
    if trained is not None and (trained.best_epoch > 0 or zeros is not None):
        student = trained.model
        done = ("weights pruned and " if zeros else "") + "distilled" if trained.best_epoch else "weights pruned"
        steps.append(_measured(plan, done, student))
    elif zeros is not None:
        student = zeros.start(student, 0)
        steps.append(_measured(plan, "weights pruned", student))
    if zeros is not None:
        student = with_zeros(student)
    return trained, student.eval()


def _train(plan: Plan, cut_student: CutStudent, work: RunDirectory | None, zeros: Sparsify | None) -> Trained | None:
    recovery = plan.recovery
    if recovery.train.epochs == 0:
        return None
    objective, alignment = recovery.objective, None
    stages = _comparable(cut_student)
    if objective.feature_weight and stages:
        alignment = AlignedFeatures.of(cut_student.graph, cut_student.search.architecture, modules=stages)
    elif objective.feature_weight:
        plan.log("The model has no module whose features could be compared: distilling from the logits alone.")
        objective = replace(objective, feature_weight=0.0)
    return train_with_teacher(
        cut_student.student,
        teacher=cut_student.original,
        data=plan.data,
        train=recovery.train,
        objective=objective,
        alignment=alignment,
        sparsify=zeros,
        task=plan.task,
        run=RunSettings(
            folder=None if work is None else work.checkpoint,
            checkpoints=plan.run.checkpoints,
            execution=recovery.execution,
            callbacks=plan.run.callbacks,
            fabric=plan.fabric,
        ),
    )


def _comparable(cut_student: CutStudent) -> tuple[str, ...]:
    """The last module at each resolution, where its features in the student mean what they mean in the original.

    Inside of a removed block they do not. A module that is a removed block as a whole, the sum included, returns its
    input, which is what the original's gives when the branch adds nothing.
    """
    graph = cut_student.graph
    removed = [graph.blocks_by_name[name] for name in cut_student.search.architecture.removed_blocks]
    inside = {module for block in removed for module in block.modules}
    passing = {
        block.replacements[0].module
        for block in removed
        if len(block.replacements) == 1 and block.replacements[0].stand_in is StandIn.PASS_THROUGH
    }
    # A removed block takes modules without weights along, which are not listed among its modules.
    left = {name for name, _ in cut_student.student.named_modules()}
    return tuple(stage for stage in graph.stages if stage in left and (stage not in inside or stage in passing))


def _finished(
    plan: Plan,
    cut_student: CutStudent,
    trained: Trained | None,
    *,
    student: nn.Module,
    steps: tuple[Step, ...],
    images: Any,
) -> Finished:
    """The run as `finalize` takes it."""
    search, cut = cut_student.search, plan.cut
    uncounted = filter(None, (cut_student.graph.uncounted_text,))
    own = plan.data.notes if isinstance(plan.data, OwnData) else ()
    stale = filter(None, (cut_student.described.warning,))
    doubts = (*uncounted, *own, *_doubts(plan, steps[0], trained))
    said = (*stale, *_chance_of_epoch(plan, trained))
    report = _report(plan, cut_student, trained, student, steps)
    if plan.output is not None and plan.fabric.is_global_zero:
        few = move(take(images, slice(32)), plan.device)
        sensitive = layer_sensitivity(cut_student.original, cut_student.graph, search.architecture, few)
        report = replace(with_pairs(report, plan.data), sensitivity=sensitive)
    return Finished(
        report=replace(
            report,
            warnings=doubts,
            checks=_checks(plan, cut_student, student, images),
            pictures=example_pictures(plan.task, plan.data, plan.model, student) if plan.output is not None else (),
            notes=(*doubts, *said, *describe_choice(search.notes), *map(describe_repair, cut_student.repairs)),
        ),
        original=cut_student.original,
        student=student,
        given=plan.model,
        trained=trained,
        images=images,
        data=plan.data,
        architecture=search.architecture,
        costs=(search.original.to_json(), search.cost.to_json()),
        output=plan.output,
        run=plan.run,
        fabric=plan.fabric,
        log=plan.log,
        target=plan.target,
        latency_bound=plan.budget if limits_latency(plan.budget) else None,
        search=search,
        doubts=(*doubts, *said),
        metrics={
            "nonzero": {"before": nonzero_params(cut_student.original), "after": nonzero_params(student)},
            "pruning": None if cut.weight_pruning is None else repr(cut.weight_pruning),
            # These keys keep the spelling of the first release: scripts read them.
            "healing": [
                {"healer": result.repair, "before": result.before, "after": result.after, "kept": result.kept}
                for result in cut_student.repairs
            ],
            "search": {"strategy": search.strategy, "budget": str(plan.budget), **_stored_notes(search.notes)},
            "choices": asdict(cut.selection),
            "heads": cut.heads.value,
            "branches": cut.branches.value,
            "space": asdict(cut.space),
        },
    )


def _stored_notes(notes: Mapping[str, object]) -> dict[str, object]:
    """The notes of a search under the keys of secateur.json."""
    return {
        {"utilization": "utilisation", "repaired": "healed"}.get(name, name): value for name, value in notes.items()
    }


def _report(
    plan: Plan, cut_student: CutStudent, trained: Trained | None, student: nn.Module, steps: tuple[Step, ...]
) -> RunReport:
    """Every number of the run itself."""
    graph, search = cut_student.graph, cut_student.search
    sizes, widths, removed = axis_sizes_in_order(graph), search.architecture.widths, search.architecture.removed_blocks
    # Of an axis nothing is left if every layer that has it went with a block.
    tensors = {tensor for name in removed for tensor in graph.blocks_by_name[name].tensors}
    gone = {axis.name for axis in graph.axes if all(site.tensor in tensors for site in axis.sites)}
    limit = search.budget.limits(search.original).get("macs")
    measured = (
        measured_model(cut_student.original, search.original.macs, steps[0]),
        measured_model(student, search.cost.macs, steps[-1]),
    )
    common = report_of(
        plan.name, plan.data, measured, strategy=search.strategy, steps=steps, trained=trained, run=plan.run
    )
    return replace(
        common,
        budget=f"{plan.budget}{' of the counted MACs' if graph.uncounted and limit is not None else ''}",
        choices=str(plan.cut),
        widths=tuple(
            LayerWidth(name, size, 0 if name in gone else widths.get(name, size)) for name, size in sizes.items()
        ),
        layers=tuple(LayerCost(name, macs) for name, macs in macs_of_layers(graph, search.architecture).items()),
        frozen=tuple(
            FrozenAxis(axis.name, axis.size, axis.frozen_because) for axis in graph.axes if axis.frozen_because
        ),
        blocks=tuple(BlockFate(b.name, b.name in removed, b.kept_because or "") for b in graph.blocks),
        search=tuple(_in_order(epoch, sizes) for epoch in search.history.epochs),
        stages=search.history.stages,
        fairness=search.history.fairness,
        macs_limit=None if limit is None or not search.original.macs else limit / search.original.macs,
        original_validation_score=_validated(plan, cut_student, trained),
    )


def _in_order(epoch: SearchEpoch, sizes: Mapping[str, int]) -> SearchEpoch:
    """An epoch of a search with its axes in order of execution."""
    by_axis = {width.axis: width for width in epoch.widths}
    return replace(epoch, widths=tuple(by_axis[axis] for axis in sizes if axis in by_axis))


def _validated(plan: Plan, cut_student: CutStudent, trained: Trained | None) -> float | None:
    """Score of the original on the validation images, which the report draws beside that of the epochs."""
    if trained is None or not len(plan.data.validation) or isinstance(plan.task, Imitation):
        return None
    batch = evaluation_batch(plan.data, plan.recovery.train.batch_size)
    return evaluate(
        cut_student.original, plan.data.validation, task=plan.task, batch_size=batch, device=plan.device
    ).value


def _checks(plan: Plan, cut_student: CutStudent, student: nn.Module, images: Any) -> tuple[Check, ...]:
    """Sliced equals masked, costs equal counted ones, and the budget holds."""
    proof, search, params = cut_student.verification, cut_student.search, count_params(student)
    macs = count_macs(student, move(take(images, slice(1)), plan.device))
    few, zeros = within(plan.budget, student, search.original)
    return (
        Check(
            "Sliced model = original with the removed channels zeroed",
            proof.max_rel <= proof.tolerance,
            proof.max_abs,
            proof.max_rel,
            proof.tolerance,
            proof.summary,
        ),
        Check(
            "Costs from the graph = costs counted on the cut model",
            (macs, params) == (search.cost.macs, search.cost.params),
            detail=f"counted {macs} MACs, {params} parameters; computed {search.cost.macs}, {search.cost.params}",
        ),
        Check(
            "Within the budget",
            search.budget.allows(search.cost, search.original) and few,
            detail=f"{search.budget}: {100 * search.cost.macs / max(search.original.macs, 1):.2f} % of the MACs, "
            f"{100 * search.cost.params / max(search.original.params, 1):.2f} % of the parameters{zeros}",
        ),
    )


def _doubts(plan: Plan, original: Step, trained: Trained | None) -> tuple[str, ...]:
    """What a reader must know before believing the rest."""
    found: list[str] = []
    if plan.cut.weight_pruning is not None:
        found.append(
            "Weights at zero make the file smaller, not the network faster: ordinary runtimes compute with them as "
            "with any number. What is faster is so for its cut channels."
        )
    found += data_doubts("original", original, plan.data)
    denormals = count_denormals(plan.model)
    if denormals.notable and not plan.cut.flush_denormals:
        found.append(
            f"{denormals}. Its times above are those without them, so that the cut does not get the credit; "
            "--flush-denormals sets them to 0."
        )
    if trained is not None:
        found += trained.divergences
    if trained is not None and trained.gave_up:
        found.append("Nothing of a training that was given up is kept but an epoch better than its beginning.")
    elif trained is not None and trained.best_epoch == 0 and plan.cut.weight_pruning is None:
        found.append(
            f"Training did not help: no epoch was better on the {len(plan.data.validation)} validation images than the "
            "repaired network, which is kept. Try a lower learning rate, more epochs or more images. If the original "
            "was trained on the validation images, they favor the network that has changed least."
        )
    return tuple(found)


_FEW_VALIDATION_IMAGES = 100
"""With fewer, the best of some epochs is the luckiest one: the deviation of an accuracy of 90 % is 3 points then."""


def _chance_of_epoch(plan: Plan, trained: Trained | None) -> tuple[str, ...]:
    """A sentence if few validation images chose between epochs; none otherwise."""
    count = len(plan.data.validation)
    if trained is None or plan.recovery.train.epochs < 2 or not 0 < count < _FEW_VALIDATION_IMAGES:
        return ()
    return (
        f"Only {count} validation images chose the epoch, so chance had a part in it, and other images may show less. "
        "Hold out more of the training images (--validation-fraction), or give a validation split of your own.",
    )


def _measured(plan: Plan, name: str, model: nn.Module) -> Step:
    step = measured_step(
        plan,
        name,
        model,
        data=plan.data,
        task=plan.task,
        trained_with=plan.recovery.train.batch_size,
        original=plan.model,
    )
    if name == "original" and math.isnan(step.score.value):
        raise TrainingError(
            f"`task` must measure a number; the {step.score.metric.words} of the original on the {step.score.n} test "
            f"images is NaN. Correct {type(plan.task).__name__}, or the targets: nothing can be chosen by it."
        )
    return step
