"""Images held in memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.data._augment import Augment, Draws, crop_box, resized_crop
from secateur.data._epoch import Epoch
from secateur.data._finish import Batch
from secateur.data._normalise import Normalisation
from secateur.data._split import checked_classes, checked_labels
from secateur.errors import DataError


@dataclass(frozen=True, eq=False)
class MemorySplit:
    """Images held as bytes, on the CPU and on each device that asked for batches; everything runs there in batch.

    Attributes:
        images: (n, c, h, w) uint8.
        labels: (n,) integers, not negative.
        normalisation: Applied last.
        classes: How many there are; 0 stands for the highest label + 1.
    """

    images: Tensor
    labels: Tensor
    normalisation: Normalisation
    classes: int = 0
    _copies: dict[torch.device, Batch] = field(default_factory=dict[torch.device, Batch], init=False, repr=False)

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            shape = tuple(self.images.shape)
            raise DataError(f"`images` must be uint8 of shape (n, c, h, w); got {self.images.dtype} {shape}.")
        if self.images.shape[1] != len(self.normalisation.mean):
            raise DataError(
                f"`normalisation` must have one mean per channel; got {len(self.normalisation.mean)} for "
                f"{self.images.shape[1]} channel(s)."
            )
        object.__setattr__(self, "labels", checked_labels(self.labels, len(self.images)))
        object.__setattr__(self, "classes", checked_classes(self.labels, self.classes))
        object.__setattr__(self, "images", self.images.contiguous(memory_format=torch.channels_last))

    @property
    def size(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> "MemorySplit":
        """The images at some positions, in that order (copied)."""
        pixels = self.images.permute(0, 2, 3, 1)[index]  # one copy: rows are contiguous in this order
        return MemorySplit(pixels.permute(0, 3, 1, 2), self.labels[index], self.normalisation, self.classes)

    def normalised(self, normalisation: Normalisation) -> "MemorySplit":
        """The same images (shared) with another mean and standard deviation."""
        return MemorySplit(self.images, self.labels, normalisation, self.classes)

    def batches(
        self,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        seed: int | None = None,
        epoch: int = 0,
        augment: Augment | None = None,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[Batch]:
        """See `Split.batches`."""
        return self._batches(
            Epoch.of(
                self,
                batch_size,
                device=device,
                seed=seed,
                epoch=epoch,
                augment=augment,
                drop_last=drop_last,
                start=start,
            )
        )

    def _batches(self, epoch: Epoch) -> Iterator[Batch]:
        images, labels = self._on(epoch.device)
        pixels, draws = images.permute(0, 2, 3, 1), epoch.draws
        placed = None if draws is None else draws.to(epoch.device)
        boxes = None if draws is None else _boxes(draws, epoch.device)
        for place, chosen in epoch.batches:
            index = chosen.to(epoch.device)
            batch = pixels[index]
            if placed is not None:
                batch = placed.vary(batch, index)
            if boxes is not None:
                batch = resized_crop(batch.permute(0, 3, 1, 2).float(), boxes[index]).permute(0, 2, 3, 1)
            if draws is not None and epoch.policy is not None:
                batch = epoch.policy.vary(batch, draws.keys[chosen.numpy()])
            yield epoch.finish(place, index, batch, labels[index])

    def _on(self, device: torch.device) -> Batch:
        device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0": one copy for both names
        if device not in self._copies:
            self._copies[device] = (self.images.to(device), self.labels.to(device))
        return self._copies[device]


def _boxes(draws: Draws, device: torch.device) -> Tensor | None:
    if draws.augment.min_area == 1.0:
        return None
    return torch.tensor([crop_box(crop, draws.augment.min_area) for crop in draws.crops.tolist()]).to(device)
