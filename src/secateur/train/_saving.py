"""When a long loop writes its checkpoints, and that it obeys a request to stop."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import torch

from secateur.errors import TrainingError
from secateur.train._checkpoint import Saved, save_checkpoint
from secateur.train._parallel import averaged
from secateur.train._stop import Stopped, StopRequest, listening

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Saving:
    """When a loop writes a checkpoint within an epoch. There is always one at the end of every epoch.

    Attributes:
        seconds: As soon as the last one is so old, > 0; infinity for never.
        steps: After so many steps since the last one, >= 1; None for never.
    """

    seconds: float = 600.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.seconds) or self.seconds <= 0:
            raise TrainingError(f"`seconds` between checkpoints must be positive; got {self.seconds}. 600 is usual.")
        if self.steps is not None and self.steps < 1:
            raise TrainingError(f"`steps` between checkpoints must be at least 1; got {self.steps}. None is never.")


class Keeper:
    """Writes the checkpoints of a loop when they are due, the same in all processes.

    Args:
        folder: Where; None writes none.
        saving: When.
        request: That the loop shall stop.
        fabric: The processes of the loop; the first one writes.
    """

    def __init__(self, folder: Path | None, saving: Saving, request: StopRequest, fabric: "Fabric") -> None:
        self._folder, self._saving, self._request, self._fabric = folder, saving, request, fabric
        self._steps, self._written = 0, monotonic()

    def between(self, state: Callable[[], Saved]) -> None:
        """To be called after every step: writes a checkpoint if one is due, and stops if that was asked for.

        Args:
            state: Gives what a checkpoint holds.

        Raises:
            Stopped: After a checkpoint.
            TrainingError: If the checkpoint cannot be written.
        """
        self._steps += 1
        due = monotonic() - self._written >= self._saving.seconds
        due = due or (self._saving.steps is not None and self._steps >= self._saving.steps)
        due, stop = self._agreed(due, self._request.asked)
        if due or stop:
            self.save(state)
        if stop:
            raise Stopped(self._folder)

    def save(self, state: Callable[[], Saved]) -> None:
        """Write a checkpoint now.

        Raises:
            TrainingError: If it cannot be written.
        """
        self._steps, self._written = 0, monotonic()
        if self._folder is None:
            return
        saved = state()  # By all processes: it may hold something of each.
        if self._fabric.is_global_zero:
            save_checkpoint(self._folder, saved)
        if self._fabric.world_size > 1:
            self._fabric.barrier()

    def end(self) -> None:
        """To be called when the loop is through.

        Raises:
            Stopped: If that was asked for since the last step.
        """
        if self._agreed(self._request.asked)[0]:
            raise Stopped(self._folder)

    def _agreed(self, *wishes: bool) -> tuple[bool, ...]:
        """What any process wishes; clocks and signals differ, and all must do the same."""
        if self._fabric.world_size == 1:
            return wishes
        said = torch.tensor(wishes, dtype=torch.float32, device=self._fabric.device)
        return tuple(wish > 0 for wish in averaged(self._fabric, said).tolist())


@contextmanager
def keeping(folder: Path | None, saving: Saving, fabric: "Fabric") -> Generator[Keeper]:
    """A loop that keeps checkpoints and obeys `stoppable`: it ends with `Stopped` if that is asked for meanwhile.

    Args:
        folder: For checkpoints; None writes none.
        saving: When they are written within an epoch.
        fabric: The processes of the loop.
    """
    with listening() as request:
        keeper = Keeper(folder, saving, request, fabric)
        yield keeper
        keeper.end()
