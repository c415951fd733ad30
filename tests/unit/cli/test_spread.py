"""Groups of flags: typer sees each flag, the command sees one object."""

import inspect
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from secateur.cli.options import expand_dataclasses
from secateur.cli.output import handle_errors
from secateur.cli.shared import WorkFlags
from secateur.errors import ArtifactError
from secateur.pipeline import OnExisting


@dataclass(frozen=True, kw_only=True)
class Weather:
    """Two flags."""

    rain: Annotated[int, typer.Option(help="In mm.", min=0)] = 3
    wind: Annotated[bool, typer.Option("--wind")] = False


def app_of(seen: list[object]) -> typer.Typer:
    @handle_errors
    @expand_dataclasses
    def walk(
        *,
        where: Annotated[str, typer.Option()],
        weather: Weather,
        miles: int = 2,
        debug: Annotated[bool, "handle_errors"] = False,
    ) -> None:
        """Go for a walk."""
        seen.extend([where, weather, miles])

    app = typer.Typer()
    app.command()(walk)
    assert list(inspect.signature(walk).parameters) == ["where", "rain", "wind", "miles", "debug"]
    return app


def test_flags_of_a_group_are_flags_of_the_command():
    seen: list[object] = []
    app = app_of(seen)
    assert CliRunner().invoke(app, ["--where", "hills", "--wind"]).exit_code == 0
    assert seen == ["hills", Weather(rain=3, wind=True), 2]
    wrong = CliRunner().invoke(app, ["--where", "hills", "--rain", "-1"])
    assert wrong.exit_code == 2
    assert "--rain" in wrong.stderr


def test_an_interrupted_run_is_gone_on_with_or_removed():
    assert WorkFlags().leftover is OnExisting.REFUSE
    assert WorkFlags(resume=True).leftover is OnExisting.RESUME
    assert WorkFlags(restart=True).leftover is OnExisting.DISCARD
    with pytest.raises(ArtifactError, match="give one of them"):
        WorkFlags(resume=True, restart=True).leftover  # noqa: B018 - it is what refuses
