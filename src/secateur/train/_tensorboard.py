"""A long loop as curves in TensorBoard."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import TrainingError
from secateur.train._progress import Meter, Progress, TerminalProgress

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@dataclass(frozen=True)
class TensorBoard:
    """Logs all numbers as scalars for ``tensorboard --logdir FOLDER``, and hands everything on.

    Each kind of loop is a run of its own, ``<folder>/<what>``, with the scalars ``<what>/<name>``. Numbers of steps
    and of epochs share one time axis, the steps since the beginning of the loop. A resumed loop goes on where its
    checkpoint was: what an interrupted process logged after that is replaced. A loop that begins anew replaces
    everything.

    Attributes:
        folder: Where the event files go; made if it is not there.
        inner: Shows the loop as well.

    Raises:
        TrainingError: If the package tensorboard is not installed, or the folder is a file.
    """

    folder: Path
    inner: Progress = TerminalProgress()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if find_spec("tensorboard") is None:
            raise TrainingError(
                "`TensorBoard` must have the package tensorboard; got none. Run: pip install tensorboard"
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise TrainingError(f"`folder` must be a folder for event files; got the file {self.folder}. Name another.")

    @contextmanager
    def watch(self, what: str, *, epochs: int, steps: int, done: int) -> Generator[Meter]:
        """See `Progress.watch`."""
        from torch.utils.tensorboard import SummaryWriter

        # Steps up to the checkpoint are on disk and stay; step 0 is what was measured before the loop.
        first = done * steps + 1 if done else 0
        with (
            SummaryWriter(self.folder / what, purge_step=first) as writer,
            self.inner.watch(what, epochs=epochs, steps=steps, done=done) as inner,
        ):
            yield _ScalarMeter(writer, inner, what, steps)


class _ScalarMeter:
    def __init__(self, writer: "SummaryWriter", inner: Meter, what: str, steps: int) -> None:
        self._writer, self._inner, self._what, self._steps = writer, inner, what, steps

    def step(self, epoch: int, step: int, numbers: Mapping[str, float]) -> None:
        self._add(numbers, (epoch - 1) * self._steps + step)
        self._inner.step(epoch, step, numbers)

    def epoch(self, epoch: int, numbers: Mapping[str, float], line: str) -> None:
        self._add(numbers, epoch * self._steps)
        self._writer.flush()  # Before the checkpoint that follows: a killed process loses nothing it can go on from.
        self._inner.epoch(epoch, numbers, line)

    def _add(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(f"{self._what}/{name}", value, step)
