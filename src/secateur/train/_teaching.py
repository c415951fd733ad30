"""A teacher at work: its logits for every batch, looked after."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from secateur.errors import TrainingError
from secateur.train._remember import RememberedLogits

_DEVIATIONS = 2.0
"""A teacher that guesses is rarely so many standard deviations above chance."""


class Teaching:
    """Gives a teacher's logits, from memory where there is one, and finds out whether it has anything to teach.

    Args:
        teach: The teacher, ready to be called with a batch.
        memory: Logits on disk; None computes all.
    """

    def __init__(self, teach: Callable[[Tensor], Tensor], memory: RememberedLogits | None) -> None:
        self._teach, self._memory = teach, memory
        self._step = self._images = self._classes = 0
        self._sound: Tensor | None = None
        self._right: Tensor | None = None

    def begin(self, epoch: int) -> None:
        """Open an epoch, from 0."""
        self._step = self._images = 0
        self._sound = self._right = None
        if self._memory is not None:
            self._memory.begin(epoch)

    def logits(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the teacher says to the next batch of the epoch; without gradients."""
        found = None if self._memory is None else self._memory.find(self._step, images)
        if found is None:
            with torch.no_grad():
                found = self._teach(images)
            if self._memory is not None:
                self._memory.keep(images, found)
        self._step += 1
        if found.ndim == 2:  # Anything else is refused by the losses, with a better message.
            self._note(found, labels)
        return found

    def _note(self, found: Tensor, labels: Tensor) -> None:
        # On the device, without waiting for it.
        sound, right = found.isfinite().all(), (found.argmax(1) == labels).sum()
        self._sound = sound if self._sound is None else self._sound & sound
        self._right = right if self._right is None else self._right + right
        self._images += len(labels)
        self._classes = found.shape[1]

    def check(self) -> None:
        """Refuse a teacher that has said something that is no number in this epoch; waits for the device.

        Raises:
            TrainingError: If so.
        """
        if self._sound is not None and not bool(self._sound):
            raise TrainingError(
                "`teacher` must give finite logits; got NaN or infinity for training images. Check its weights and "
                "the normalisation of the images, and try Precision.FLOAT32."
            )

    def end(self) -> None:
        """Close the epoch; warns after the first one of a teacher that guesses.

        Raises:
            TrainingError: See `check`.
        """
        self.check()
        if self._memory is not None:
            self._memory.end()

    def warn_of_guessing(self) -> None:
        """Warn of a teacher that was no better than chance in this epoch."""
        if self._right is None:
            return
        share, chance = int(self._right) / self._images, 1 / self._classes
        if share <= chance + _DEVIATIONS * math.sqrt(chance * (1 - chance) / self._images):
            warnings.warn(
                f"`teacher` is right on {100 * share:.1f} % of {self._images} training images, no better than chance "
                f"({100 * chance:.1f} %): check its weights, its classes and the normalisation of the images",
                stacklevel=2,
            )
