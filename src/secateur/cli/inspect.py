"""The commands that look at a model and write nothing: inspect, evaluate, verify and bench."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.text import Text

from secateur.cli import options
from secateur.cli.options import BenchFlags, ImageFlags, ReadingFlags, SpaceFlags, flag
from secateur.cli.output import end_with_error, handle_errors, logged, out
from secateur.cli.tasks import IMITATION
from secateur.errors import ArtifactError, TrainingError

if TYPE_CHECKING:
    from secateur.cli.tasks import NamedTask
    from secateur.tasks.base import Score


@handle_errors
def inspect_command(
    *,
    model: options.Model,
    weights: options.WeightsFile = None,
    data: options.MaybeData = None,
    images: ReadingFlags = ReadingFlags(),
    space: SpaceFlags = SpaceFlags(),
    tree: Annotated[bool, flag("Show the tree of modules: parameters, MACs, channels.", options.RUN)] = False,
    draw: Annotated[
        Path | None, flag("Also draw the graph: FILE.svg or FILE.dot (graphviz).", options.RUN, value="FILE")
    ] = None,
    as_json: options.AsJson = False,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Show what can be cut: channel axes, what is frozen and why, and the reachable costs.

    Example: secateur inspect --model timm:resnet18
    """
    import json

    from secateur.cli.parsing import Inputs
    from secateur.cli.tables import print_report, print_tree, print_written
    from secateur.pipeline.inspect import inspect_model
    from secateur.report.graph_drawing import check_drawing, write_drawing

    if draw is not None:
        check_drawing(draw)
    cut = space.to_config()
    inputs = Inputs(model, weights, data, ImageFlags(**vars(images)), seed)
    with logged(quiet=as_json):
        inputs.named.task.observe_(inputs.loaded.model)
        report = inspect_model(inputs.loaded.model, inputs.example(1), cut=cut)
    name = inputs.loaded.name
    if as_json:
        out().print(Text(json.dumps({"model": name, **report.to_json()}, indent=1)), soft_wrap=True)
    elif tree:
        print_tree(report, name)
    else:
        print_report(report, name)
    if draw is not None:
        write_drawing(draw, report.graph, name)
    if not as_json:
        print_written([draw] if draw is not None else [])
    if draw is None and not as_json:
        out().print(Text("Nothing written."))


