"""What a command says while it runs and at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.text import Text

from secateur.cli._boundary import BAD_INPUT, err

if TYPE_CHECKING:
    from secateur.pipeline import CompressResult, Distilled


def show(result: CompressResult | Distilled) -> None:
    """The tables of a finished run; ends with an error if a check failed."""
    from secateur.cli._tables import print_before_after, print_checks, print_exports, print_steps, print_written

    print_before_after(result.report)
    print_steps(result.report)
    print_exports(result.report)
    print_checks(result.report.checks)
    print_written(result.files)
    if result.failed:
        err().print(Text("Error: " + "; ".join(result.failed), style="bold red"), soft_wrap=True)
        raise typer.Exit(BAD_INPUT)


def tell(message: str) -> None:
    """A step of the way, on standard error."""
    err().print(Text(message, style="dim"), soft_wrap=True)


def silent(message: str) -> None:
    """Nothing."""
    del message
