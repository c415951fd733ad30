"""The command line in this process, for tests."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.cli import main
from secateur.cli.process import BUG


@dataclass(frozen=True)
class Result:
    """How a command ended.

    Attributes:
        exit_code: As the shell would see it; 1 after an exception that is no ``SystemExit``.
        stdout: What it printed on standard output.
        stderr: What it printed on standard error.
        output: Both, in the order in which they were printed.
        exception: The exception that ended it, if it was no ``SystemExit``.
    """

    exit_code: int
    stdout: str
    stderr: str
    output: str
    exception: BaseException | None = None


Run = Callable[..., Result]


class _Copied(io.BytesIO):
    """Bytes that are also written to another stream."""

    def __init__(self, both: io.BytesIO) -> None:
        super().__init__()
        self._both = both

    def write(self, data: Any, /) -> int:
        self._both.write(data)
        return super().write(data)


def outcome(command: Callable[[list[str]], object], *words: object) -> Result:
    """Run a command in this process; its streams take text that UTF-8 can hold, and nothing else."""
    both = io.BytesIO()
    out, err = _Copied(both), _Copied(both)
    streams = [io.TextIOWrapper(stream, encoding="utf-8", write_through=True) for stream in (out, err)]
    code, exception = 0, None
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            command([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException as error:
            code, exception = 1, error
    texts = [stream.getvalue().decode() for stream in (out, err, both)]
    return Result(code, *texts, exception)


def secateur(*words: object) -> Result:
    """Run the command line in this process; a bug raises here."""
    found = outcome(main, *words)
    if found.exception is not None:
        raise found.exception
    assert found.exit_code != BUG, found.output
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


def compress_words(weights: Path, out: Path, budget: str = "macs=50%", *, quick: bool = False) -> tuple[object, ...]:
    """The words of a small run; a quick one compares and exports no candidates, which takes ten times as long."""
    return (
        *("compress", "--model", "digits_resnet", "--weights", weights, "--data", "digits", "--budget", budget),
        *("--out", out, "--threads", 1, "--calibration", 256, "--batch-size", 64),
        *(("--strategy", "knapsack", "--divisor", 1, "--target", "torch") if quick else ()),
    )
