"""The commands. Each is thin: words to objects, one verb of `secateur.pipeline`, and what it wrote."""

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from secateur.cli import _options as options
from secateur.cli._bench import bench
from secateur.cli._boundary import BAD_INPUT, command_line, err, out, threads, told
from secateur.cli._compare import compare
from secateur.cli._distill import distill
from secateur.cli._options import AttentionName, OptimiserName, PrecisionName, StrategyName
from secateur.cli._saying import show, silent, tell
from secateur.cli._stopping import goes_on
from secateur.cli._targets import TargetBatch, TargetDevice, TargetName, TargetOption, TargetThreads
from secateur.errors import ArtifactError, ModelError

app = typer.Typer(
    name="secateur",
    help="Pruning shears for neural networks: a trained vision model and a budget go in, a smaller, verified one "
    "comes out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; as ``python -m secateur`` too it calls itself secateur."""
    app(prog_name="secateur")


def _print_version(wanted: bool) -> None:
    if wanted:
        from secateur import __version__

        out().print(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    # A callback, because the body of this function runs only if a command follows.
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version),
    ] = False,
) -> None: ...


@app.command()
@told
def inspect(
    *,
    model: options.Model,
    weights: options.Weights = None,
    data: options.MaybeData = None,
    image_size: options.ImageSize = None,
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
    tree: options.ShowTree = False,
    draw: options.Draw = None,
    as_json: options.AsJson = False,
    trust_source: options.TrustSource = False,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Show what could be cut: the channel axes, what is frozen and why, and the reachable costs."""
    import json

    from secateur.cli import _choices
    from secateur.cli._inputs import Inputs
    from secateur.cli._survey import print_survey, print_tree
    from secateur.cli._tables import print_written
    from secateur.pipeline import survey
    from secateur.report import check_drawing, write_drawing
    from secateur.search import SearchSpace

    if draw is not None:
        check_drawing(draw)
    choices = _choices.choices_of(include, exclude, keep_whole)
    space = SearchSpace(min_width, divisor, min_kept, _choices.rules_of(axis_divisor, axis_min_width, axis_min_kept))
    inputs = Inputs(model, weights, data, image_size=image_size, trust_source=trust_source, seed=seed)
    heads = _choices.heads_of(attention)
    branches = _choices.branches_of(untied)
    found = survey(inputs.opened.model, inputs.example(1), choices=choices, heads=heads, branches=branches, space=space)
    name = inputs.opened.name
    if as_json:
        out().print(Text(json.dumps({"model": name, **found.to_json()}, indent=1)), soft_wrap=True)
    elif tree:
        print_tree(found, name)
    else:
        print_survey(found, name)
    if draw is not None:
        write_drawing(draw, found.graph, name)
    if not as_json:
        print_written([draw] if draw is not None else [])
    if draw is None and not as_json:
        out().print(Text("Wrote nothing: inspect only looks."))


@app.command()
@told
@goes_on
def compress(
    *,
    model: options.Model,
    data: options.Data,
    budget: options.BudgetText,
    out_folder: options.Out,
    weights: options.Weights = None,
    trust_source: options.TrustSource = False,
    limit: options.Limit = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    validation_fraction: options.ValidationFraction = 0.1,
    strategy: options.Strategy = StrategyName.KNAPSACK,
    importance: options.Importance = None,
    remove_blocks: options.RemoveBlocks = 0.0,
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
    warmup: options.Warmup = 0.05,
    optimizer: options.Optimiser = OptimiserName.SGD,
    weight_decay: options.WeightDecay = None,
    ema: options.Ema = None,
    accumulate: options.Accumulate = 1,
    clip_norm: options.ClipNorm = None,
    auto_augment: options.AutoAugment = None,
    erase: options.Erase = 0.0,
    mixup: options.Mixup = 0.0,
    cutmix: options.Cutmix = 0.0,
    label_smoothing: options.LabelSmoothing = 0.0,
    temperature: options.Temperature = 4.0,
    kd_weight: options.KdWeight = 0.9,
    label_weight: options.LabelWeight = 0.1,
    feature_weight: options.FeatureWeight = 10.0,
    precision: options.Precision = PrecisionName.AUTO,
    compiled: options.Compile = False,
    export: options.Export = "onnx",
    resume: options.Resume = False,
    restart: options.Restart = False,
    checkpoint_minutes: options.CheckpointMinutes = 10.0,
    checkpoint_steps: options.CheckpointSteps = None,
    seed: options.Seed = 0,
    target: TargetOption = TargetName.ORT,
    target_threads: TargetThreads = 1,
    target_batch: TargetBatch = 1,
    target_device: TargetDevice = "cpu",
    device: options.Device = "auto",
    thread_count: options.Threads = None,
    tensorboard: options.TensorBoard = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Compress a trained classifier to a budget: search, cut, heal, distil, verify, export, report."""
    from secateur.cli import _choices
    from secateur.cli._inputs import Inputs
    from secateur.cli._searching import Searching, strategy_of
    from secateur.cli._targets import target_of
    from secateur.cli._weights import pruning_of
    from secateur.cost import Budget
    from secateur.distill import Objective
    from secateur.pipeline import Leftover, check_output
    from secateur.pipeline import compress as run
    from secateur.search import SearchSpace
    from secateur.train import Schedule

    if resume and restart:
        raise ArtifactError("`--resume` goes on with an interrupted run and `--restart` removes it; give one of them.")
    # Whatever can be refused at once is, before anything is loaded.
    limits, formats = Budget.parse(budget), _choices.formats_of(export)
    timed_on = target_of(target, target_threads, target_batch, target_device)
    cuts = None if stage_end is None else tuple(stage_end)
    searching = Searching(search_epochs, search_over, search_learning_rate, search_candidates, combine, cuts, ray)
    found_by = strategy_of(strategy, importance, remove_blocks, searching)
    progress = _choices.progress_of(quiet, tensorboard)
    saving = _choices.saving_of(checkpoint_minutes, checkpoint_steps)
    choices = _choices.choices_of(include, exclude, keep_whole)
    space = SearchSpace(min_width, divisor, min_kept, _choices.rules_of(axis_divisor, axis_min_width, axis_min_kept))
    schedule = Schedule(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_fraction=warmup,
        optimiser=_choices.optimiser_of(optimizer, weight_decay),
        ema_decay=ema,
        accumulate=accumulate,
        clip_norm=clip_norm,
        precision=_choices.precision_of(precision),
        seed=seed,
    )
    objective = Objective(kd_weight, label_weight, feature_weight, temperature, label_smoothing)
    varied = _choices.variation_of(auto_augment, erase, mixup, cutmix)
    check_output(out_folder)
    inputs = Inputs(
        model,
        weights,
        data,
        image_size=image_size,
        trust_source=trust_source,
        seed=seed,
        limit=limit,
        mean=_choices.numbers_of(mean, "--mean"),
        std=_choices.numbers_of(std, "--std"),
        validation_fraction=validation_fraction,
    )
    with threads(thread_count):
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
            leftover=Leftover.RESUME if resume else Leftover.DISCARD if restart else Leftover.REFUSE,
            saving=saving,
            execution=_choices.execution_of(compiled),
            seed=seed,
            device=_choices.device_of(device),
            progress=progress,
            tell=silent if quiet else tell,
            name=inputs.opened.name,
            command=command_line(),
        )
    show(result)


