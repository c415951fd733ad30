"""An epoch in progress, for checkpoints within it."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.train._checkpoint import Saved
from secateur.train._ledger import Ledger
from secateur.train._machine import random_states, seeded, set_random_states
from secateur.train._parallel import gathered
from secateur.train._progress import Meter

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def nothing() -> None:
    """What a loop calls between steps if nobody saves."""


class Partway:
    """The sums, the time and the random numbers of an epoch, as far as it has come.

    Args:
        epoch: From 0.
        fabric: Device and processes.

    Attributes:
        ledger: Losses so far.
        images: Seen so far.
    """

    def __init__(self, epoch: int, fabric: "Fabric") -> None:
        self.ledger = Ledger(epoch + 1)
        self.images = 0
        self._epoch, self._fabric = epoch, fabric
        self._left: tuple[Tensor, ...] | None = None
        self._spent, self._began = 0.0, perf_counter()

    @property
    def steps(self) -> int:
        """Done so far."""
        return self.ledger.steps

    @property
    def seconds(self) -> float:
        """Wall-clock time spent so far, by all processes that took part one after the other."""
        return self._spent + perf_counter() - self._began

    @contextmanager
    def opened(self, seed: int, meter: Meter) -> Generator[None]:
        """Random numbers of the epoch: from its beginning, or from where it was interrupted.

        Each of several processes has its own. What was shown of the epoch before it was interrupted is shown again, so
        that no log has a gap.

        Args:
            seed: Of the whole run.
            meter: Where the epoch is shown.
        """
        rank = (self._fabric.global_rank,) if self._fabric.world_size > 1 else ()
        with seeded(self._fabric.device, seed, self._epoch, *rank):
            if self._left is not None:
                set_random_states(self._fabric.device, self._left)
            self.ledger.show_again(meter)
            yield

    def numbers(self) -> dict[str, Any]:
        """A JSON object; looks at the losses not read yet.

        Raises:
            TrainingError: If one of them is not finite.
        """
        return {"ledger": self.ledger.to_json(), "images": self.images, "seconds": self.seconds}

    def tensors(self) -> dict[str, Tensor]:
        """Where the random numbers of all processes are, (processes, bytes) for each generator."""
        states = random_states(self._fabric.device)
        return {f"random/{number}": gathered(self._fabric, state).cpu() for number, state in enumerate(states)}

    @classmethod
    def restored(cls, saved: Saved, numbers: Mapping[str, Any], fabric: "Fabric") -> "Partway":
        """Inverse of `numbers` and `tensors`."""
        partway = cls(saved.epoch, fabric)
        partway.ledger = Ledger.from_json(saved.epoch + 1, numbers["ledger"])
        partway.images, partway._spent = int(numbers["images"]), float(numbers["seconds"])
        states = saved.under("random/")
        partway._left = tuple(states[str(number)][fabric.global_rank] for number in range(len(states)))
        return partway
