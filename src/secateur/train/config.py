"""What the engine asks of data. The splits of `secateur.data` satisfy it; so does any class with these methods.

How long, how fast and with which optimizer to train.

What to learn and from what."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from secateur.distill.objective import Objective
from secateur.distill.taps import AlignedFeatures
from secateur.errors import TrainingError
from secateur.prune.weight_pruning import Sparsify
from secateur.train.device import Eager, Execution, Precision

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Batches(Protocol):
    """Labeled images that can be read in batches, again and again."""

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
            device: Where the tensors shall lie.
            seed: Seed of order and augmentation; None means the stored order.
            epoch: Changes order and augmentation; 0 or more.
            augment: Settings of the data room, passed through; None means none.
            drop_last: Leave a smaller last batch out.
            start: Leave out so many batches at the beginning, with what it takes to read them: a resumed run begins
                in the middle of an epoch.

        Returns:
            Pairs of images, float32 (batch, channels, height, width), normalized, and labels, int64 (batch,), or
            probabilities, float32 (batch, classes), where ``augment`` mixes images.
        """
        ...


class TrainingData(Protocol):
    """A training and a validation split and how to vary the former, such as `secateur.data.ImageData`."""

    @property
    def train(self) -> Batches:
        """What the student learns from."""
        ...

    @property
    def validation(self) -> Batches:
        """What the best epoch is chosen on; never the test split."""
        ...

    @property
    def augment(self) -> Any:
        """What ``train.batches`` is given to vary the images; None varies nothing."""
        ...


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise TrainingError(f"`{name}` must be in [0, 1); got {value}. 0.9 to 0.9999 is usual.")


def _check_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise TrainingError(f"`{name}` must be finite and not negative; got {value}. Use 0 for none.")


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, as `torch.optim.SGD`.

    Attributes:
        momentum: In [0, 1).
        nesterov: Nesterov's momentum; needs ``momentum`` > 0.
        weight_decay: L2 factor of parameters with two dimensions or more, >= 0. 1e-4 to 5e-4 is usual on CIFAR.
        vector_weight_decay: The same for parameters with fewer (biases, norm scales and shifts), where decay is
            of no use (He et al., arXiv:1812.01187, Section 3.1). Papers older than that decay them too.
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
        """A torch optimizer of the model's trainable parameters."""
        groups = _groups(model.parameters(), self.weight_decay, self.vector_weight_decay)
        return torch.optim.SGD(groups, lr=learning_rate, momentum=self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, as `torch.optim.AdamW` (arXiv:1711.05101).

    Attributes:
        betas: Decay of the running mean and of the running square, each in [0, 1).
        epsilon: Added to the root of the running square, > 0.
        weight_decay: Of parameters with two dimensions or more, >= 0, times the learning rate.
        vector_weight_decay: The same for parameters with fewer dimensions.
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
        """A torch optimizer of the model's trainable parameters."""
        groups = _groups(model.parameters(), self.weight_decay, self.vector_weight_decay)
        return torch.optim.AdamW(groups, lr=learning_rate, betas=self.betas, eps=self.epsilon)


@dataclass(frozen=True)
class TrainConfig:
    """The course of a training run.

    Attributes:
        epochs: Passes over the training images, >= 0; 0 trains nothing.
        batch_size: Images per step, >= 1. A smaller last batch of an epoch is left out.
        learning_rate: The highest one, reached after the warm-up; see `learning_rate_at`.
        warmup_fraction: Part of all steps with a linearly rising rate, in [0, 1].
        optimizer: `SGD` or `AdamW`.
        ema_decay: Decay per step of an exponential moving average of the weights, which is then validated and
            returned, in [0, 1); None means no average. See `secateur.train.average_decay`.
        accumulate: Parts that the batch of a step is computed in, one after the other, from 1 to ``batch_size``:
            memory is that of one part, and the step is the same wherever nothing is normalized over the batch. Batch
            norms see the parts, and losses that compare images with each other compare those of a part.
        clip_norm: The gradient of all that learns is scaled down to this L2 norm where it is longer, > 0; None leaves
            it alone. 1 is usual for transformers.
        precision: Number formats; None means the best the device has, see `best_precision`.
        seed: Of the order of the images, of augmentation and of dropout; >= 0.
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
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, lowest in (
            ("epochs", self.epochs, 0),
            ("batch_size", self.batch_size, 1),
            ("accumulate", self.accumulate, 1),
            ("seed", self.seed, 0),
        ):
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
        """Steps of one epoch over so many images: whole batches, or one smaller one if there is no whole one."""
        return max(images // self.batch_size, min(images, 1))

    def learning_rate_at(self, step: int, *, steps: int) -> float:
        """Learning rate of a step: a linear warm-up, then half a cosine toward zero.

        With W = round(warmup_fraction * steps) and r = learning_rate:
        r * (step + 1) / W  for step < W, else  r * (1 + cos(pi * (step - W) / (steps - W))) / 2.

        Args:
            step: From 0 to steps - 1, over all epochs.
            steps: Steps of the whole run.

        References:
            Loshchilov & Hutter, arXiv:1608.03983, Eq. (5) without restarts; Goyal et al., arXiv:1706.02677,
            Section 2.2 (warm-up).
        """
        warmup = round(self.warmup_fraction * steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def _groups(
    parameters: Iterable[nn.Parameter], weight_decay: float, vector_weight_decay: float
) -> list[dict[str, object]]:
    trainable = [p for p in parameters if p.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": vector_weight_decay},
    ]
    return [group for group in groups if group["params"]]


@dataclass(frozen=True)
class TrainingTask:
    """Everything of a run that does not change."""

    source: Batches
    validation: Batches | None
    augment: Any
    objective: Objective
    schedule: TrainConfig
    alignment: AlignedFeatures | None
    fabric: "Fabric"
    sparsify: Sparsify | None = None
    execution: Execution = Eager()  # noqa: RUF009 - frozen

    @property
    def steps(self) -> int:
        """Optimizer steps of one epoch."""
        return self.schedule.steps_per_epoch(len(self.source))

    def learning_rate_at(self, step: int) -> float:
        """Of a step, from 0 over all epochs."""
        return self.schedule.learning_rate_at(step, steps=self.schedule.epochs * self.steps)

    def density_after(self, epoch: int) -> float | None:
        """Kept fraction of the weights after so many epochs; None if none are pruned."""
        steps = self.schedule.epochs * self.steps
        return None if self.sparsify is None else self.sparsify.density_before(max(epoch * self.steps - 1, 0), steps)

    def settled(self, epoch: int) -> bool:
        """Whether so many epochs have ended with as few weights as the result may have."""
        return self.density_after(epoch) == self.density_after(self.schedule.epochs)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of an epoch, both from 0."""
        batch_size = self.schedule.batch_size
        return self.source.batches(
            batch_size,
            device=self.fabric.device,
            seed=self.schedule.seed,
            epoch=epoch,
            augment=self.augment,
            drop_last=len(self.source) >= batch_size,
            start=start,
        )