app.command()(distill)
app.command()(compare)


@app.command()
@told
def evaluate(
    *,
    model: options.Model,
    data: options.Data,
    weights: options.Weights = None,
    trust_source: options.TrustSource = False,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    batch_size: options.BatchSize = 250,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    thread_count: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Measure the accuracy of a model or artifact on the test images."""
    from secateur.cli import _choices
    from secateur.cli._inputs import Inputs
    from secateur.pipeline import check_belongs
    from secateur.report import MeasuredAccuracy
    from secateur.train import evaluate as measure

    inputs = Inputs(
        model,
        weights,
        data,
        image_size=image_size,
        trust_source=trust_source,
        seed=seed,
        mean=_choices.numbers_of(mean, "--mean"),
        std=_choices.numbers_of(std, "--std"),
    )
    with threads(thread_count):
        check_belongs(inputs.opened.model, inputs.images, inputs.example(2))
        found = measure(
            inputs.opened.model, inputs.images.test, batch_size=batch_size, device=_choices.device_of(device)
        )
    low, high = MeasuredAccuracy(found.top1, found.n).interval
    out().print(
        f"{inputs.opened.name} on {inputs.images.name}: test accuracy {100 * found.top1:.2f} % of {found.n} images "
        f"(95 % interval {100 * low:.2f} to {100 * high:.2f} %), cross-entropy {found.loss:.4f} nats"
    )
    out().print(Text("Wrote nothing: evaluate only measures."))


@app.command()
@told
def verify(
    *,
    folder: Annotated[Path | None, typer.Argument(help="The artifact.", show_default=False)] = None,
    model: Annotated[Path | None, typer.Option(help="The artifact, as for the other commands.")] = None,
    data: options.MaybeData = None,
    trust_source: options.TrustSource = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    thread_count: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Check that an artifact is whole and still computes what it did; with --data, that it is as accurate."""
    from secateur.cli import _choices
    from secateur.cli._inputs import Inputs
    from secateur.cli._tables import print_checks
    from secateur.pipeline import verify as run

    artifact = folder or model
    if artifact is None or (folder is not None and model is not None):
        raise ArtifactError("`verify` must be given one artifact folder; say: secateur verify FOLDER.")
    images = None
    if data is not None:
        images = Inputs(str(artifact.absolute()), None, data, trust_source=trust_source, seed=seed).images
    with threads(thread_count):
        found = run(artifact, data=images, trust_source=trust_source, device=_choices.device_of(device))
    print_checks(found.checks)
    for said in found.passed_over:
        out().print(Text(said), soft_wrap=True)
    out().print(Text("Wrote nothing: verify only checks."))
    if not found.passed:
        err().print(Text(f"Error: {artifact} does not hold what it says; see FAILED above.", style="bold red"))
        raise typer.Exit(BAD_INPUT)


@app.command()
@told
def export(
    *,
    model: options.Model,
    out_folder: Annotated[
        Path | None, typer.Option("--out", help="Where; None: into the artifact folder.", show_default=False)
    ] = None,
    weights: options.Weights = None,
    data: options.MaybeData = None,
    image_size: options.ImageSize = None,
    formats: options.Export = "onnx",
    trust_source: options.TrustSource = False,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Write a model or artifact for other runtimes, and check that the files agree with it."""
    from secateur.cli import _choices
    from secateur.cli._inputs import Inputs
    from secateur.cli._tables import print_written
    from secateur.pipeline import export_files

    wanted = _choices.formats_of(formats)
    inputs = Inputs(model, weights, data, image_size=image_size, trust_source=trust_source, seed=seed)
    if out_folder is None and inputs.opened.manifest is None:
        raise ModelError("`--out` must say where the files go, because --model is no artifact folder; got none.")
    where = out_folder or Path(model)
    if where.exists() and not where.is_dir():
        raise ArtifactError(f"`--out` must be a folder; got a file: {where}. Choose another path.")
    images = None if data is None else inputs.images
    for path, agreed in export_files(inputs.opened.model, inputs.example(4), where, wanted, data=images).items():
        print_written([path])
        out().print(Text(str(agreed)), soft_wrap=True)


@app.command()
@told
def demo(
    *,
    out_folder: options.Out = Path("secateur-demo"),
    export: options.Export = "onnx",
    seed: options.Seed = 0,
    thread_count: options.Threads = 1,  # the networks are so small that a second thread only waits
    tensorboard: options.TensorBoard = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Train a small network on handwritten digits, compress it to 30 % of its MACs, and show the proof."""
    from secateur.cli import _choices
    from secateur.pipeline import demo as run

    formats, progress = _choices.formats_of(export), _choices.progress_of(quiet, tensorboard)
    with threads(thread_count):
        result = run(
            out_folder,
            export=formats,
            seed=seed,
            progress=progress,
            tell=silent if quiet else tell,
            command=command_line(),
        )
    show(result)
    out().print(Text(f"Open {out_folder / 'report.html'} in a browser. Check it again: secateur verify {out_folder}"))


app.command()(bench)
