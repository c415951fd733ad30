"""What a training run leaves behind."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from secateur.train._machine import Precision


@dataclass(frozen=True)
class EpochRecord:
    """The numbers of one epoch. Epoch 0 is the student before training: validated only.

    Attributes:
        epoch: From 1; 0 is before training.
        train_loss: Mean total loss over the epoch's steps, in nats if the objective has no feature part; None at 0.
        parts: Mean of each part of the loss before weighting: "label" and "kd" in nats, "feature" dimensionless, and
            each term of the objective by its name.
        learning_rate: Of the epoch's last step; None at 0.
        validation_accuracy: Fraction of validation images whose highest logit is the label's; None if not validated.
        validation_loss: Mean cross-entropy on the validation images, in nats; None if not validated.
        seconds: Wall-clock time of the epoch's training steps, without validation; 0.0 at 0.
        images_per_s: Training images per second; None at 0.
        density: Kept fraction of the weights that may be pruned, at the end of the epoch; None if none are.
    """

    epoch: int
    train_loss: float | None
    parts: Mapping[str, float]
    learning_rate: float | None
    validation_accuracy: float | None
    validation_loss: float | None
    seconds: float
    images_per_s: float | None
    density: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "EpochRecord":
        """Inverse of `to_json`."""
        return cls(**data)

    @property
    def numbers(self) -> dict[str, float]:
        """What there is to plot or tabulate over the epochs, by name."""
        means = {f"mean_{name}": value for name, value in self.parts.items()}
        found = {
            "mean_loss": self.train_loss,
            **means,
            "last_learning_rate": self.learning_rate,
            "validation_accuracy": self.validation_accuracy,
            "validation_loss": self.validation_loss,
            "seconds": self.seconds if self.epoch else None,
            "images_per_s": self.images_per_s,
            "density": self.density,
        }
        return {name: value for name, value in found.items() if value is not None}

    def line(self, epochs: int) -> str:
        """One of so many epochs in words: ``epoch 3/20  loss 0.4120 (kd 0.4120)  lr 0.012  validation 91.20 %``."""
        words = [f"epoch {self.epoch}/{epochs}"]
        if self.train_loss is not None:
            parts = ", ".join(f"{name} {value:.4f}" for name, value in self.parts.items())
            words.append(f"loss {self.train_loss:.4f} ({parts})")
        if self.learning_rate is not None:
            words.append(f"lr {self.learning_rate:.2g}")
        if self.validation_accuracy is not None:
            words.append(f"validation {100 * self.validation_accuracy:.2f} % (loss {self.validation_loss:.4f})")
        if self.density is not None:
            words.append(f"weights {100 * self.density:.1f} %")
        if self.images_per_s is not None:
            words.append(f"{self.seconds:.1f} s  {self.images_per_s:.0f} images/s")
        return "  ".join(words)


@dataclass(frozen=True)
class Trained:
    """A trained student and how it came about.

    Attributes:
        model: A new module in eval mode, on the device of the student that was given.
        history: One record per epoch; with a validation split it begins with epoch 0, before training.
        best_epoch: The epoch the model is from.
        best_accuracy: Its validation accuracy as a fraction, or None: there was no validation split and the
            last epoch was returned.
        precision: The number formats used in training.
        device: The device used in training, such as "cpu".
    """

    model: nn.Module
    history: tuple[EpochRecord, ...]
    best_epoch: int
    best_accuracy: float | None
    precision: Precision
    device: str
