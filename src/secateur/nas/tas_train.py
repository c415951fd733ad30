"""How the temperature of the draws falls during a search.

What a search by TAS is, before it begins.

The search loop: one step for the weights, one for the choice, again and again."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import TrainingError
from secateur.nas.mixture import Blending
from secateur.nas.supernet import Subnet, Supernet, calibrated
from secateur.nas.tas_cost import Derived, ExpectedCost, derive
from secateur.nas.tas_sampler import WidthDistribution, draw
from secateur.train.callbacks import Meter
from secateur.train.checkpoint import Saved, optimizer_tensors, tensors_of, write_optimizer_, write_tensors_
from secateur.train.config import Batches, TrainConfig
from secateur.train.device import Precision, channels_last
from secateur.train.evaluate import measure
from secateur.train.trainer import EpochState, nothing

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def _check(first: float, last: float) -> None:
    if not (math.isfinite(first) and math.isfinite(last) and first > 0 and last > 0):
        raise TrainingError(f"`first` and `last` must be positive and finite; got {first} and {last}. Try 10 and 0.1.")


@dataclass(frozen=True)
class LinearTemperature:
    """tau(x) = first + (last - first) * x at the fraction x of the search.

    Attributes:
        first: > 0.
        last: > 0.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, Section 3.2 (10 to 0.1).
    """

    first: float = 10.0
    last: float = 0.1

    def __post_init__(self) -> None:
        _check(self.first, self.last)

    def at(self, fraction: float) -> float:
        """tau at a fraction of the search, 0 to 1."""
        return self.first + (self.last - self.first) * fraction


@dataclass(frozen=True)
class CosineTemperature:
    """tau(x) = last + (first - last) * (1 + cos(pi * x)) / 2 at the fraction x of the search.

    Attributes:
        first: > 0.
        last: > 0.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, reference code (5 to 0.1).
    """

    first: float = 5.0
    last: float = 0.1

    def __post_init__(self) -> None:
        _check(self.first, self.last)

    def at(self, fraction: float) -> float:
        """tau at a fraction of the search, 0 to 1."""
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * fraction)) / 2


@dataclass(frozen=True)
class AlphaOptimizer:
    """The optimizer of the architecture.

    Attributes:
        learning_rate: > 0.
        betas: Decay of the running mean and of the running square.
        weight_decay: L2 factor of the logits: pulls toward equal probabilities.

    References:
        Dong & Yang (TAS), arXiv:1905.09717, reference code, but for the learning rate; see `TAS`.
    """

    learning_rate: float
    betas: tuple[float, float] = (0.5, 0.999)
    weight_decay: float = 1e-3

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise TrainingError(f"`learning_rate` must be positive and finite; got {self.learning_rate}. Try 0.02.")

    def build(self, choice: WidthDistribution) -> torch.optim.Optimizer:
        """A torch optimizer of the logits."""
        return torch.optim.Adam(
            choice.parameters(), lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )


@dataclass(frozen=True, eq=False)
class TASSearchConfig:
    """Everything of a search that does not change.

    Attributes:
        price: Costs, limits, tolerance.
        for_weights: Images that the weights learn from.
        for_choice: Images that the choice is judged on; none of the others.
        validation: Images that the derived network is measured on after every epoch, for the record; None for none.
        augment: For both.
        calibration: Image batches for the batch norms of a derived network.
        schedule: Epochs, batch size, learning rate and optimizer of the weights, seed.
        adam: Optimizer of the choice.
        temperature: Of the draws.
        blending: Of the two widths that are drawn.
        fabric: Device and precision.
    """

    price: ExpectedCost
    for_weights: Batches
    for_choice: Batches
    validation: Batches | None
    augment: Any
    calibration: tuple[Tensor, ...]
    schedule: TrainConfig
    adam: AlphaOptimizer
    temperature: LinearTemperature | CosineTemperature
    blending: Blending
    fabric: "Fabric"

    @property
    def steps(self) -> int:
        """Pairs of steps in an epoch."""
        return min(self.schedule.steps_per_epoch(len(half)) for half in (self.for_weights, self.for_choice))

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
        """Pairs of batches, the first for the weights; without the first so many pairs."""
        size = self.schedule.batch_size
        first, second = (
            half.batches(
                size,
                device=self.fabric.device,
                seed=self.schedule.seed,
                epoch=epoch,
                augment=self.augment,
                drop_last=len(half) >= size,
                start=start,
            )
            for half in (self.for_weights, self.for_choice)
        )
        return zip(first, second, strict=False)


COST_WEIGHT = 2.0
"""Of the cost in the loss of the architecture; Dong & Yang, reference code."""


class DifferentiableSearch:
    """A search in progress. Whatever changes in it lies here, and all of it goes into a checkpoint.

    Args:
        course: What does not change.
        supernet: On the device; trained in place.
        choice: On the device; trained in place.

    Attributes:
        epoch: Epochs done.
        history: A JSON object for each of them.
        supernet: As given.
    """

    def __init__(self, course: TASSearchConfig, supernet: Supernet, choice: WidthDistribution):
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.supernet = supernet
        self._course, self._choice = course, choice
        self._weights = [p for p in supernet.parameters() if p.requires_grad]
        schedule = course.schedule
        self._optimizer = schedule.optimizer.build(supernet, schedule.learning_rate)
        self._architect = course.adam.build(choice)
        self._partway: EpochState | None = None
        self._generator = torch.Generator()

    def train_epoch(self, meter: Meter, between: Callable[[], None] = nothing) -> None:
        """One pass over both halves of the training images, or its rest, then a look at the network they lead to.

        Args:
            meter: Where it is shown.
            between: Called after every pair of steps, when all that changes can be saved.

        Raises:
            TrainingError: If a loss is no longer finite.
        """
        course, generator = self._course, self._generator
        part = self._partway = self._partway or EpochState(self.epoch, course.fabric)
        first, total = self.epoch * course.steps, course.schedule.epochs * course.steps
        self.supernet.train()
        with part.opened(course.schedule.seed, meter):
            if part.steps == 0:
                generator.manual_seed(_number(course.schedule.seed, self.epoch))
            for own, other in course.batches(self.epoch, part.steps):
                rate = course.schedule.learning_rate_at(first + part.steps, steps=total)
                temperature = self._temperature(first + part.steps)
                weight_loss = self.learn(own, temperature, rate, generator)
                parts = self.decide(other, temperature, generator)
                if part.ledger.add(weight_loss, parts, rate) or part.steps == course.steps:
                    part.ledger.look(rate)
                    part.ledger.show(meter, self._numbers(part.ledger.latest, temperature))
                between()
        self._partway = None
        self.epoch += 1
        self._close(part.ledger.means, self._temperature(first + part.steps - 1), part.seconds, meter)

    def _temperature(self, step: int) -> float:
        """Of a step, from 0 over all epochs."""
        return self._course.temperature.at(step / max(self._course.schedule.epochs * self._course.steps - 1, 1))

    def learn(
        self, batch: tuple[Tensor, Tensor], temperature: float, rate: float, generator: torch.Generator
    ) -> Tensor:
        """One step of the weights: gradients of the logits are neither needed nor computed."""
        with torch.no_grad():
            drawn = draw(self.supernet, self._choice, temperature, self._course.blending, generator)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        loss = self._loss(batch, drawn.subnet, drawn.mixture)
        self._course.fabric.backward(loss)
        self._optimizer.step()
        return loss

    def decide(self, batch: tuple[Tensor, Tensor], temperature: float, generator: torch.Generator) -> dict[str, Tensor]:
        """One step of the choice: gradients of the weights are neither needed nor computed."""
        for weight in self._weights:
            weight.requires_grad = False
        drawn = draw(self.supernet, self._choice, temperature, self._course.blending, generator)
        loss = self._loss(batch, drawn.subnet, drawn.mixture)
        cost = self._course.price.loss(self._choice).to(loss)
        self._architect.zero_grad()
        self._course.fabric.backward(loss + COST_WEIGHT * cost)
        self._architect.step()
        for weight in self._weights:
            weight.requires_grad = True
        return {"architecture": loss.detach(), "cost": cost.detach()}

    def _loss(self, batch: tuple[Tensor, Tensor], subnet: Subnet, mixture: Any) -> Tensor:
        images, labels = batch
        with self._course.fabric.autocast():
            logits = self.supernet(subnet, channels_last(images), mixture=mixture)
        return F.cross_entropy(logits.float(), labels)

    def derived(self) -> Derived:
        """The architecture that the choice leads to now."""
        price = self._course.price
        widths, depths = (log_p.detach().exp().double().cpu().numpy() for log_p in self._log_p)
        return derive(price.problem, price.candidates, widths, depths)

    @property
    def calibration(self) -> tuple[Tensor, ...]:
        """Image batches for batch norms, on the device."""
        return self._course.calibration

    @property
    def _log_p(self) -> tuple[Tensor, Tensor]:
        return self._choice.log_widths, self._choice.log_depths

    def subnet(self, derived: Derived) -> Subnet:
        """The derived architecture as a subnet."""
        return Subnet(tuple(int(w) for w in derived.widths), derived.removed_blocks)

    def _numbers(self, loss: float, temperature: float) -> dict[str, float]:
        price, choice = self._course.price, self._choice
        with torch.no_grad():
            expected = price.fractions({name: float(value) for name, value in price.expected(choice).items()})
        likely = price.fractions(price.most_likely(choice))
        field = next(iter(expected))
        return {
            "loss": loss,
            field: expected[field],
            f"{field}_likeliest": likely[field],
            "entropy": choice.entropy,
            "temperature": temperature,
        }

    def _close(self, means: Mapping[str, float], temperature: float, seconds: float, meter: Meter) -> None:
        numbers = {f"epoch_{name}": value for name, value in self._numbers(means["total"], temperature).items()}
        accuracy = self._validated()
        self.history.append(self._record(means, temperature, accuracy, seconds))
        if accuracy is not None:
            numbers["validation_accuracy"] = accuracy
        numbers["epoch_architecture_loss"] = means["architecture"]
        meter.epoch(self.epoch, numbers, self._line(means, accuracy, seconds))

    def _line(self, means: Mapping[str, float], accuracy: float | None, seconds: float) -> str:
        entry = self.history[-1]
        field, expected = next(iter(entry["expected"].items()))
        words = [
            f"epoch {self.epoch}/{self._course.schedule.epochs}",
            f"loss {means['total']:.4f} / {means['architecture']:.4f}",
            f"{field} {100 * expected:.1f} % (likeliest {100 * entry['argmax'][field]:.1f} %)",
            f"entropy {entry['entropy']:.3f}",
        ]
        if accuracy is not None:
            words.append(f"validation {100 * accuracy:.2f} %")
        return "  ".join([*words, f"{seconds:.1f} s"])

    def _record(self, means: Mapping[str, float], temperature: float, accuracy: float | None, seconds: float) -> Any:
        """What the report draws of an epoch."""
        price, choice = self._course.price, self._choice
        candidates, names = price.candidates, price.problem.costs.axes
        p, q = (log_p.detach().exp().double().cpu().numpy() for log_p in self._log_p)
        widths, depths = candidates.widths, candidates.depths
        chains = price.problem.evidence.graph.chains
        with torch.no_grad():
            expected = {name: float(value) for name, value in price.expected(choice).items()}
        return {
            "epoch": self.epoch,
            "temperature": temperature,
            "entropy": choice.entropy,
            "expected": price.fractions(expected),
            "argmax": price.fractions(price.most_likely(choice)),
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
            "weight_loss": means["total"],
            "architecture_loss": means["architecture"],
            "validation": accuracy,
            "seconds": seconds,
        }

    def _validated(self) -> float | None:
        """Accuracy of the derived network as it stands, batch norms measured on the calibration images."""
        if self._course.validation is None:
            return None
        subnet = self.subnet(self.derived())
        statistics = calibrated(self.supernet, subnet, self._course.calibration)
        fixed = _Fixed(self.supernet, subnet, statistics).eval()
        device = self._course.fabric.device
        result = measure(fixed, self._course.validation, batch_size=250, precision=Precision.FLOAT32, device=device)
        self.supernet.train()
        return result.top1

    def saved(self, settings: Mapping[str, str]) -> Saved:
        """Everything that changes in a search, to go on from here."""
        tensors = {f"supernet/{name}": t for name, t in tensors_of(self.supernet).items()}
        tensors |= {f"choice/{name}": t for name, t in tensors_of(self._choice).items()}
        for name, of, module in self._optimizers:
            tensors |= {f"{name}/{key}": t for key, t in optimizer_tensors(of, module).items()}
        numbers: dict[str, Any] = {"history": self.history}
        if self._partway is None:
            return Saved(self.epoch, tensors, numbers, settings)
        numbers["partway"] = self._partway.numbers()
        tensors |= {**self._partway.tensors(), "draw/generator": self._generator.get_state()}
        return Saved(self.epoch, tensors, numbers, settings, self._partway.steps)

    def restore(self, saved: Saved) -> None:
        """Inverse of `saved`."""
        self.epoch = saved.epoch
        self.history = [dict(entry) for entry in saved.numbers["history"]]
        write_tensors_(self.supernet, saved.under("supernet/"))
        write_tensors_(self._choice, saved.under("choice/"))
        for name, of, module in self._optimizers:
            write_optimizer_(of, module, saved.under(f"{name}/"))
        if saved.step:
            self._partway = EpochState.restored(saved, saved.numbers["partway"], self._course.fabric)
            self._generator.set_state(saved.tensors["draw/generator"].clone())  # Aligned.

    @property
    def _optimizers(self) -> tuple[tuple[str, torch.optim.Optimizer, nn.Module], ...]:
        return ("weights", self._optimizer, self.supernet), ("architect", self._architect, self._choice)


class _Fixed(nn.Module):
    """A supernet that always runs one subnet."""

    def __init__(self, supernet: Supernet, subnet: Subnet, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.supernet, self._subnet, self._tensors = supernet, subnet, tensors

    def forward(self, images: Tensor) -> Tensor:
        return self.supernet(self._subnet, images, tensors=self._tensors)


def _number(*seed: int) -> int:
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1))
