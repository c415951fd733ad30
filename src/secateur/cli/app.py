"""The command line: its commands, how its words are read, and the commands ``export`` and ``demo``."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from cyclopts.exceptions import MissingArgumentError, UnknownCommandError, UnusedCliTokensError
from cyclopts.help import DefaultFormatter
from rich.text import Text

from secateur.cli import options
from secateur.cli.compare import compare_command
from secateur.cli.compress import compress_command
from secateur.cli.distill import distill_command
from secateur.cli.inspect import bench_command, evaluate_command, inspect_command, verify_command
from secateur.cli.options import ImageFlags, LoadingFlags, flag
from secateur.cli.output import PlainConsole, command_line, end_with_error, err, handle_errors, logged, out
from secateur.cli.process import last_guard, modules_of_working_folder, open_streams
from secateur.cli.train import train_command
from secateur.errors import ArtifactError, ModelError

_HELP_WIDTH = 100


@handle_errors
def export_command(
    *,
    model: options.Model,
    weights: options.WeightsFile = None,
    data: options.MaybeData = None,
    loading: LoadingFlags = LoadingFlags(),
    out_folder: Annotated[
        Path | None, flag("Folder for the files; the artifact by default.", options.RUN, name="--out")
    ] = None,
    formats: Annotated[options.Export, Parameter(name="--export")] = "onnx",
    onnx: options.OnnxFlags = options.OnnxFlags(),
    image_size: options.ImageSize = None,
    seed: options.Seed = 0,
    debug: options.Debug = False,
) -> None:
    """Write a model or artifact for other runtimes, and check that the files agree with it.

    Example: secateur export --model small --export onnx,int8 --data cifar10
    """
    from secateur.cli import parsing
    from secateur.cli.tables import print_written
    from secateur.pipeline.exports import export_files

    wanted, settings = parsing.formats(formats), onnx.to_config()
    flags = ImageFlags(**vars(loading), image_size=image_size)
    inputs = parsing.Inputs(model, weights, data, flags, seed)
    with logged(quiet=False):  # The model is loaded with the images, of which there may be many.
        given = inputs.loaded
    if out_folder is None and given.manifest is None:
        raise ModelError(
            "`--out` must say where the files go, as neither --model nor --weights is an artifact folder; got none."
        )
    where = out_folder or inputs.artifact or Path(model)
    if where.exists() and not where.is_dir():
        raise ArtifactError(f"`--out` must be a folder; got a file: {where}. Choose another path.")
    with logged(quiet=False):
        images = None if data is None else inputs.classified
    written = export_files(given.model, inputs.example(4), where, wanted, data=images, onnx=settings)
    for path, agreed in written.items():
        print_written([path])
        out().print(Text(str(agreed)), soft_wrap=True)


@handle_errors
def demo_command(
    *,
    out_folder: options.Out = Path("secateur-demo"),
    export: options.Export = "onnx",
    seed: options.Seed = 0,
    thread_count: options.Threads = 1,  # the networks are so small that a second thread only waits
    quiet: options.Quiet = False,
    tensorboard: options.TensorBoardFolder = None,
    debug: options.Debug = False,
) -> None:
    """Train a small network on handwritten digits, compress it to 30 % of its MACs, and show the proof.

    Example: secateur demo --out demo
    """
    from secateur._runtime import torch_threads
    from secateur.cli import parsing
    from secateur.cli.tables import print_speed, show
    from secateur.pipeline.config import RunConfig
    from secateur.pipeline.demo import demo as run

    formats, callbacks = parsing.formats(export), parsing.callbacks(quiet, tensorboard)
    with logged(quiet=quiet), torch_threads(thread_count):
        result = run(out_folder, export=formats, run=RunConfig(seed=seed, callbacks=callbacks, command=command_line()))
    show(result)
    print_speed(result.report)
    out().print(Text(f"Open {out_folder / 'report.html'} in a browser. Check it again: secateur verify {out_folder}"))


def _version() -> str:
    from secateur import __version__

    return f"secateur {__version__}"


app = App(
    name="secateur",
    help="Prune, distill and export neural networks: a trained vision model and a budget go in, a smaller, verified "
    "model comes out.\n\nExample: secateur compress --model timm:resnet18 --data images --budget macs=50% --out small",
    help_format="plaintext",
    version=_version,
    default_parameter=Parameter(negative=(), allow_repeating=True),
    end_of_options_delimiter="",
    help_formatter=DefaultFormatter(),
)
for _command, _words in (
    (inspect_command, ""),
    (compress_command, ""),
    (compare_command, ""),
    (distill_command, ""),
    (train_command, ""),
    (evaluate_command, ""),
    (verify_command, "FOLDER "),
    (export_command, ""),
    (bench_command, "MODELS... "),
    (demo_command, ""),
):
    # Cyclopts would derive the usage, which takes a quarter of the time that --help does.
    _name = _command.__name__.removesuffix("_command")
    app.command(_command, name=_name, usage=f"Usage: secateur {_name} {_words}[OPTIONS]")
app.register_install_completion_command()


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line; ``words`` are those of the process by default, whose streams are then checked too."""
    if words is None:
        with open_streams():
            _run(sys.argv[1:])
    else:
        _run(list(words))


def _run(words: list[str]) -> None:
    if not words:
        app.help_print([], console=_help_console(stderr=True))
        raise SystemExit(2)
    debug = "--debug" in words
    with last_guard(debug=debug, out_folder=None):
        try:
            command, bound, _ = app.parse_args(
                words, console=_help_console(), error_console=err(), exit_on_error=False, print_error=False
            )
        except CycloptsError as error:
            raise end_with_error(_words_for(error, words)) from None
    out_folder = bound.kwargs.get("out_folder")
    trusted = "--trust-source" in words
    with (
        last_guard(debug=debug, out_folder=out_folder if isinstance(out_folder, Path) else None),
        modules_of_working_folder() if trusted else nullcontext(),
    ):
        command(*bound.args, **bound.kwargs)


def _help_console(*, stderr: bool = False) -> PlainConsole:
    """Return a console no wider than lines that are easy to read."""
    console = PlainConsole(stderr=stderr, highlight=False, markup=False)
    console.width = min(console.width, _HELP_WIDTH) if console.is_terminal else _HELP_WIDTH
    return console


def _words_for(error: CycloptsError, words: Sequence[str]) -> str:
    """Say what was wrong with the words of a command, and where its flags are described."""
    if isinstance(error, UnknownCommandError):
        return f"{error}\nUsage: secateur COMMAND [OPTIONS]; `secateur --help` describes the commands."
    help_hint = f"`secateur {words[0]} --help` describes the flags."
    if isinstance(error, UnusedCliTokensError):
        return f"Unexpected words: {' '.join(error.unused_tokens or ())}. {help_hint}"
    if isinstance(error, MissingArgumentError) and error.argument is not None and not error.keyword:
        unknown = [word for word in error.unused_tokens or () if word.startswith("--")]
        also = f", and `{unknown[0]}` is unknown" if unknown else ""
        return f"`{error.argument.name}` must be given{also}. {help_hint}"
    return f"{error} {help_hint}"
