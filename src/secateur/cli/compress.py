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
    """Compress a trained model to a budget: search, cut, repair, distill, verify, export, report.

    Example: secateur compress --model timm:resnet18 --weights w.pt --data d --budget macs=50% --out out
    """
    from secateur._runtime import is_main_process
    from secateur.cli.messages import Checks
    from secateur.cli.parsing import Inputs, check_published, formats, strategy
    from secateur.cli.tables import show
    from secateur.cost.budget import Budget
    from secateur.pipeline.compress import compress as run_compress
    from secateur.pipeline.config import default_blocks
    from secateur.pipeline.workspace import check_output, check_unfinished

    # Whatever can be refused without loading anything is, and all of it at once.
    checks, inputs = Checks(), Inputs(model, weights, data, images, run.seed)
    inputs.check(checks)
    limits = checks.add(lambda: Budget.parse(budget))
    run_config, exported = checks.add(run.to_config), checks.add(lambda: formats(run.export))
    checks.add(lambda: check_output(out_folder))
    if is_main_process():  # The others of several begin when the first one may have made its folder already.
        checks.add(lambda: check_unfinished(out_folder, run_config().on_existing))
    timed_on, cut_config = checks.add(target.to_target), checks.add(cut.to_config)
    blocks = checks.value_or(lambda: default_blocks(limits()), 0.0)
    searched_by = checks.add(lambda: strategy(search, default_blocks=blocks, trust_source=images.trust_source))
    checks.add(lambda: check_published(search, cut.space))
    recovery_config = checks.add(
        lambda: recovery.to_config(run.seed, checks.value_or(lambda: inputs.named.batch_size, 1))
    )
    checks.add(recovery.train.check_augment)
    checks.add(lambda: recovery.train.check_task(inputs.named))
    checks.settle()
    with run.fabric(recovery_config().train) as fabric, logged(quiet=run.quiet, as_json=run.as_json):
        inputs.warn_of_random_weights()
        result = run_compress(
            inputs.loaded.model,
            recovery.train.augment(inputs.images),
            limits(),
            task=inputs.named.task,
            strategy=searched_by(),
            cut=cut_config(),
            recovery=recovery_config(),
            target=timed_on(),
            out=out_folder,
            export=exported(),
            source=inputs.loaded.source,
            run=replace(run_config(), fabric=fabric, name=inputs.loaded.name, command=command_line()),
        )
    if fabric.is_global_zero:
        show(result, quiet=run.quiet, as_json=run.as_json)
