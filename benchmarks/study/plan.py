"""What the study compares: families of networks, ways of pruning and teaching, and the cells that combine them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from secateur.errors import TrainingError
from secateur.train import TrainConfig


class Pruned(StrEnum):
    """What is removed."""

    WEIGHTS = "weights"
    """Single weights, by magnitude over all layers, gradually while the student recovers."""
    CHANNELS = "channels"
    """Whole channels, by magnitude, the same part of every layer, before it recovers."""


class Taught(StrEnum):
    """What a student learns from."""

    LABELS = "none"
    """The labels alone."""
    KD = "kd"
    """The teacher's softened probabilities, and a little of the labels."""
    KD_AND_HINTS = "kd+hints"
    """The same, and the teacher's features at the last module of each resolution."""


class Order(StrEnum):
    """When the teacher teaches."""

    DISTILL_THEN_PRUNE = "distill, prune"
    """Before pruning; the recovery is from labels."""
    PRUNE_THEN_DISTILL = "prune, distill"
    """In the recovery; before pruning there are labels."""
    BOTH = "both"
    """Before and after."""


@dataclass(frozen=True)
class Family:
    """Two networks of one kind.

    Attributes:
        name: Of the family.
        teacher: The larger one, a name for `secateur.models.load_model`.
        student: The smaller one.
    """

    name: str
    teacher: str
    student: str


FAMILIES = (
    Family("resnet", "cifar_resnet32", "cifar_resnet20"),
    Family("densenet", "cifar_densenet52", "cifar_densenet40"),
    Family("efficientnet", "cifar_efficientnet_150", "cifar_efficientnet"),
    Family("mobilenet", "cifar_mobilenetv2_150", "cifar_mobilenetv2"),
)
"""Students of 135 to 270 thousand parameters."""


@dataclass(frozen=True)
class Cell:
    """One student: pruned in one way to one size, taught in one way, from one seed."""

    family: Family
    pruned: Pruned
    kept: float
    taught: Taught
    order: Order
    seed: int

    @property
    def before(self) -> Taught:
        """What it learns from before pruning."""
        return Taught.LABELS if self.order is Order.PRUNE_THEN_DISTILL else self.taught

    @property
    def after(self) -> Taught:
        """What it learns from after pruning."""
        return Taught.LABELS if self.order is Order.DISTILL_THEN_PRUNE else self.taught

    @property
    def name(self) -> str:
        """Of its file."""
        words = (self.family.name, self.pruned, f"{self.kept:g}", self.taught, self.order, f"seed{self.seed}")
        return "-".join(word.replace(", ", "-").replace("+", "-") for word in words)


@dataclass(frozen=True)
class Study:
    """The whole of it. The defaults are for one core of a CPU and about an hour: short training, on few images.

    Attributes:
        families: Which networks.
        seeds: Of the students: weights, order of images, augmentation. The teacher of a family has the first of them.
        weights_kept: Kept fractions of the weights that may be pruned.
        macs_kept: Kept fractions of the MACs, by cut channels.
        teaching: Training of the teachers, on labels.
        learning: Training of the students before pruning.
        recovery: Training after pruning.
        recovery_images: How many of the training images the recovery is shown per epoch; None shows all.
        test_images: How many test images decide; None takes all.
        hint_weight: Of the hints, beside 0.9 kd and 0.1 labels.
    """

    families: tuple[Family, ...] = FAMILIES
    seeds: tuple[int, ...] = (0, 1)
    weights_kept: tuple[float, ...] = (0.5, 0.3, 0.1)
    macs_kept: tuple[float, ...] = (0.7, 0.5)
    teaching: TrainConfig = TrainConfig(epochs=4, batch_size=64, learning_rate=0.1, warmup_fraction=0.1)  # noqa: RUF009
    learning: TrainConfig = TrainConfig(epochs=3, batch_size=64, learning_rate=0.1, warmup_fraction=0.1)  # noqa: RUF009
    recovery: TrainConfig = TrainConfig(epochs=1, batch_size=64, learning_rate=0.02, warmup_fraction=0.1)  # noqa: RUF009
    recovery_images: int | None = 2048
    test_images: int | None = 2000
    hint_weight: float = 1.0

    def __post_init__(self) -> None:
        names = [family.name for family in self.families]
        for name, values in (("families", names), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise TrainingError(f"`{name}` must be one or more, each once; got {list(values)}.")
        for name, kept in (("weights_kept", self.weights_kept), ("macs_kept", self.macs_kept)):
            if not all(math.isfinite(value) and 0 < value < 1 for value in kept) or len(set(kept)) < len(kept):
                raise TrainingError(
                    f"`{name}` must be kept fractions between 0 and 1, each once; got {list(kept)}. "
                    "0.1 is a sparsity of 90 %."
                )
        if not self.weights_kept and not self.macs_kept:
            raise TrainingError("`weights_kept` or `macs_kept` must have a fraction; got none in either.")

    def cells(self) -> Iterator[Cell]:
        """Every cell once; without a teacher there is only one order."""
        for family in self.families:
            for seed in self.seeds:
                for pruned, fractions in ((Pruned.WEIGHTS, self.weights_kept), (Pruned.CHANNELS, self.macs_kept)):
                    for kept in fractions:
                        yield Cell(family, pruned, kept, Taught.LABELS, Order.BOTH, seed)
                        for taught in (Taught.KD, Taught.KD_AND_HINTS):
                            for order in Order:
                                yield Cell(family, pruned, kept, taught, order, seed)
