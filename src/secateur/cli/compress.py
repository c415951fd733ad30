"""The command that compresses a model to a budget."""

from dataclasses import replace

from secateur.cli import options
from secateur.cli.options import (
    CutFlags,
    ImageFlags,
    RecoveryFlags,
    RunFlags,
    SearchFlags,
    TargetFlags,
)
from secateur.cli.output import command_line, handle_errors_together, logged, resumable


@handle_errors_together
@resumable
def compress_command(
    *,
    model: options.Model,
    weights: options.WeightsFile = None,
    data: options.Data,
    budget: options.BudgetText,
    out_folder: options.Out,
    images: ImageFlags = ImageFlags(),
    search: SearchFlags = SearchFlags(),
    cut: CutFlags = CutFlags(),
    recovery: RecoveryFlags = RecoveryFlags(),
    target: TargetFlags = TargetFlags(),
    run: RunFlags = RunFlags(),
    debug: options.Debug = False,
) -> None:
    """Compress a trained classifier to a budget: search, cut, repair, distill, verify, export, report.

    Example: secateur compress --model cifar_resnet20 --weights resnet20.safetensors --data cifar10
    --budget macs=50% --out small
    """
    from secateur.cli.parsing import Inputs, formats, strategy
    from secateur.cli.tables import show
    from secateur.cost.budget import Budget
    from secateur.pipeline.compress import compress as run_compress
    from secateur.pipeline.config import default_blocks
    from secateur.pipeline.workspace import check_output

    # Whatever can be refused at once is, before anything is loaded.
    run_config = run.to_config()
    limits, exported = Budget.parse(budget), formats(run.export)
    timed_on = target.to_target()
    searched_by = strategy(search, default_blocks=default_blocks(limits), trust_source=images.trust_source)
    cut_config = cut.to_config()
    recovery_config = recovery.to_config(run.seed)
    recovery.train.check_augment()
    check_output(out_folder)
    inputs = Inputs(model, weights, data, images, run.seed)
    with run.fabric(recovery_config.train) as fabric, logged(quiet=run.quiet):
        result = run_compress(
            inputs.loaded.model,
            recovery.train.augment(inputs.images),
            limits,
            strategy=searched_by,
            cut=cut_config,
            recovery=recovery_config,
            target=timed_on,
            out=out_folder,
            export=exported,
            source=inputs.loaded.source,
            run=replace(run_config, fabric=fabric, name=inputs.loaded.name, command=command_line()),
        )
    if fabric.is_global_zero:
        show(result)
