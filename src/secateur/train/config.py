"""What to train on, how long and how fast, and how the run is executed, as plain settings."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from secateur._kinds import settings
from secateur.errors import TrainingError
from secateur.train.callbacks import Callbacks, TerminalProgress
from secateur.train.checkpoint import CheckpointPolicy
from secateur.train.device import Eager, Execution, Precision

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Batches(Protocol):
    """Labeled images that can be read in batches, again and again.

    The splits of `secateur.data` satisfy this protocol, and so does any class with these methods.
    """

    def __len__(self) -> int:
        """Number of images."""
        ...

    def batches(
        self,
        batch_size: int,
        *,
        device: torch.device,
        seed: int | None = None,
        epoch: int = 0,
        augment: Any = None,
        drop_last: bool = False,
        start: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the images, a pure function of the arguments.

        Args:
            batch_size: Images per batch; the last one may be smaller.
            device: The device of the tensors.
            seed: Seed of order and augmentation; None means the stored order.
            epoch: Changes order and augmentation; 0 or more.
            augment: Augmentation settings of `secateur.data`, passed through; None means none.
            drop_last: Leave out a last batch that is smaller.
            start: Leave out this many batches at the beginning, without reading them: a resumed run begins in the
                middle of an epoch.

        Returns:
            Pairs of images, float32 (batch, channels, height, width), normalized, and labels, int64 (batch,), or
            probabilities, float32 (batch, classes), where ``augment`` mixes images.
        """
        ...


class TrainingData(Protocol):
    """A training split, its augmentation and a validation split, such as `secateur.data.ImageData`."""

    @property
    def train(self) -> Batches:
        """The images that the student learns from."""
        ...

    @property
    def validation(self) -> Batches:
        """The images that the best epoch is chosen on; never the test split."""
        ...

    @property
    def augment(self) -> Any:
        """Augmentation, passed to ``train.batches``; None means none."""
        ...


def epoch_batches(
    images: Batches, train: "TrainConfig", *, device: torch.device, epoch: int, augment: Any, start: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training batches of one epoch: shuffled by the seed, without a smaller last one unless it is the only one.

    Args:
        images: A training split.
        train: Batch size and seed.
        device: The device of the tensors.
        epoch: From 0.
        augment: See `Batches.batches`.
        start: Batches to leave out at the beginning.
    """
    return images.batches(
        train.batch_size,
        device=device,
        seed=train.seed,
        epoch=epoch,
        augment=augment,
        drop_last=len(images) >= train.batch_size,
        start=start,
    )


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise TrainingError(f"`{name}` must be in [0, 1); got {value}. 0.9 to 0.9999 is usual.")


def _check_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise TrainingError(f"`{name}` must be finite and not negative; got {value}. Use 0 for none.")


@settings
class SGD:
    """Stochastic gradient descent, as `torch.optim.SGD`.

    Attributes:
        momentum: In [0, 1).
        nesterov: Nesterov's momentum; needs ``momentum`` > 0.
        weight_decay: L2 factor of parameters with two dimensions or more, >= 0. 1e-4 to 5e-4 is usual on CIFAR.
        vector_weight_decay: L2 factor of parameters with fewer dimensions (biases, scales and shifts of norms), where
            decay is of no use (He et al., arXiv:1812.01187, Section 3.1). Older papers decay them too.
    """

    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    vector_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_fraction("momentum", self.momentum)
        _check_not_negative("weight_decay", self.weight_decay)
        _check_not_negative("vector_weight_decay", self.vector_weight_decay)
        if self.nesterov and not self.momentum:
            raise TrainingError(
                f"`momentum` must be positive with nesterov; got {self.momentum}. Use SGD(momentum=0, nesterov=False)."
            )

    def build(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Build a torch optimizer of the model's trainable parameters."""
        groups = _groups(model.parameters(), self.weight_decay, self.vector_weight_decay)
        return torch.optim.SGD(groups, lr=learning_rate, momentum=self.momentum, nesterov=self.nesterov)


@settings
class AdamW:
    """Adam with decoupled weight decay, as `torch.optim.AdamW` (arXiv:1711.05101).

    Attributes:
        betas: Decay of the running mean and of the running square, each in [0, 1).
        epsilon: Added to the root of the running square, > 0.
        weight_decay: Decay of parameters with two dimensions or more, >= 0, multiplied by the learning rate.
        vector_weight_decay: Decay of parameters with fewer dimensions.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    vector_weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for beta in self.betas:
            _check_fraction("betas", beta)
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise TrainingError(f"`epsilon` must be positive and finite; got {self.epsilon}. 1e-8 is usual.")
        _check_not_negative("weight_decay", self.weight_decay)
        _check_not_negative("vector_weight_decay", self.vector_weight_decay)

    def build(self, model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
        """Build a torch optimizer of the model's trainable parameters."""
        groups = _groups(model.parameters(), self.weight_decay, self.vector_weight_decay)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=self.betas, eps=self.epsilon)


def _groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, vector_weight_decay: float
) -> list[dict[str, object]]:
    trainable = [p for p in parameters if p.requires_grad]
    # By dimensions, not by names: biases and the scales of norms have one, whatever they are called.
    groups: list[dict[str, object]] = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": vector_weight_decay},
    ]
    return [group for group in groups if group["params"]]


