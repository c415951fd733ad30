"""Compress a model: a trained network and a budget go in, a smaller verified one comes out."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from secateur.cost.budget import Budget
from secateur.cost.targets import OnnxRuntime, Target
from secateur.data.dataset import ImageData, draw_calibration
from secateur.distill.taps import AlignedFeatures
from secateur.export.formats import Format, check_formats
from secateur.graph.graph import StandIn
from secateur.models.source import ModelSource
from secateur.pipeline.config import (
    CompressResult,
    CutConfig,
    CutStudent,
    Output,
    Plan,
    RecoveryConfig,
    RunConfig,
    default_strategy,
)
from secateur.pipeline.finalize import Finished, finalize
from secateur.pipeline.search_and_cut import ImageBatches, search_and_cut, with_zeros, zeros_for
from secateur.pipeline.workspace import (
    RunDirectory,
    check_model_fits_data,
    check_output,
    fabric_for,
    first_alone,
    own_copy,
    shared_run_directory,
)
from secateur.prune.weight_pruning import Sparsify, WeightPruning
from secateur.report.run import MeasuredAccuracy, Step
from secateur.search.base import Strategy
from secateur.train.callbacks import Silent
from secateur.train.config import RunSettings
from secateur.train.evaluate import evaluate
from secateur.train.fit import Trained, train_with_teacher


def compress(
    model: nn.Module,
    data: ImageData,
    budget: Budget | str,
    *,
    strategy: Strategy | None = None,
    cut: CutConfig = CutConfig(),  # noqa: B008 - frozen
    recovery: RecoveryConfig = RecoveryConfig(),  # noqa: B008 - frozen
    target: Target = OnnxRuntime(),  # noqa: B008 - frozen
    out: Path | str | None = None,
    export: Sequence[Format] = (Format.ONNX,),
    source: ModelSource | None = None,
    run: RunConfig = RunConfig(),  # noqa: B008 - frozen
) -> CompressResult:
    """Find which channels to keep, cut, repair, recover accuracy by distillation, verify, and write the artifact.

    Nothing is chosen on the test split: its accuracy is measured for the report. Everything is checked before it is
    written: sliced equals masked, costs equal counted ones, a reloaded artifact gives the same bits, exported files
    agree with the model. Every step is logged to the logger ``secateur`` at level INFO.

    Args:
        model: A trained classifier of the data's classes; not changed.
        data: Training, validation and test images, see `secateur.load_data`.
        budget: Upper bounds on the cost, such as ``"macs=50%"``; ``"nonzero=20%"`` bounds the parameters that are not
            zero, by pruning single weights while the student recovers, after the channels were cut to the other bounds.
        strategy: How the architecture is found; None means `Knapsack`, and where the budget limits the latency
            `RemoveBlocks` around it, as blocks take time that narrower layers hardly save.
        cut: What may be cut, and how the cut model is made.
        recovery: How the cut model regains accuracy.
        target: The runtime, threads and batch size that a bound on latency is for, see `secateur.cost`. Latency is
            predicted from a table of layers, then measured and corrected until the network is within the bound, and
            measured again at the end. With a divisor of 1 in ``cut.space``, 8, 16 and 32 are tried.
        out: Folder for the artifact, the exports and the report; None writes nothing. The folder appears whole at the
            end. Until then the work lies in ``<out>.work``, from which an interrupted run is resumed, also in the
            middle of a search or training of hours.
        export: Files for other runtimes; only with ``out``.
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
    output = None if out is None else Output(Path(out), tuple(dict.fromkeys(export)), source)
    if output is not None:
        check_output(output.folder)
        check_formats(output.formats)
    limits = Budget.parse(budget) if isinstance(budget, str) else budget
    fabric = fabric_for(run.fabric, recovery.train.precision, run.device, None if output is None else output.folder)
    if recovery.train.epochs:
        recovery.execution.check(fabric)  # A search of hours would otherwise end with this error.
    cut = replace(
        cut,
        calibration_images=min(cut.calibration_images, len(data.train)),
        weight_pruning=_weight_pruning(limits, cut.weight_pruning),
    )
    plan = Plan(
        model=model,
        data=data,
        budget=limits,
        strategy=default_strategy(limits) if strategy is None else strategy,
        cut=cut,
        recovery=replace(recovery, train=replace(recovery.train, seed=run.seed)),
        target=target,
        output=output,
        run=run if fabric.is_global_zero else replace(run, callbacks=Silent()),
        fabric=fabric,
    )
    batches = draw_calibration(data.train, cut.calibration_images, device=fabric.device, seed=run.seed)
    original = own_copy(model, fabric.device)
    check_model_fits_data(original, data, batches[0][0])
    cut.init.check(original, recovery.train)
    with shared_run_directory(
        fabric, None if output is None else output.folder, plan.settings(), run.on_existing
    ) as work:
        if work is not None:
            plan = replace(plan, run=replace(plan.run, callbacks=work.logged(plan.run.callbacks)))
        steps = [_measured(plan, "original", original)]
        with first_alone(fabric):
            cut_student = search_and_cut(plan, original, batches, work)
        return finalize(_recovered(plan, cut_student, batches, work, steps))


def _weight_pruning(budget: Budget, pruning: WeightPruning | None) -> WeightPruning | None:
    """How single weights are pruned; None if the budget does not ask for it."""
    if budget.nonzero is None:
        if pruning is not None:
            warnings.warn("`weight_pruning` has no effect: the budget does not bound `nonzero`.", stacklevel=3)
        return None
    return pruning or WeightPruning()


def _recovered(
    plan: Plan, cut_student: CutStudent, batches: ImageBatches, work: RunDirectory | None, steps: list[Step]
) -> Finished:
    """Train the cut student, with single weights at zero if the budget bounds them."""
    student = cut_student.student
    steps.append(_measured(plan, plan.cut.init.done, student))
    zeros = zeros_for(plan, cut_student, batches)
    trained = _train(plan, cut_student, work, zeros)
    if trained is not None and (trained.best_epoch > 0 or zeros is not None):
        student = trained.model
        steps.append(_measured(plan, "distilled" if zeros is None else "weights pruned and distilled", student))
    elif zeros is not None:
        student = zeros.start(student, 0)
        steps.append(_measured(plan, "weights pruned", student))
    if zeros is not None:
        student = with_zeros(student)
    return Finished(
        plan=plan,
        cut_student=cut_student,
        student=student.eval(),
        trained=trained,
        steps=tuple(steps),
        images=batches[0][0].detach().cpu(),
        original_validation=_validated(plan, cut_student, trained),
    )


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
    return tuple(stage for stage in graph.stages if stage not in inside or stage in passing)


def _validated(plan: Plan, cut_student: CutStudent, trained: Trained | None) -> float | None:
    """Accuracy of the original on the validation images, which the report draws beside that of the epochs."""
    if trained is None or not len(plan.data.validation):
        return None
    return evaluate(cut_student.original, plan.data.validation, device=plan.device).top1


def _measured(plan: Plan, name: str, model: nn.Module) -> Step:
    found = evaluate(model, plan.data.test, device=plan.device)
    plan.log(f"Test accuracy, {name}: {100 * found.top1:.2f} % of {found.n} images.")
    return Step(name, MeasuredAccuracy(found.top1, found.n))
