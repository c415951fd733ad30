"""The command that measures: how long a pass of each of several models takes, in turns.

The commands. Each is thin: words to objects, one verb of `secateur.pipeline`, and what it wrote."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from secateur.cli import options
from secateur.cli.compress import compress
from secateur.cli.distill import distill
from secateur.cli.inspect import inspect
from secateur.cli.options import BenchBatch, BenchDevice, BenchTarget, BenchThreads, Rounds, TargetName
from secateur.cli.output import BAD_INPUT, command_line, err, handle_errors, out, show, silent, tell, threads
from secateur.errors import ArtifactError, ModelError

if TYPE_CHECKING:
    from secateur.cost.measure import Latency


@handle_errors
def bench(
    *,
    models: Annotated[
        list[str], typer.Argument(help="Artifacts, or models as for --model; the first is compared with.")
    ],
    image_size: options.ImageSize = None,
    target: BenchTarget = TargetName.ORT,
    thread_count: BenchThreads = 1,
    batch: BenchBatch = 1,
    device: BenchDevice = "cpu",
    rounds: Rounds = 30,
    trust_source: options.TrustSource = False,
    as_json: options.AsJson = False,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Measure the latency of models, in turns: warm-up, fixed threads, median and spread, and what else was running."""
    import json

    from secateur.cli.options import target_of
    from secateur.cli.shared import Inputs
    from secateur.cost.measure import measure_each

    runtime = target_of(target, thread_count, batch, device, device_flag="--device")
    given = [Inputs(name, None, None, image_size=image_size, trust_source=trust_source, seed=seed) for name in models]
    found = measure_each([(each.opened.model, (each.example(batch),)) for each in given], runtime, rounds=rounds)
    names = [each.opened.name for each in given]
    if as_json:
        rows = [{"model": name, **latency.to_json()} for name, latency in zip(names, found, strict=True)]
        out().print(Text(json.dumps(rows, indent=1)), soft_wrap=True)
        return
    _show(names, [list(each.example(1).shape[1:]) for each in given], found)
    out().print(Text("Wrote nothing: bench only measures."))


def _show(names: list[str], shapes: list[list[int]], found: "list[Latency]") -> None:
    from secateur.cli.output import plain_table
    from secateur.cost.budget import format_cost

    first = found[0]
    columns = ("model", "input", "median", "quartiles", "spread", "speed of the first")
    table = plain_table(f"Latency of one pass, {first.runtime}", columns, numbers=4)
    for name, shape, latency in zip(names, shapes, found, strict=True):
        seconds = latency.seconds
        quartiles = f"{_time(seconds.lower)} to {_time(seconds.upper)}"
        speed = f"{first.seconds.median / seconds.median:.2f} x"
        table.add_row(
            name,
            "x".join(map(str, shape)),
            format_cost("latency_s", seconds.median),
            quartiles,
            f"{100 * seconds.spread:.1f} %",
            speed,
        )
    out().print(table)
    load = "unknown" if first.load is None else f"{first.load[0]:g} before, {first.load[1]:g} after (this run included)"
    out().print(
        Text(
            f"Batch {first.batch_size}, {first.threads} thread{'s' if first.threads > 1 else ''}, {first.rounds} "
            f"rounds in turns, {first.clock}. Load average {load}; "
            f"{first.machine['cores']} cores, {first.machine['cpu']}."
        ),
        soft_wrap=True,
    )


def _time(seconds: float) -> str:
    from secateur.cost.budget import format_cost

    return format_cost("latency_s", seconds)


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


app.command()(inspect)
app.command()(compress)
app.command()(distill)


@app.command()
@handle_errors
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
    from secateur.cli import _words as _choices
    from secateur.cli.shared import Inputs
    from secateur.pipeline.workspace import check_model_fits_data
    from secateur.report.run import MeasuredAccuracy
    from secateur.train.evaluate import evaluate as measure

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
        check_model_fits_data(inputs.opened.model, inputs.images, inputs.example(2))
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
@handle_errors
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
    from secateur.cli import _words as _choices
    from secateur.cli.output import print_checks
    from secateur.cli.shared import Inputs
    from secateur.pipeline.verify import verify as run

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
        raise SystemExit(BAD_INPUT)


@app.command()
@handle_errors
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
    from secateur.cli import _words as _choices
    from secateur.cli.output import print_written
    from secateur.cli.shared import Inputs
    from secateur.pipeline.exports import export_files

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
@handle_errors
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
    from secateur.cli import _words as _choices
    from secateur.pipeline.demo import demo as run

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