@settings
class TrainConfig:
    """How long, how fast and with which optimizer to train.

    Attributes:
        epochs: Passes over the training images, >= 0; 0 does not train.
        batch_size: Images per step, >= 1. A smaller last batch of an epoch is left out.
        learning_rate: The highest one, reached after the warm-up; see `learning_rate_at`.
        warmup_fraction: Fraction of all steps in which the rate rises linearly, in [0, 1].
        optimizer: `SGD` or `AdamW`.
        ema_decay: Decay per step of an exponential moving average of the weights, which is then validated and
            returned, in [0, 1); None means no average. See `secateur.train.average_decay`.
        accumulate: The number of parts that each batch is computed in, one after the other, from 1 to ``batch_size``.
            The memory is that of one part, and the step is the same wherever nothing is normalized over the batch:
            batch norms, and losses that compare images with each other, see one part at a time.
        clip_norm: The gradient is scaled down to this L2 norm where it is longer, > 0; None leaves it alone. 1 is
            usual for transformers.
        precision: Number formats; None means the best of the device, see `best_precision`.
        restarts: How often at most a training that diverges begins again from its beginning, each time with a tenth of
            the learning rate, >= 0. Divergence is a loss or weight that is not finite, or three losses in a row above
            30 times the median of the first ten (or above 30, if that is more). If it diverges again after the last
            restart, the best epoch before that is returned, or the student as it was. 0 raises an error instead.
        seed: Random seed of the order of the images, of augmentation and of dropout, >= 0.
    """

    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.05
    warmup_fraction: float = 0.05
    optimizer: SGD | AdamW = SGD()
    ema_decay: float | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    precision: Precision | None = None
    restarts: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, lowest in (
            ("epochs", self.epochs, 0),
            ("batch_size", self.batch_size, 1),
            ("accumulate", self.accumulate, 1),
            ("restarts", self.restarts, 0),
            ("seed", self.seed, 0),
        ):
            # Values come from command lines and JSON: a float that looks whole would fail much later.
            if not isinstance(value, int) or value < lowest:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise TrainingError(f"`{name}` must be a whole number of at least {lowest}; got {value}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise TrainingError(f"`learning_rate` must be positive and finite; got {self.learning_rate}. Try 0.05.")
        if not 0 <= self.warmup_fraction <= 1:
            raise TrainingError(f"`warmup_fraction` must be in [0, 1]; got {self.warmup_fraction}. 0.05 is usual.")
        if self.accumulate > self.batch_size:
            raise TrainingError(
                f"`accumulate` must leave an image to every part of a batch; got {self.accumulate} parts of "
                f"{self.batch_size} images. Lower it."
            )
        if self.clip_norm is not None and not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise TrainingError(f"`clip_norm` must be positive and finite; got {self.clip_norm}. None clips nothing.")
        if self.ema_decay is not None:
            _check_fraction("ema_decay", self.ema_decay)

    def steps_per_epoch(self, images: int) -> int:
        """Steps of an epoch: the number of whole batches, or 1 if there are fewer images than a batch has."""
        return max(images // self.batch_size, min(images, 1))

    def learning_rate_at(self, step: int, *, steps: int) -> float:
        """Return the learning rate of a step: a linear warm-up, then half a cosine toward zero.

        With W = round(warmup_fraction * steps) and r = learning_rate:
        r * (step + 1) / W  for step < W, else  r * (1 + cos(pi * (step - W) / (steps - W))) / 2.

        Args:
            step: From 0 to steps - 1, over all epochs.
            steps: Steps of the whole run.

        References:
            Loshchilov & Hutter, arXiv:1608.03983, Eq. (5) without restarts; Goyal et al., arXiv:1706.02677,
            Section 2.2 (warm-up).
        """
        # step + 1, so that the first step moves at all.
        warmup = round(self.warmup_fraction * steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@settings
class RunSettings:
    """How a training or search is executed. Checkpoints and callbacks change no number of the result.

    With a ``folder`` every epoch ends with an atomic checkpoint, and a long one has some within. A run that
    finds one there is resumed after it, in the middle of an epoch too: on the CPU, with the same number of threads, the
    result is bit-identical to that of an uninterrupted run, and so is the history except for times.

    Attributes:
        folder: Folder for checkpoints; None writes none.
        checkpoints: When checkpoints are written, beside those at the ends of epochs.
        execution: How student and teacher are run: `Eager()`, or `Compiled()` by `torch.compile`, on one device.
        callbacks: `TerminalProgress()`, `Silent()`, or your own.
        fabric: A Fabric for one device, or for several with the strategy ddp, and its precision; None opens one, see
            `open_fabric`. Of several processes, all of which must make the same call, each takes its part of every
            batch, and all return the same result. The first one writes checkpoints and calls the callbacks.
    """

    folder: Path | None = None
    checkpoints: CheckpointPolicy = CheckpointPolicy()
    execution: Execution = Eager()
    callbacks: Callbacks = TerminalProgress()
    fabric: "Fabric | None" = None
