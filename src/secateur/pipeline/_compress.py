"""The public verb: a trained network and a budget go in, a smaller verified one comes out."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from secateur.artifact import warn_outside_window
from secateur.cost import Budget
from secateur.data import ImageData, calibration
from secateur.distill import AlignedFeatures, Objective
from secateur.graph import Choices, HeadUnit, StandIn
from secateur.graph.rules import Rule
from secateur.latency import Cache, OnnxRuntime, Target
from secateur.models import ModelSource
from secateur.pipeline._deliver import Finished, deliver, report_of, timed
from secateur.pipeline._formats import Format, check_formats
from secateur.pipeline._halfway import Batches, go_halfway
from secateur.pipeline._outset import check_belongs, check_output, own_copy
from secateur.pipeline._plan import (
    ALIGNED,
    EVERYTHING,
    GENTLE,
    NO_RULES,
    SPACE,
    Delivery,
    Plan,
    usual_strategy,
)
from secateur.pipeline._result import CompressResult, Halfway
from secateur.pipeline._start import Inherit, Start
from secateur.pipeline._timed import is_timed
from secateur.pipeline._together import fabric_for, first_alone, shared_workplace
from secateur.pipeline._traced import Branches
from secateur.pipeline._work import Leftover, Workplace
from secateur.pipeline._zeros import pruning_for, with_zeros, zeros_for
from secateur.report import MeasuredAccuracy, Step
from secateur.search import SearchSpace, Strategy
from secateur.sparsity import Sparsify, WeightPruning
from secateur.train import (
    Eager,
    Execution,
    Progress,
    Saving,
    Schedule,
    Silent,
    TerminalProgress,
    Trained,
    distill,
    evaluate,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CALIBRATION_IMAGES = 1024
"""Enough for the Gram matrices of layers up to a few hundred channels: every image gives one sample per position."""


def silent(_message: str) -> None:
    """Say nothing."""


def compress(
    model: nn.Module,
    data: ImageData,
    *,
    budget: Budget | str,
    strategy: Strategy | None = None,
    choices: Choices = EVERYTHING,
    heads: HeadUnit = HeadUnit.DIMENSION,
    branches: Branches = Branches.TIED,
    rules: Mapping[str, Rule] = NO_RULES,
    space: SearchSpace = SPACE,
    schedule: Schedule = GENTLE,
    objective: Objective = ALIGNED,
    start: Start = Inherit(),  # noqa: B008 - frozen
    pruning: WeightPruning | None = None,
    target: Target = OnnxRuntime(),  # noqa: B008 - frozen
    cache: Cache | None = None,
    calibration_images: int = CALIBRATION_IMAGES,
    out: Path | str | None = None,
    export: Sequence[Format] = (Format.ONNX,),
    source: ModelSource | None = None,
    leftover: Leftover = Leftover.REFUSE,
    saving: Saving = Saving(),  # noqa: B008 - frozen
    execution: Execution = Eager(),  # noqa: B008 - frozen
    seed: int = 0,
    device: torch.device | None = None,
    fabric: "Fabric | None" = None,
    progress: Progress = TerminalProgress(),  # noqa: B008 - frozen
    tell: Callable[[str], None] = silent,
    name: str = "",
    command: str = "",
) -> CompressResult:
    """Find which channels to keep, cut, heal, recover accuracy by distillation, verify, and write the artifact.

    Nothing is chosen on the test split: its accuracy is measured for the report. Everything is checked before it is
    written: sliced equals masked, costs equal counted ones, a reloaded artifact gives the same bits, exported files
    agree with the model.

    Args:
        model: A trained classifier of the data's classes; not changed.
        data: Training, validation and test images, see `secateur.load_data`.
        budget: Upper bounds on the cost, such as ``"macs=50%"``; ``"nonzero=20%"`` bounds the parameters that are not
            zero, by pruning single weights while the student recovers, after the channels were cut to the other bounds.
        strategy: How the architecture is found; None: by `Knapsack`, and where the budget limits the latency by
            `Shallower` around it, as blocks take time that narrower layers hardly spare.
        choices: Which layers may be cut at all, by name patterns.
        heads: What is kept or removed as one in attention, see `secateur.trace`.
        branches: Whether the branches of a residual stream may be narrower than it.
        rules: What further operations do to channels, see `secateur.trace`.
        space: Which widths are allowed, in general and for some axes.
        schedule: Of the recovery; ``epochs=0`` heals only. Its seed is replaced by ``seed``.
        objective: What the recovery minimises.
        start: What the student begins with: `Inherit`, the weights of its channels, healed, or `FromScratch`, none;
            then it needs as many epochs and as high a learning rate as the original did.
        pruning: How single weights are chosen if the budget bounds ``nonzero``; None is `WeightPruning()`.
        target: What a bound on latency is on: runtime, threads and batch size, see `secateur.latency`. Latency is
            predicted from a table of layers, then measured and corrected until the network is within the bound, and
            measured again at the end. With a divisor of 1 in ``space``, 8, 16 and 32 are tried.
        cache: Of measurements; None means those of this machine, in the user's cache folder.
        calibration_images: Training images for search and healing; fewer if there are not so many.
        out: Folder for the artifact, the exports and the report; None writes nothing. The folder appears whole at the
            end. Until then the work lies in ``<out>.work``, from which an interrupted run goes on, also in the middle
            of a search or training of hours.
        export: Files for other runtimes; only with ``out``.
        source: How the original is built, so that the artifact can be loaded without you; see
            `secateur.models.load_model`. Without it, loading needs ``factory=``.
        leftover: What to do with an interrupted run at the same ``out``.
        saving: When searches and trainings write checkpoints, beside those at the ends of epochs; only with ``out``.
        execution: How original and student are run in the recovery, see `secateur.train.fit`; not in searches.
        seed: Of everything that is random.
        device: Where to compute; None means the accelerator if there is one.
        fabric: Instead of a device: several processes, such as `secateur.train.open_group` has of torchrun. All call
            this with the same arguments; the first searches, cuts, writes to ``out``, which all must see, and tells;
            all train. Every one returns the model, only the first what was written.
        progress: Shows the search, where it takes long, and the training.
        tell: Receives one sentence per step.
        name: Of the model, for the report; None means its class.
        command: The exact command or call, for the record.

    Returns:
        The compressed model and everything that was measured.

    Raises:
        SecateurError: One of its subclasses, with the way out, if anything cannot be used; nothing half-written is
            left then.
    """
    delivery = None if out is None else Delivery(Path(out), tuple(dict.fromkeys(export)), source, leftover)
    if delivery is not None:
        check_output(delivery.folder)
        check_formats(delivery.formats)
    limits = Budget.parse(budget) if isinstance(budget, str) else budget
    fabric = fabric_for(fabric, schedule.precision, device, None if delivery is None else delivery.folder)
    if fabric.is_global_zero:
        warn_outside_window()
    if schedule.epochs:
        execution.check(fabric)  # Before a search of hours, whose end would be the first to say it.
    plan = Plan(
        model=model,
        data=data,
        budget=limits,
        strategy=usual_strategy(limits) if strategy is None else strategy,
        choices=choices,
        heads=heads,
        branches=branches,
        rules=rules,
        space=space,
        schedule=replace(schedule, seed=seed),
        objective=objective,
        start=start,
        calibration=min(calibration_images, len(data.train)),
        seed=seed,
        fabric=fabric,
        name=name or type(model).__name__,
        command=command,
        delivery=delivery,
        progress=progress if fabric.is_global_zero else Silent(),
        tell=tell if fabric.is_global_zero else silent,
        pruning=pruning_for(limits, pruning),
        target=target,
        cache=cache,
        saving=saving,
        execution=execution,
    )
    return _run(plan)


def _run(plan: Plan) -> CompressResult:
    batches = calibration(plan.data.train, plan.calibration, device=plan.device, seed=plan.seed)
    placed = own_copy(plan.model, plan.device)
    check_belongs(placed, plan.data, batches[0][0])
    plan.start.check(placed, plan.schedule)
    with contextlib.ExitStack() as stack:
        work = None
        if plan.delivery is not None:
            shared = shared_workplace(plan.fabric, plan.delivery.folder, plan.settings(), plan.delivery.leftover)
            work = stack.enter_context(shared)
            plan = replace(plan, progress=work.logged(plan.progress))
        return _work(plan, placed, batches, work)


def _work(plan: Plan, original: nn.Module, batches: Batches, work: Workplace | None) -> CompressResult:
    steps = [_measured(plan, "original", original)]
    with first_alone(plan.fabric):
        half = go_halfway(plan, original, batches, work)
    steps.append(_measured(plan, plan.start.done, half.student))
    zeros = zeros_for(plan, half, batches)
    trained = _recover(plan, half, work, zeros)
    student = half.student
    if trained is not None and (trained.best_epoch > 0 or zeros is not None):
        student = trained.model
        steps.append(_measured(plan, "distilled" if zeros is None else "weights pruned and distilled", student))
    elif zeros is not None:
        student = zeros.begun(student, 0)
        steps.append(_measured(plan, "weights pruned", student))
    if zeros is not None:
        student = with_zeros(student)
    finished = Finished(
        plan, half, student.eval(), trained, tuple(steps), batches[0][0].detach().cpu(), _validated(plan, half, trained)
    )
    if not plan.fabric.is_global_zero:
        report, files, folder = report_of(finished, (), (), ()), (), None
    elif plan.delivery is None:
        latency, proof, notes = timed(finished) if is_timed(plan.budget) else ((), (), ())
        report, files, folder = report_of(finished, proof, latency, notes), (), None
    else:
        report, files = deliver(finished, plan.delivery)
        folder = plan.delivery.folder
    home = next((p.device for p in plan.model.parameters()), torch.device("cpu"))
    return CompressResult(student.to(home), half.graph, half.found, half.verification, trained, report, folder, files)


def _recover(plan: Plan, half: Halfway, work: Workplace | None, zeros: Sparsify | None) -> Trained | None:
    if plan.schedule.epochs == 0:
        return None
    objective, alignment = plan.objective, None
    stages = _comparable(half)
    if objective.feature_weight and stages:
        alignment = AlignedFeatures.of(half.graph, half.found.architecture, modules=stages)
    elif objective.feature_weight:
        plan.tell("The model has no module whose features could be compared: distilling from the logits alone.")
        objective = replace(objective, feature_weight=0.0)
    return distill(
        half.student,
        teacher=half.original,
        data=plan.data,
        schedule=plan.schedule,
        objective=objective,
        alignment=alignment,
        sparsify=zeros,
        checkpoint=None if work is None else work.checkpoint,
        saving=plan.saving,
        execution=plan.execution,
        progress=plan.progress,
        fabric=plan.fabric,
    )


def _comparable(half: Halfway) -> tuple[str, ...]:
    """The last module at each resolution, where the student's means what the original's does.

    Inside of a removed block it does not. A module that is a removed block as a whole, the sum included, hands on its
    input, which is what the original's gives when the branch adds nothing.
    """
    removed = [half.graph.blocks_by_name[name] for name in half.found.architecture.removed_blocks]
    inside = {module for block in removed for module in block.modules}
    handed_on = {
        block.replacements[0].module
        for block in removed
        if len(block.replacements) == 1 and block.replacements[0].stand_in is StandIn.PASS_THROUGH
    }
    return tuple(stage for stage in half.graph.stages if stage not in inside or stage in handed_on)


def _validated(plan: Plan, half: Halfway, trained: Trained | None) -> float | None:
    """Accuracy of the original on the images that the epochs were validated on: the line that they come near to."""
    if trained is None or not len(plan.data.validation):
        return None
    return evaluate(half.original, plan.data.validation, device=plan.device).top1


def _measured(plan: Plan, name: str, model: nn.Module) -> Step:
    found = evaluate(model, plan.data.test, device=plan.device)
    plan.tell(f"Test accuracy, {name}: {100 * found.top1:.2f} % of {found.n} images.")
    return Step(name, MeasuredAccuracy(found.top1, found.n))
