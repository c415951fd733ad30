"""The command line in this process, for tests."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from secateur.cli.app import app

Run = Callable[..., Result]


def secateur(*words: object) -> Result:
    """Run the command line in this process; a bug raises here."""
    found = CliRunner().invoke(app, [str(word) for word in words])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found


@dataclass(frozen=True)
class Small:
    """A finished run on digits.

    Attributes:
        weights: Of the original digits_resnet.
        folder: The artifact.
        said: What the command printed.
    """

    weights: Path
    folder: Path
    said: Result


def compress_words(weights: Path, out: Path, budget: str = "macs=50%") -> tuple[object, ...]:
    """The words of a small run."""
    return (
        *("compress", "--model", "digits_resnet", "--weights", weights, "--data", "digits", "--budget", budget),
        *("--out", out, "--threads", 1, "--calibration", 256, "--batch-size", 64),
    )