@handle_errors
def evaluate_command(
    *,
    model: options.Model,
    weights: options.WeightsFile = None,
    data: options.Data,
    images: ReadingFlags = ReadingFlags(),
    batch_size: options.BatchSize = None,
    device: options.Device = "auto",
    thread_count: options.Threads = None,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Measure a model or artifact on the test images, by the metric of its task.

    Example: secateur evaluate --model small --data cifar10
    """
    from secateur._runtime import torch_threads
    from secateur.cli import parsing
    from secateur.data.dataset import draw_calibration
    from secateur.pipeline.workspace import check_model_fits_data
    from secateur.train.evaluate import evaluate as run_evaluate

    inputs = parsing.Inputs(model, weights, data, ImageFlags(**vars(images)), seed)
    named = inputs.named
    _refuse_imitation(named)
    with logged(quiet=False), torch_threads(thread_count):
        some, targets = draw_calibration(inputs.images.test, min(2, len(inputs.images.test)), seed=seed)[0]
        check_model_fits_data(inputs.loaded.model, inputs.images, some, named.task, targets)
        found = run_evaluate(
            inputs.loaded.model,
            inputs.images.test,
            task=named.task,
            batch_size=batch_size or (250 if named.classifies else named.batch_size),
            device=parsing.device(device),
        )
    out().print(Text(f"{inputs.loaded.name} on {inputs.images.name}: {_in_words(found)}"), soft_wrap=True)
    out().print(Text("Nothing written."))


def _refuse_imitation(named: "NamedTask") -> None:
    if named.name.startswith(IMITATION):
        raise TrainingError(
            f"`--task` must have a metric of one model alone; got {named.name}, which compares a model with its "
            "original. The report of compress has that distance; name the task of the labels to measure with them."
        )


def _in_words(found: "Score") -> str:
    interval = found.interval
    if interval is None:
        loss = "" if found.loss is None else f", loss {found.loss:.4g}"
        return f"test {found.metric.words} {found.text} of {found.n} images{loss}"
    return (
        f"test accuracy {100 * found.value:.2f} % of {found.n} images (95 % interval {100 * interval[0]:.2f} to "
        f"{100 * interval[1]:.2f} %), cross-entropy {found.loss:.4f} nats"
    )


@handle_errors
def verify_command(
    folder: Annotated[Path | None, flag("The artifact.", options.MODEL_AND_DATA)] = None,
    /,
    *,
    model: Annotated[
        str | None, flag("The artifact; beside FOLDER, what builds its original.", options.MODEL_AND_DATA)
    ] = None,
    data: options.MaybeData = None,
    task: options.TaskText = None,
    void: options.Void = None,
    trust_source: options.TrustSource = False,
    skip_bad_images: options.SkipBadImages = False,
    device: options.Device = "auto",
    thread_count: options.Threads = None,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Check that an artifact is intact and computes what it did; with --data also its accuracy.

    Example: secateur verify small --data cifar10
    """
    from secateur._runtime import torch_threads
    from secateur.cli import parsing
    from secateur.cli.tables import print_checks
    from secateur.pipeline.verify import verify as run

    if folder is None and model is None:
        raise ArtifactError("`verify` must be given one artifact folder; say: secateur verify FOLDER.")
    artifact = Path(str(model)) if folder is None else folder
    factory = None if folder is None or model is None else parsing.factory_of(model, artifact, trust_source)
    flags = ImageFlags(trust_source=trust_source, skip_bad_images=skip_bad_images, task=task, void=void)
    given = (str(artifact.absolute()), None) if factory is None else (str(model), artifact.absolute())
    inputs = parsing.Inputs(*given, data, flags, seed)
    _refuse_imitation(inputs.named)
    with logged(quiet=False), torch_threads(thread_count):
        images = None if data is None else inputs.images
        found = run(
            artifact,
            data=images,
            task=inputs.named.task,
            factory=factory,
            trust_source=trust_source,
            device=parsing.device(device),
        )
    print_checks(found.checks)
    for reason in found.passed_over:
        out().print(Text(reason), soft_wrap=True)
    out().print(Text("Nothing written."))
    if not found.passed:
        raise end_with_error(f"{artifact} does not hold what it says; see FAILED above.")


@handle_errors
def bench_command(
    models: Annotated[list[str], flag("Models or artifacts; the first is compared with.", options.MODEL_AND_DATA)],
    /,
    *,
    trust_source: options.TrustSource = False,
    how: BenchFlags = BenchFlags(),
    as_json: options.AsJson = False,
    image_size: options.ImageSize = None,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Measure the latency of models in turns: warm-up, fixed threads, median and spread.

    Example: secateur bench cifar_resnet20 small --threads 1
    """
    import json

    from secateur.cli.parsing import Inputs
    from secateur.cli.tables import print_latencies
    from secateur.cost.measure import measure_each

    target, flags = how.to_target(), ImageFlags(image_size=image_size, trust_source=trust_source)
    given = [Inputs(name, None, None, flags, seed) for name in models]
    pairs = [(each.loaded.model, (each.example(how.batch),)) for each in given]
    found = measure_each(pairs, target, rounds=how.rounds)
    names = [each.loaded.name for each in given]
    if as_json:
        rows = [{"model": name, **latency.to_json()} for name, latency in zip(names, found, strict=True)]
        out().print(Text(json.dumps(rows, indent=1)), soft_wrap=True)
        return
    print_latencies(names, [list(each.example(1).shape[1:]) for each in given], found)
    out().print(Text("Nothing written."))
