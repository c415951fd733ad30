"""The command that does the whole job."""

from secateur.cli import options
from secateur.cli.options import (
    AttentionName,
    PrecisionName,
    StrategyName,
    TargetBatch,
    TargetDevice,
    TargetName,
    TargetOption,
    TargetThreads,
    expand_dataclasses,
)
from secateur.cli.output import command_line, handle_errors_together, resumable, show
from secateur.cli.shared import ImageFlags, MachineFlags, TrainingFlags, WorkFlags


@handle_errors_together
@resumable
@expand_dataclasses
def compress(
    *,
    model: options.Model,
    data: options.Data,
    budget: options.BudgetText,
    out_folder: options.Out,
    weights: options.Weights = None,
    given: ImageFlags,
    strategy: options.Strategy = StrategyName.KNAPSACK,
    importance: options.Importance = None,
    remove_blocks: options.RemoveBlocks = None,
    divisor: options.Divisor = 1,
    min_width: options.MinWidth = 1,
    min_kept: options.MinKept = 0.25,
    include: options.Include = None,
    exclude: options.Exclude = None,
    keep_whole: options.KeepWhole = None,
    axis_divisor: options.AxisDivisor = None,
    axis_min_width: options.AxisMinWidth = None,
    axis_min_kept: options.AxisMinKept = None,
    attention: options.Attention = AttentionName.DIMENSIONS,
    untied: options.Untied = False,
    search_epochs: options.SearchEpochs = None,
    search_over: options.SearchOver = None,
    search_learning_rate: options.SearchLearningRate = None,
    search_candidates: options.SearchCandidates = None,
    combine: options.Combine = None,
    stage_end: options.StageEnd = None,
    ray: options.Ray = None,
    weight_score: options.WeightScore = None,
    weight_allocation: options.WeightAllocation = None,
    weight_schedule: options.WeightSchedule = None,
    dense: options.Dense = None,
    calibration: options.Calibration = 1024,
    from_scratch: options.FromScratch = False,
    epochs: options.Epochs = 1,
    batch_size: options.BatchSize = 128,
    learning_rate: options.LearningRate = 0.01,
    training: TrainingFlags,
    kd_weight: options.KdWeight = 0.9,
    label_weight: options.LabelWeight = 0.1,
    feature_weight: options.FeatureWeight = 10.0,
    precision: options.Precision = PrecisionName.AUTO,
    compiled: options.Compile = False,
    work: WorkFlags,
    target: TargetOption = TargetName.ORT,
    target_threads: TargetThreads = 1,
    target_batch: TargetBatch = 1,
    target_device: TargetDevice = "cpu",
    machine: MachineFlags,
) -> None:
    """Compress a trained classifier to a budget: search, cut, repair, distill, verify, export, report."""
    from secateur.cli import _words as _choices
    from secateur.cli._words import pruning_of
    from secateur.cli.options import target_of
    from secateur.cli.shared import Searching, strategy_of
    from secateur.cost.budget import Budget
    from secateur.distill.objective import Objective
    from secateur.pipeline.compress import compress as run
    from secateur.pipeline.config import default_blocks
    from secateur.pipeline.workspace import check_output
    from secateur.search.space import SearchSpace

    leftover = work.leftover
    # Whatever can be refused at once is, before anything is loaded.
    limits, formats = Budget.parse(budget), work.formats
    timed_on = target_of(target, target_threads, target_batch, target_device)
    cuts = None if stage_end is None else tuple(stage_end)
    searching = Searching(search_epochs, search_over, search_learning_rate, search_candidates, combine, cuts, ray)
    found_by = strategy_of(strategy, importance, remove_blocks, searching, default_blocks(limits))
    progress, saving = machine.progress, work.saving
    choices = _choices.choices_of(include, exclude, keep_whole)
    space = SearchSpace(min_width, divisor, min_kept, _choices.rules_of(axis_divisor, axis_min_width, axis_min_kept))
    schedule = training.schedule(
        epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, precision=precision, seed=work.seed
    )
    objective = Objective(kd_weight, label_weight, feature_weight, training.temperature, training.label_smoothing)
    varied = training.variation
    check_output(out_folder)
    inputs = given.inputs(model, weights, data, work.seed)
    with machine.processes(schedule) as fabric:
        result = run(
            inputs.opened.model,
            varied(inputs.images),
            budget=limits,
            strategy=found_by,
            choices=choices,
            heads=_choices.heads_of(attention),
            branches=_choices.branches_of(untied),
            space=space,
            start=_choices.start_of(from_scratch),
            pruning=pruning_of(weight_score, weight_allocation, weight_schedule, dense),
            schedule=schedule,
            objective=objective,
            target=timed_on,
            calibration_images=calibration,
            out=out_folder,
            export=formats,
            source=inputs.opened.source,
            leftover=leftover,
            saving=saving,
            execution=_choices.execution_of(compiled),
            seed=work.seed,
            fabric=fabric,
            progress=progress,
            tell=machine.tell,
            name=inputs.opened.name,
            command=command_line(),
        )
    if fabric.is_global_zero:
        show(result)
