"""A teacher at work: its logits for every batch, looked after."""

import math
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from secateur.errors import TrainingError
from secateur.train._evaluate import hits
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
        self._left: tuple[Mapping[str, int], Mapping[str, Tensor]] | None = None

    def begin(self, epoch: int) -> None:
        """Open an epoch, from 0; where it was interrupted if that was said."""
        self._step = self._images = 0
        self._sound = self._right = None
        if self._memory is not None:
            self._memory.begin(epoch)
        if self._left is not None:
            self._go_on(*self._left)
            self._left = None

    def resume_with(self, numbers: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Have the next epoch go on where `numbers` and `tensors` were taken."""
        self._left = numbers, tensors

    def _go_on(self, numbers: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        self._step, self._images, self._classes = numbers["step"], numbers["images"], numbers["classes"]
        self._sound, self._right = tensors.get("sound"), tensors.get("right")
        if self._memory is not None:
            self._memory.take_up(tensors)

    def numbers(self) -> dict[str, int]:
        """How far the epoch has come, as a JSON object."""
        return {"step": self._step, "images": self._images, "classes": self._classes}

    def tensors(self) -> dict[str, Tensor]:
        """What was found so far in the epoch, and what is to be remembered of it."""
        found = {} if self._memory is None else self._memory.noted()
        if self._sound is not None and self._right is not None:
            found |= {"sound": self._sound, "right": self._right}
        return found

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
        sound, right = found.isfinite().all(), hits(found, labels)
        self._sound = sound if self._sound is None else self._sound.to(sound.device) & sound
        self._right = right if self._right is None else self._right.to(right.device) + right
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
