"""The step of a TAS search: one update of the weights, then one of alpha, the logits of the candidates."""

import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._arrays import FloatArray
from secateur._batches import batch_length, call_model, in_float32
from secateur._kinds import settings
from secateur.cost.budget import Cost
from secateur.errors import TrainingError
from secateur.nas.mixture import WidthExpansion
from secateur.nas.supernet import Subnet, Supernet, measure_batch_norms
from secateur.nas.tas_cost import Derived, ExpectedCost, derive
from secateur.nas.tas_sampler import SampledWidths, WidthDistribution, draw
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.train.config import Batches, TrainConfig, epoch_batches
from secateur.train.device import Precision
from secateur.train.evaluate import in_channels_last, measure_score
from secateur.train.trainer import EpochReport, EpochSummary, Learner, Losses, Shard, TrainingStep

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def _check_positive(first: float, last: float) -> None:
    if not (math.isfinite(first) and math.isfinite(last) and first > 0 and last > 0):
        raise TrainingError(f"`first` and `last` must be positive and finite; got {first} and {last}. Try 10 and 0.1.")


@settings
class LinearTemperature:
    """tau(x) = first + (last - first) * x at the fraction x of the search.

    Attributes:
        first: Temperature of the first step, > 0.
        last: Temperature of the last step, > 0.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, Section 3.2 (10 to 0.1).
    """

    first: float = 10.0
    last: float = 0.1

    def __post_init__(self) -> None:
        _check_positive(self.first, self.last)

    def at(self, fraction: float) -> float:
        """Return tau at a fraction of the search, 0 to 1."""
        return self.first + (self.last - self.first) * fraction


@settings
class CosineTemperature:
    """tau(x) = last + (first - last) * (1 + cos(pi * x)) / 2 at the fraction x of the search.

    Attributes:
        first: Temperature of the first step, > 0.
        last: Temperature of the last step, > 0.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, reference code (5 to 0.1).
    """

    first: float = 5.0
    last: float = 0.1

    def __post_init__(self) -> None:
        _check_positive(self.first, self.last)

    def at(self, fraction: float) -> float:
        """Return tau at a fraction of the search, 0 to 1."""
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * fraction)) / 2


