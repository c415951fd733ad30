"""Groups of flags: the user sees each flag, the command sees one object, and the defaults are those of Python."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import pytest
from command_line import outcome, secateur
from cyclopts import App, Parameter

from secateur.cli.compress import compress_command
from secateur.cli.distill import DistillTrainFlags
from secateur.cli.options import (
    RUN,
    BenchFlags,
    CutFlags,
    ImageFlags,
    RecoveryFlags,
    RunFlags,
    SearchFlags,
    SpaceFlags,
    TargetFlags,
    TrainFlags,
    flag,
    whole_number,
)
from secateur.cli.output import handle_errors
from secateur.cli.parsing import formats, strategy
from secateur.cost import OnnxRuntime, measure, measure_all, measure_pairs
from secateur.data import load_data
from secateur.distill.objective import Objective
from secateur.errors import ArtifactError
from secateur.graph import trace
from secateur.pipeline import DEFAULT_SPACE, CutConfig, RecoveryConfig, RunConfig, distill_model, inspect_model
from secateur.pipeline.compress import compress as compress_in_python
from secateur.pipeline.config import DEFAULT_STRATEGY
from secateur.pipeline.workspace import OnExisting
from secateur.search import Fastest, SearchSpace, search_architecture


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Weather:
    """Two flags."""

    rain: Annotated[int, whole_number("Rain in mm.", RUN, least=0)] = 3
    wind: Annotated[bool, flag("Wind.", RUN)] = False


def app_of(seen: list[object]) -> App:
    @handle_errors
    def walk(*, where: str, weather: Weather = Weather(), miles: int = 2, debug: bool = False) -> None:
        """Go for a walk."""
        seen.extend([where, weather, miles])

    app = App(result_action="return_value")
    app.default(walk)
    return app


def test_flags_of_a_group_are_flags_of_the_command():
    seen: list[object] = []
    app = app_of(seen)
    assert outcome(app, "--where", "hills", "--wind").exit_code == 0
    assert seen == ["hills", Weather(rain=3, wind=True), 2]
    wrong = outcome(app, "--where", "hills", "--rain", "-1")
    assert wrong.exit_code != 0
    assert "--rain" in wrong.output


def test_an_interrupted_run_is_continued_or_removed():
    assert RunFlags().on_existing is OnExisting.ERROR
    assert RunFlags(resume=True).on_existing is OnExisting.RESUME
    assert RunFlags(restart=True).on_existing is OnExisting.OVERWRITE
    with pytest.raises(ArtifactError, match="give one of them"):
        RunFlags(resume=True, restart=True).on_existing  # noqa: B018 - it is what refuses


def test_the_defaults_of_the_flags_are_those_of_python():
    assert CutFlags().to_config() == CutConfig()
    assert RecoveryFlags().to_config(seed=0) == RecoveryConfig()
    assert RunFlags().to_config() == RunConfig()
    defaults = inspect.signature(compress_in_python).parameters
    assert strategy(SearchFlags()) is defaults["strategy"].default
    assert TargetFlags().to_target() == defaults["target"].default == OnnxRuntime()
    assert formats(RunFlags().export) == defaults["export"].default


def test_the_defaults_of_single_flags_are_those_of_the_functions():
    def default_of(function: Callable[..., object], name: str) -> object:
        return inspect.signature(function).parameters[name].default

    assert SpaceFlags().to_config() == default_of(inspect_model, "cut") == CutConfig()
    assert SpaceFlags().to_config().space == default_of(search_architecture, "space") == SearchSpace() == DEFAULT_SPACE
    assert SpaceFlags().to_config().heads is default_of(trace, "heads")
    for name in ("limit", "validation_fraction", "image_size", "mean", "std", "skip_bad_images"):
        assert getattr(ImageFlags(), name) == default_of(load_data, name), name
    for function in (measure, measure_all, measure_pairs):
        assert default_of(function, "rounds") == BenchFlags().rounds
    assert BenchFlags().to_target() == TargetFlags().to_target() == default_of(compress_in_python, "target")
    assert default_of(distill_model, "export") == formats(RunFlags().export)
    assert default_of(distill_model, "run") == RunFlags().to_config()
    assert default_of(distill_model, "execution") == DistillTrainFlags().execution
    assert DistillTrainFlags().temperature == Objective().temperature
    assert Fastest() == DEFAULT_STRATEGY


def test_the_groups_of_a_command_have_the_defaults_of_their_classes():
    for parameter in inspect.signature(compress_command).parameters.values():
        if isinstance(parameter.annotation, type) and parameter.annotation.__name__.endswith("Flags"):
            assert parameter.default == parameter.annotation()
    assert replace(DistillTrainFlags(), epochs=1, learning_rate=0.01).to_train(0) == TrainFlags().to_train(0)


COMMANDS = ("inspect", "compress", "compare", "distill", "train", "evaluate", "verify", "export", "bench", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_first_and_fits_two_screens(command: str):
    lines = secateur(command, "--help").stdout.splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) <= 100
    first_panel = next(number for number, line in enumerate(lines) if line.startswith("╭"))
    assert any(line.startswith(f"Example: secateur {command}") for line in lines[:first_panel])
    assert any(line.startswith("╭─ Advanced") for line in lines)


def test_completion_can_be_installed():
    assert "--install-completion" in secateur("--help").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("compress", "--data", "digits"), "`--model` must be given. `secateur compress --help` describes the flags."),
        (("demo", "--nothing"), "Unknown option: --nothing."),
        (("demo", "--sede", 3), "Did you mean --seed?"),
        (("compress", "--modle", "x"), "`--model` must be given, and `--modle` is unknown."),
        (("inspect", "--model"), "--model"),
        (
            ("inspect", "--model", "digits_resnet", "--divisor", "two"),
            'Invalid value for --divisor: unable to convert "two" into int',
        ),
        *(
            (("inspect", "--model", "digits_resnet", flag, "1.5"), f'Invalid value for {flag}: unable to convert "1.5"')
            for flag in ("--divisor", "--min-width", "--seed")
        ),
        (("inspect", "--model", "digits_resnet", "--divisor", 0), "Must be >= 1"),
        (("inspect", "--model", "digits_resnet", "--attention", "all"), 'Choose from: "heads", "dimensions"'),
        (("inspect", "--model", "digits_resnet", "--no-untied"), "Unknown option: --no-untied"),
        (("inspect", "--model", "digits_resnet", "more"), "Unexpected words: more."),
        (("prune",), 'Unknown command "prune"'),
    ],
)
def test_wrong_words_end_with_code_2_and_one_message(words: tuple[object, ...], message: str):
    found = secateur(*words)
    assert found.exit_code == 2
    assert found.stdout == ""
    assert message in " ".join(found.stderr.split())
    assert found.stderr.startswith("Error: ")
    assert "Traceback" not in found.stderr


def test_without_a_command_the_help_is_shown_and_the_code_is_2():
    found = secateur()
    assert found.exit_code == 2
    assert "compress" in found.stderr
