"""Losses of an epoch, read from the device rarely."""

import math
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from secateur.errors import TrainingError
from secateur.train._progress import Meter

STEPS_PER_LOOK = 20
"""At most so many steps between two looks at the losses. A look waits for the device, so it must be rare."""

SECONDS_PER_LOOK = 1.0
"""When steps take long, look sooner: somebody may be watching, and one wait per second costs nothing."""


class Ledger:
    """Sums up the losses of one epoch; finds the step of the first that is not finite; remembers what was shown of it.

    Attributes:
        epoch: From 1.
        steps: Steps seen.
        latest: The total loss of the last step looked at.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.steps = 0
        self.latest = math.nan
        self._sums: dict[str, float] = {}
        self._unseen: list[Tensor] = []
        self._shown: list[tuple[int, dict[str, float]]] = []
        self._rate = 0.0
        self._looked = perf_counter()

    def add(self, total: Tensor, parts: Mapping[str, Tensor], rate: float) -> bool:
        """Note the losses of one step, still on the device; says whether it took a look at them."""
        if not self._sums:
            self._sums = dict.fromkeys(["total", *parts], 0.0)
        self._unseen.append(torch.stack([total.detach(), *parts.values()]))
        self.steps += 1
        self._rate = rate
        looks = len(self._unseen) == STEPS_PER_LOOK or perf_counter() - self._looked > SECONDS_PER_LOOK
        if looks:
            self.look(rate)
        return looks

    def look(self, rate: float) -> None:
        """Read the losses not read yet.

        Raises:
            TrainingError: If one of them is not finite.
        """
        rows = torch.stack(self._unseen).tolist() if self._unseen else []
        first = self.steps - len(rows) + 1
        self._unseen.clear()
        self._looked = perf_counter()
        for step, row in enumerate(rows, first):
            if not all(map(math.isfinite, row)):
                values = ", ".join(f"{name} {value:g}" for name, value in zip(self._sums, row, strict=True))
                raise diverged(f"loss ({values})", f"epoch {self.epoch}, step {step}", rate)
            for name, value in zip(self._sums, row, strict=True):
                self._sums[name] += value
            self.latest = row[0]

    def show(self, meter: Meter, numbers: Mapping[str, float]) -> None:
        """Show numbers of the step that was looked at."""
        self._shown.append((self.steps, dict(numbers)))
        meter.step(self.epoch, self.steps, numbers)

    def show_again(self, meter: Meter) -> None:
        """Everything that was shown of the epoch before it was interrupted, so that no log has a gap."""
        for step, numbers in self._shown:
            meter.step(self.epoch, step, numbers)

    @property
    def unshown(self) -> bool:
        """Whether the last step was not shown."""
        return not self._shown or self._shown[-1][0] < self.steps

    @property
    def means(self) -> dict[str, float]:
        """Mean over the steps: "total" and each part; looks at the losses not read yet.

        Raises:
            TrainingError: See `look`.
        """
        self.look(self._rate)
        return {name: value / self.steps for name, value in self._sums.items()}

    def to_json(self) -> dict[str, Any]:
        """A JSON object of everything; looks at the losses not read yet.

        Raises:
            TrainingError: See `look`.
        """
        self.look(self._rate)
        return {"steps": self.steps, "latest": self.latest, "sums": self._sums, "shown": self._shown}

    @classmethod
    def from_json(cls, epoch: int, data: Mapping[str, Any]) -> "Ledger":
        """Inverse of `to_json`."""
        ledger = cls(epoch)
        ledger.steps, ledger.latest = int(data["steps"]), float(data["latest"])
        ledger._sums = {name: float(value) for name, value in data["sums"].items()}
        ledger._shown = [(int(step), dict(numbers)) for step, numbers in data["shown"]]
        return ledger


def diverged(what: str, where: str, rate: float) -> TrainingError:
    """The error for a run whose numbers are no longer finite."""
    return TrainingError(
        f"the {what} must stay finite; that failed at {where} (learning rate {rate:.3g}). "
        "Lower the learning rate or warm up longer, and check that the images are normalised."
    )