@settings
class AlphaOptimizer:
    """Adam for alpha, the logits of the candidates.

    Attributes:
        learning_rate: > 0.
        betas: Decay of the running mean and of the running square.
        weight_decay: L2 factor of the logits, which pulls them toward equal probabilities.
        initial_deviation: Standard deviation of the first logits; 0 begins with equal probabilities.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, reference code, but for the learning rate; see `TAS`.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 1e-3
    initial_deviation: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise TrainingError(f"`learning_rate` must be positive and finite; got {self.learning_rate}. Try 0.02.")

    def build(self, distribution: WidthDistribution) -> torch.optim.Optimizer:
        """Build a torch optimizer of the logits."""
        return torch.optim.Adam(
            distribution.parameters(), lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )


@dataclass(frozen=True, eq=False)
class TASSearchConfig:
    """What a search is made of. Nothing of it changes during the search.

    Attributes:
        cost: Costs, limits and tolerance.
        for_weights: Images that the weights learn from.
        for_alpha: Images that alpha learns from; none of the others.
        validation: Images that the derived network is measured on after every epoch, for the record; None for none.
        augment: Augmentation of both halves.
        calibration: Image batches for the batch norms of a derived network.
        train: Epochs, batch size, learning rate and optimizer of the weights, and seed.
        alpha_optimizer: Optimizer of alpha.
        temperature: Temperature of the draws.
        expansion: How the narrower width of a draw is seen at the wider one.
        fabric: Device, processes and precision.
        task: The loss of both halves, and the metric of the derived network.
    """

    cost: ExpectedCost
    for_weights: Batches
    for_alpha: Batches
    validation: Batches | None
    augment: Any
    calibration: tuple[Tensor, ...]
    train: TrainConfig
    alpha_optimizer: AlphaOptimizer
    temperature: LinearTemperature | CosineTemperature
    expansion: WidthExpansion
    fabric: "Fabric"
    task: Task = Classification()  # noqa: RUF009 - frozen


COST_WEIGHT = 2.0
"""Weight of the cost in the loss of alpha; Dong & Yang, reference code."""


class TASStep(TrainingStep):
    """A step of the search: the weights learn from one half of the images, then alpha from the other half.

    Args:
        config: What does not change.
        supernet: On the device; trained in place.
        distribution: The logits alpha, on the device; trained in place.

    Attributes:
        supernet: As given.
        distribution: As given.
        noise: Gumbel noise of the draws.
    """

    def __init__(self, config: TASSearchConfig, supernet: Supernet, distribution: WidthDistribution) -> None:
        self.loop, self.train, self.fabric = "search", config.train, config.fabric
        halves = config.for_weights, config.for_alpha
        self.steps = min(config.train.steps_per_epoch(len(half)) for half in halves)
        self.supernet, self.distribution, self.noise = supernet, distribution, torch.Generator()
        self._config = config
        self._weights = Learner.of(supernet, config.train, config.fabric)
        self._alpha = Learner(distribution, config.alpha_optimizer.build(distribution), config.fabric)
        self.learners = {"supernet": self._weights, "distribution": self._alpha}
        self.generators = {"noise": self.noise}

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Any, ...]]:
        """See `TrainingStep.batches`: images and labels for the weights, then images and labels for alpha."""
        config, device = self._config, self.fabric.device
        # The halves may differ by one image, and so by one batch: the shorter one ends the epoch.
        halves = (
            epoch_batches(half, self.train, device=device, epoch=epoch, augment=config.augment, start=start)
            for half in (config.for_weights, config.for_alpha)
        )
        return ((*own, *other) for own, other in zip(*halves, strict=False))

    def begin(self, epoch: int) -> None:
        """See `TrainingStep.begin`."""
        # Seeded by the epoch, so that a resumed search draws what an uninterrupted one draws.
        seed = np.random.SeedSequence((self.train.seed, epoch)).generate_state(1, np.uint64)[0]
        self.noise.manual_seed(int(seed >> np.uint64(1)))

    @contextmanager
    def running(self, epoch: int) -> Generator[None]:
        """See `TrainingStep.running`: in training mode."""
        del epoch
        self.supernet.train()
        yield

    def learn(self, shard: Shard) -> Losses:
        """See `TrainingStep.learn`: `update_weights`, then `update_alpha`."""
        temperature = self.temperature(shard.step)
        # Both updates see the same tau, and other draws: the noise goes on from one to the next.
        images, labels, other_images, other_labels = shard.tensors
        processes = self.fabric.world_size
        # A mean over a shard counts by its images, so that the mean over the processes is that of the batch.
        share = batch_length(images) * processes / shard.sizes[1]
        total = self.update_weights(images, labels, temperature, share)
        share = batch_length(other_images) * processes / shard.sizes[3]
        return Losses(self.update_alpha(other_images, other_labels, temperature, share), total)

    def temperature(self, step: int) -> float:
        """Return tau of a step, from 0 over all epochs."""
        # The last step is at fraction 1; a search of a single step has only the first temperature.
        return self._config.temperature.at(step / max(self.train.epochs * self.steps - 1, 1))

    def update_weights(self, images: Any, labels: Any, temperature: float, share: float = 1.0) -> Tensor:
        """Update the weights once, with alpha fixed.

        Args:
            images: A batch, or this process's part of one.
            labels: Class numbers of the images, or the targets of another task.
            temperature: tau of the draw.
            share: Weight of the part, see `learn`; 1 for a whole batch.

        Returns:
            The weighted loss of the task.
        """
        # Gradients of alpha are neither needed nor computed.
        with torch.no_grad():
            drawn = self._draw(temperature)
        self._weights.zero_grad()
        loss = self._loss(images, labels, drawn) * share
        self.fabric.backward(loss)
        self._weights.update()
        return loss.detach()

    def update_alpha(self, images: Any, labels: Any, temperature: float, share: float = 1.0) -> dict[str, Tensor]:
        """Update alpha once, with the weights fixed; see `update_weights`.

        Returns:
            The weighted loss "architecture" and the "cost".
        """
        # Gradients of the weights are neither needed nor computed.
        for weight in self._weights.parameters:
            weight.requires_grad = False
        drawn = self._draw(temperature)
        loss = self._loss(images, labels, drawn) * share
        # The cost is the same in all processes, so that its gradient needs no share.
        cost = self._config.cost.loss(self.distribution).to(loss)
        self._alpha.zero_grad()
        self.fabric.backward(loss + COST_WEIGHT * cost)
        self._alpha.update()
        # `parameters` holds the trained weights only, so that those that the user has frozen are not trained afterward.
        for weight in self._weights.parameters:
            weight.requires_grad = True
        return {"architecture": loss.detach(), "cost": cost.detach()}

    def _draw(self, temperature: float) -> SampledWidths:
        return draw(self.supernet, self.distribution, temperature, self._config.expansion, self.noise)

    def _loss(self, images: Any, labels: Any, drawn: SampledWidths) -> Tensor:
        run = partial(self.supernet, drawn.subnet, mixture=drawn.mixture)
        with self.fabric.autocast():
            outputs = call_model(run, in_channels_last(images))
        return self._config.task.loss(in_float32(outputs), labels)

    def derived(self) -> Derived:
        """Return the architecture that alpha leads to now."""
        cost = self._config.cost
        return derive(cost.context, cost.candidates, *self._probabilities())

    def subnet(self, derived: Derived) -> Subnet:
        """Return a derived architecture as a subnet."""
        return Subnet(tuple(int(width) for width in derived.widths), derived.removed_blocks)

    def _probabilities(self) -> tuple[FloatArray, FloatArray]:
        """Return the probabilities of the widths, (axes, candidates), and of the depths, (chains, candidates)."""
        log_p = self.distribution.log_widths, self.distribution.log_depths
        widths, depths = (each.detach().exp().double().cpu().numpy() for each in log_p)
        return widths, depths

    def numbers(self, loss: float, rate: float, step: int) -> dict[str, float]:
        """See `TrainingStep.numbers`: the loss of the weights, the cost that alpha expects, its entropy, and tau."""
        del rate
        return self._numbers(loss, self.temperature(step))

    def _numbers(self, loss: float, temperature: float) -> dict[str, float]:
        # The first limit stands for all of them: a line on a terminal has room for one.
        expected, likely = self._expected(), self._config.cost.fractions(self._most_likely())
        field = next(iter(expected))
        return {
            "loss": loss,
            field: expected[field],
            f"{field}_likeliest": likely[field],
            "entropy": self.distribution.entropy,
            "temperature": temperature,
        }

    def _expected(self) -> dict[str, float]:
        """Return the expected cost as fractions of the whole model's."""
        cost = self._config.cost
        with torch.no_grad():
            expected = cost.expected(self.distribution)
        return cost.fractions({name: float(value) for name, value in expected.items()})

    def _most_likely(self) -> Cost:
        return self._config.cost.most_likely(self.distribution)

    def measure(self, summary: EpochSummary) -> EpochReport:
        """See `TrainingStep.measure`: alpha, and the accuracy of the network that it leads to."""
        means, temperature = summary.losses, self.temperature(summary.step)
        numbers = {f"epoch_{name}": value for name, value in self._numbers(means["total"], temperature).items()}
        accuracy = self._validate()
        if accuracy is not None:
            numbers["validation_accuracy"] = accuracy
        numbers["epoch_architecture_loss"] = means["architecture"]
        record = self._record(summary, temperature, accuracy)
        return EpochReport(record, numbers, self._line(record))

    def _record(self, summary: EpochSummary, temperature: float, accuracy: float | None) -> dict[str, Any]:
        """Return what the report draws of an epoch."""
        cost = self._config.cost
        candidates, names, chains = cost.candidates, cost.context.costs.axes, cost.context.inputs.graph.chains
        p, q = self._probabilities()
        widths, depths = candidates.widths, candidates.depths
        return {
            "epoch": summary.epoch,
            "temperature": temperature,
            "entropy": self.distribution.entropy,
            "expected": self._expected(),
            "argmax": cost.fractions(self._most_likely()),
            "widths": {
                names[axis]: [float((p[row] * widths[row]).sum()), int(widths[row, p[row].argmax()])]
                for row, axis in enumerate(candidates.axes.tolist())
            },
            "depths": {
                chains[chain][0].name: [
                    float((q[row] * depths[row]).sum()),
                    int(depths[row, q[row].argmax()]),
                    len(chains[chain]),
                ]
                for row, chain in enumerate(candidates.chains.tolist())
            },
            "weight_loss": summary.losses["total"],
            "architecture_loss": summary.losses["architecture"],
            "validation": accuracy,
            "seconds": summary.seconds,
        }

    def _line(self, record: Mapping[str, Any]) -> str:
        field, expected = next(iter(record["expected"].items()))
        words = [
            f"epoch {record['epoch']}/{self.train.epochs}",
            f"loss {record['weight_loss']:.4f} / {record['architecture_loss']:.4f}",
            f"{field} {100 * expected:.1f} % (likeliest {100 * record['argmax'][field]:.1f} %)",
            f"entropy {record['entropy']:.3f}",
        ]
        if record["validation"] is not None:
            words.append(f"validation {100 * record['validation']:.2f} %")
        return "  ".join([*words, f"{record['seconds']:.1f} s"])

    def _validate(self) -> float | None:
        """Return the accuracy of the derived network as it is, with batch norms measured on the calibration images."""
        config = self._config
        if config.validation is None:
            return None
        # Running statistics mean nothing in a supernet, where every step runs another subnet.
        subnet = self.subnet(self.derived())
        statistics = measure_batch_norms(self.supernet, subnet, config.calibration)
        result = measure_score(
            _FixedSubnet(self.supernet, subnet, statistics).eval(),
            config.validation,
            task=config.task,
            batch_size=250,
            precision=Precision.FLOAT32,
            device=self.fabric.device,
            fabric=self.fabric,
        )
        # `_FixedSubnet.eval()` has put the supernet itself into evaluation mode.
        self.supernet.train()
        return result.value


class _FixedSubnet(nn.Module):
    """A supernet that always runs one subnet."""

    def __init__(self, supernet: Supernet, subnet: Subnet, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.supernet, self._subnet, self._tensors = supernet, subnet, tensors

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.supernet(self._subnet, *inputs, tensors=self._tensors, **named)
