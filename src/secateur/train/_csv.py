"""The epochs of long loops as a table in a file."""

import csv
import io
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from secateur.errors import TrainingError
from secateur.train._files import write_whole
from secateur.train._progress import Meter, Progress, TerminalProgress

_LOOP, _EPOCH = "loop", "epoch"

Row = dict[str, str]


@dataclass(frozen=True)
class CsvLog:
    """Keeps a table of all epochs, and hands everything on.

    A row is an epoch: which loop it is of (``train``, ``search``), its number, then every number of it by name, empty
    where a loop has no such number. The file is whole at any moment, and written anew with every epoch. A resumed loop
    goes on where its checkpoint was: rows after that are replaced. A loop that begins anew replaces all rows of its
    kind.

    Attributes:
        path: The file; made with the first epoch.
        inner: Shows the loop as well.
    """

    path: Path
    inner: Progress = TerminalProgress()  # noqa: RUF009 - frozen

    @contextmanager
    def watch(self, what: str, *, epochs: int, steps: int, done: int) -> Generator[Meter]:
        """See `Progress.watch`.

        Raises:
            TrainingError: If the file is no such table, or cannot be written.
        """
        # Epoch 0 is what was measured before the loop; one that goes on has it already, also within its first epoch.
        rows = [row for row in _read(self.path) if row[_LOOP] != what or int(row[_EPOCH]) <= done]
        with self.inner.watch(what, epochs=epochs, steps=steps, done=done) as inner:
            yield _RowMeter(self.path, rows, what, inner)


class _RowMeter:
    def __init__(self, path: Path, rows: list[Row], what: str, inner: Meter) -> None:
        self._path, self._rows, self._what, self._inner = path, rows, what, inner

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        self._inner.step(epoch, step, numbers)

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        named = {name: repr(float(value)) for name, value in numbers.items()}
        # One that begins anew measures epoch 0 again.
        self._rows = [row for row in self._rows if row[_LOOP] != self._what or int(row[_EPOCH]) < epoch]
        self._rows.append({_LOOP: self._what, _EPOCH: str(epoch), **named})
        _write(self._path, self._rows)  # Before the checkpoint that follows: nothing that it has done is missing.
        self._inner.epoch(epoch, numbers, line)


def _read(path: Path) -> list[Row]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file, strict=True)
            if list(table.fieldnames or ())[:2] != [_LOOP, _EPOCH]:
                raise ValueError(f"the first line is {','.join(table.fieldnames or ())!r:.80}")
            rows = [{name: value for name, value in row.items() if value} for row in table]
        for row in rows:
            int(row[_EPOCH])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, AttributeError, csv.Error) as error:
        raise TrainingError(
            f"{path} must be a table of epochs, begun by an earlier part of this run; got something else ({error}). "
            "Move it away."
        ) from error
    return rows


def _write(path: Path, rows: list[Row]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    try:
        write_whole(path, text.getvalue().encode())
    except OSError as error:
        raise TrainingError(
            f"{path} must be a file that can be written; {error}. Make room or mend the permissions, and go on."
        ) from error
