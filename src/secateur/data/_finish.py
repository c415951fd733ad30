"""The last steps of a batch, on its device: normalise, erase, mix."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.data._again import Floats
from secateur.data._augment import Augment
from secateur.data._erase import erase_, erased_boxes
from secateur.data._mix import Mix, drawn_mixes
from secateur.data._normalise import Normalisation

Batch = tuple[Tensor, Tensor]
"""(n, c, h, w) float32 normalised images, channels last in memory, and labels on the same device: (n,) int64, or
float32 probabilities (n, classes) where images are mixed."""


@dataclass(frozen=True, eq=False)
class Finish:
    """What makes a batch of an epoch's bytes.

    Attributes:
        normalisation: Applied first.
        classes: Columns of mixed labels.
        boxes: (n, 4) of every image of the split, on the device, see `secateur.data._erase`; None erases nothing.
        mixes: Of every batch; empty mixes nothing.
        floats: Memory of the batches.
    """

    normalisation: Normalisation
    classes: int = 0
    boxes: Tensor | None = None
    mixes: tuple[Mix, ...] = ()
    floats: Floats = field(default_factory=Floats)

    @classmethod
    def of_epoch(
        cls,
        normalisation: Normalisation,
        augment: Augment,
        *,
        images: int,
        size: tuple[int, int, int],
        classes: int,
        batches: int,
        device: torch.device,
        seed: int,
        epoch: int,
    ) -> "Finish":
        """Draw what an epoch needs."""
        _, height, width = size
        boxes, mixes = None, ()
        if augment.erase:
            boxes = erased_boxes(images, augment.erase, height, width, seed=seed, epoch=epoch).to(device)
        if augment.mixes:
            mixes = drawn_mixes(augment, batches, height, width, seed=seed, epoch=epoch)
        return cls(normalisation, classes, boxes, mixes)

    def __call__(self, place: int, index: Tensor, pixels: Tensor, labels: Tensor) -> Batch:
        """One batch.

        Args:
            place: Of the batch in the epoch, from 0.
            index: (n,) the positions of its images in the split, on the device.
            pixels: (n, h, w, c), uint8 or float in [0, 255]; on the device.
            labels: (n,) int64, on the device.
        """
        images = self.normalisation(pixels, self.floats)
        if self.boxes is not None:
            images = erase_(images, self.boxes[index])
        if self.mixes:
            mix = self.mixes[place]
            return mix.images_(images), mix.labels(labels, self.classes)
        return images, labels
