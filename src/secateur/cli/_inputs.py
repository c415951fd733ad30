"""A model and its images, from the words of the command line."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from secateur.artifact import is_artifact
from secateur.data import ImageData, calibration, load_data
from secateur.errors import DataError
from secateur.pipeline import Opened, open_model, usual_size


@dataclass(frozen=True)
class Inputs:
    """What ``--model``, ``--weights``, ``--data`` and the flags about images say; loaded when first used.

    An artifact knows how its images are to be normalised and sized, so it is opened before the data; another model is
    built with the data's classes and channels, so it is opened after.
    """

    model: str
    weights: Path | None
    data: str | None
    image_size: int | None = None
    trust_source: bool = False
    seed: int = 0
    limit: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    validation_fraction: float = 0.1

    @cached_property
    def images(self) -> ImageData:
        """The image set."""
        assert self.data is not None
        size, mean, std = self.image_size, self.mean, self.std
        if is_artifact(self.model) and self.opened.manifest is not None:
            recipe = self.opened.manifest.recipe
            mean, std = mean or recipe.mean or None, std or recipe.std or None
            _, height, width = recipe.input_shape
            size = size or (height if height == width else None)
        return load_data(
            self.data,
            limit=self.limit,
            validation_fraction=self.validation_fraction,
            seed=self.seed,
            image_size=size,
            mean=mean,
            std=std,
        )

    @cached_property
    def opened(self) -> Opened:
        """The model."""
        return self.opened_for(self.images if self.data is not None and not is_artifact(self.model) else None)

    def opened_for(self, images: ImageData | None) -> Opened:
        """The model for an image set: with its classes and channels, unless it is an artifact."""
        sized = None if is_artifact(self.model) else images
        return open_model(
            self.model,
            weights=self.weights,
            num_classes=None if sized is None else len(sized.classes),
            in_channels=None if sized is None else sized.size[0],
            trust_source=self.trust_source,
            seed=self.seed,
        )

    def example(self, n: int) -> Tensor:
        """A few images: real ones if there is data, else noise of the size that the model was made for."""
        if self.data is not None:
            return calibration(self.images.train, n, seed=self.seed)[0][0]
        channels, height, width = usual_size(self.opened)
        if self.image_size is not None:
            height = width = self.image_size
        if min(channels, height, width) < 1:
            raise DataError(f"`--image-size` must be positive; got {height} x {width}. Say --image-size 224.")
        return torch.randn(n, channels, height, width, generator=torch.Generator().manual_seed(self.seed))
