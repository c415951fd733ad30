"""Recipes for training a network from its beginning: epochs, rates, decay, augmentation, each with its source."""

from collections.abc import Mapping

from secateur._kinds import settings
from secateur.train.config import SGD, AdamW, TrainConfig


@settings
class TrainRecipe:
    """How a network is trained on labels alone.

    Attributes:
        train: Epochs, batch size, learning rate with its warm-up and half cosine, optimizer, moving average.
        source: Where the numbers are from, and what is different.
        auto_augment: A policy beside what the data set has by default (shifts and flips for small color images, resized
            crops for photographs), see `secateur.data.Augment`.
        label_smoothing: Share of each label that is spread over all classes.
    """

    train: TrainConfig
    source: str
    auto_augment: str | None = None
    label_smoothing: float = 0.0


RECIPES: Mapping[str, TrainRecipe] = {
    "cifar-resnet": TrainRecipe(
        TrainConfig(
            epochs=200,
            batch_size=128,
            learning_rate=0.1,
            warmup_fraction=5 / 200,
            optimizer=SGD(weight_decay=5e-4, vector_weight_decay=5e-4),
        ),
        "He et al., arXiv:1512.03385, Section 4.2: 0.1, batch 128, shifts by up to 4 pixels and flips. A cosine "
        "instead of steps, Nesterov's momentum, and a decay of 5e-4 instead of 1e-4, as TAS has them.",
    ),
    "cifar-strong": TrainRecipe(
        TrainConfig(
            epochs=300,
            batch_size=128,
            learning_rate=0.1,
            warmup_fraction=5 / 300,
            optimizer=SGD(weight_decay=5e-4),
            ema_decay=0.9995,
        ),
        "Ours: cifar-resnet with RandAugment (arXiv:1909.13719), label smoothing, a moving average of the weights, no "
        "decay of norms, and half as many epochs again.",
        "rand-m5-n2-mstd0.5",
        0.1,
    ),
    "tas": TrainRecipe(
        TrainConfig(
            epochs=305,
            batch_size=256,
            learning_rate=0.1,
            warmup_fraction=5 / 305,
            optimizer=SGD(weight_decay=5e-4, vector_weight_decay=5e-4),
        ),
        "Dong & Yang, arXiv:1905.09717, reference code, configs/opts/CIFAR-E300-W5-L1-COS.config: 5 epochs of warm-up "
        "and 300 of a cosine, batch 256.",
    ),
    "imagenet-resnet": TrainRecipe(
        TrainConfig(
            epochs=120,
            batch_size=256,
            learning_rate=0.1,
            warmup_fraction=5 / 120,
            optimizer=SGD(weight_decay=1e-4, vector_weight_decay=1e-4),
        ),
        "Dong & Yang, arXiv:1905.09717, reference code, configs/opts/ImageNet-E120-Cos-Smooth.config, without its "
        "changes of color.",
        label_smoothing=0.1,
    ),
    "finetune": TrainRecipe(
        TrainConfig(epochs=30, batch_size=64, learning_rate=3e-4, optimizer=AdamW(), ema_decay=0.999, clip_norm=1.0),
        "Ours: AdamW at a low rate, for pretrained weights and a few thousand images.",
        label_smoothing=0.1,
    ),
    "adamw": TrainRecipe(
        TrainConfig(epochs=100, batch_size=8, learning_rate=1e-3, optimizer=AdamW(), clip_norm=5.0),
        "Ours: detectors, segmenters and the like from random weights on a few hundred images, as benchmarks/tasks.py "
        "trains them.",
    ),
}
"""By the names of ``secateur train --recipe``."""
