"""How fairly and how fully a supernet was trained.

Which networks learn in every step.

What a network that learns beside the full one learns from.

Training of the supernet: the full net from the labels, the others stage by stage from the full net."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secateur._arrays import IntArray
from secateur.distill.logit_losses import kd_loss
from secateur.errors import BudgetError, TrainingError
from secateur.graph.stages import Stage
from secateur.nas.stagewise import features, run_stages, stage_losses, stage_variances
from secateur.nas.supernet import Supernet
from secateur.nas.swp_candidates import Options, Rows, StageOptions
from secateur.train.callbacks import Meter
from secateur.train.checkpoint import Saved, finite, optimizer_tensors, tensors_of, write_optimizer_, write_tensors_
from secateur.train.config import Batches, TrainConfig
from secateur.train.device import channels_last
from secateur.train.distributed import average_gradients_, averaged, own_part
from secateur.train.trainer import EpochState, diverged, nothing

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class TrainingCounts:
    """Counts how often every channel that may go was trained, and the candidates that were.

    Args:
        options: The choices.
    """

    def __init__(self, options: Options):
        self._options = options
        costs = options.problem.costs
        self._times = {costs.axes[axis]: Counter[int]() for stage in options.of_stage for axis in stage.axes}
        self._seen: list[set[int]] = [set() for _ in options.of_stage]
        self._holders = {name: _holders(options, name) for name in self._times}

    def add(self, rows: Rows) -> None:
        """Note that a network was trained."""
        for stage, seen, row in zip(self._options.of_stage, self._seen, rows, strict=True):
            seen.add(_number(stage, row))
        subnet, axes = self._options.subnet(rows), self._options.problem.costs.axes
        removed = frozenset(subnet.removed_blocks)
        widths = dict(zip(axes, subnet.widths, strict=True))
        for name, times in self._times.items():
            if not all(holders & removed for holders in self._holders[name]):
                times[widths[name]] += 1

    @property
    def fairness(self) -> float:
        """How often the channel trained least was trained, per time of the one trained most; the least over all axes.

        A channel learns in every network that is wide enough for it and has its block. 1 is fair, 0 means that some
        never learned.
        """
        if not any(self._seen):
            return 1.0
        sizes = self._options.problem.evidence.graph.sizes
        return min((times[sizes[name]] / max(times.total(), 1) for name, times in self._times.items()), default=1.0)

    @property
    def candidates(self) -> list[dict[str, float]]:
        """For each stage: log10 of how many candidates it has, and how many of them were trained."""
        return [
            {"log10": math.log10(stage.size), "trained": len(seen)}
            for stage, seen in zip(self._options.of_stage, self._seen, strict=True)
        ]

    def to_json(self) -> dict[str, object]:
        """Everything, as plain data."""
        times = {name: sorted(times.items()) for name, times in self._times.items()}
        return {"times": times, "seen": [sorted(seen) for seen in self._seen]}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `to_json`."""
        times: Mapping[str, Sequence[tuple[int, int]]] = saved["times"]
        self._times = {name: Counter(dict(pairs)) for name, pairs in times.items()}
        self._seen = [set(numbers) for numbers in saved["seen"]]


def _number(stage: StageOptions, row: IntArray) -> int:
    """Of a candidate among all of its stage: one whole number, since a long training meets hundreds of thousands."""
    number = 0
    for top, chosen in zip(stage.tops.tolist(), row.tolist(), strict=True):
        number = number * (top + 1) + chosen
    return number


def _holders(options: Options, axis: str) -> list[frozenset[str]]:
    """For each tensor with the channels of an axis, the blocks that it goes with."""
    graph = options.problem.evidence.graph
    return [
        frozenset(block.name for block in graph.removable if site.tensor in block.tensors)
        for site in graph.by_name[axis].sites
    ]


class SubnetSampler(ABC):
    """Which networks learn in a step. Implementations are frozen dataclasses."""

    @property
    @abstractmethod
    def full_learns(self) -> bool:
        """Whether the full net learns from the labels, or only hands its features on."""

    @abstractmethod
    def of(self, options: Options, draw: np.random.Generator) -> tuple[Rows, ...]:
        """The other networks of one step, as candidates of every stage."""


@dataclass(frozen=True)
class SandwichSampler(SubnetSampler):
    """The full net, the tiny net, and some that are drawn: every channel learns in every step.

    Attributes:
        random: How many are drawn.

    References:
        Zhang et al. (SWP), arXiv:2011.04908; Yu & Huang, arXiv:1903.05134, Section 3.1, the sandwich rule.
    """

    random: int = 2

    def __post_init__(self) -> None:
        if self.random < 0:
            raise TrainingError(f"`random` must not be negative; got {self.random}. 2 is usual.")

    @property
    def full_learns(self) -> bool:
        """It does."""
        return True

    def of(self, options: Options, draw: np.random.Generator) -> tuple[Rows, ...]:
        """The tiny net and the drawn ones."""
        return (options.tiny, *(options.drawn(draw) for _ in range(self.random)))


@dataclass(frozen=True)
class RandomSampler(SubnetSampler):
    """Networks that are drawn, and no others: the sandwich's ablation. Late channels learn rarely, the full net never.

    Attributes:
        random: How many are drawn.
    """

    random: int = 3

    def __post_init__(self) -> None:
        if self.random < 1:
            raise TrainingError(f"`random` must be at least 1; got {self.random}. 3 is usual.")

    @property
    def full_learns(self) -> bool:
        """It does not."""
        return False

    def of(self, options: Options, draw: np.random.Generator) -> tuple[Rows, ...]:
        """The drawn ones."""
        return tuple(options.drawn(draw) for _ in range(self.random))


@dataclass(frozen=True, eq=False)
class Target:
    """What the full net has computed for a batch, and its labels: made once for all networks that learn from it.

    Attributes:
        outputs: Of every stage, float32 or better, detached.
        labels: (batch,) class numbers.
        averaged: The mean of a tensor over the processes that have the other parts of the batch; None if there are
            none.
    """

    outputs: tuple[Tensor, ...]
    labels: Tensor
    averaged: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(
        cls, outputs: Sequence[Tensor], labels: Tensor, averaged: Callable[[Tensor], Tensor] | None = None
    ) -> "Target":
        """The target of outputs of any precision."""
        kinds = [torch.promote_types(torch.float32, output.dtype) for output in outputs]
        outputs = tuple(output.detach().to(kind) for output, kind in zip(outputs, kinds, strict=True))
        return cls(outputs, labels, averaged)

    @cached_property
    def variances(self) -> Tensor:
        """(stages,) see `stage_variances`; those of the whole batch, whoever has the other parts of it."""
        own = stage_variances(self.outputs)
        if self.averaged is None:
            return own
        # Var(x) = E[Var_i + mean_i^2] - E[mean_i]^2 over equal parts i.
        means = torch.stack([output.mean() for output in self.outputs]).double()
        squares, means = self.averaged(torch.cat([own.double() + means**2, means])).chunk(2)
        return (squares - means**2).to(own)


class Supervision(ABC):
    """The loss of a network's stages, in training and in judging. Implementations are frozen dataclasses."""

    def check(self, stages: Sequence[Stage]) -> None:
        """Refuse stages that it can say nothing of."""
        if len(stages) > 1:
            raise BudgetError(
                f"`supervision` must be InPlace() for a model in stages; got {self} for {len(stages)} of them. "
                "Or search the whole net at once: cuts=()."
            )

    @abstractmethod
    def losses(self, outputs: Sequence[Tensor], target: Target) -> Tensor:
        """(stages,) mean losses over a batch.

        Args:
            outputs: What each stage of the network has computed.
            target: What those of the full net have.
        """


@dataclass(frozen=True)
class InPlace(Supervision):
    """In-place distillation: each stage's output against that of the full net, see `stage_losses`."""

    def check(self, stages: Sequence[Stage]) -> None:
        """Any stages."""

    def losses(self, outputs: Sequence[Tensor], target: Target) -> Tensor:
        """mean((y - x)^2) / Var(x) of each stage."""
        return stage_losses(outputs, target.outputs, target.variances)


@dataclass(frozen=True)
class SoftLabels(Supervision):
    """In-place distillation of the logits alone, for one stage: whole networks, as AutoSlim trains them.

    References:
        Yu & Huang, arXiv:1903.05134, Section 3.2; Yu & Huang (AutoSlim), arXiv:1903.11728.
    """

    def losses(self, outputs: Sequence[Tensor], target: Target) -> Tensor:
        """KL(softmax(x) || softmax(y)) of the logits."""
        return kd_loss(outputs[-1].float(), target.outputs[-1], temperature=1.0).reshape(1)


@dataclass(frozen=True)
class Labels(Supervision):
    """No distillation: the labels, for one stage."""

    def losses(self, outputs: Sequence[Tensor], target: Target) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(outputs[-1].float(), target.labels).reshape(1)


@dataclass(frozen=True, eq=False)
class SWPSearchConfig:
    """Everything of a training that does not change.

    Attributes:
        options: What there is to choose from.
        nets: Which networks learn in a step.
        supervision: What those beside the full one learn from.
        images: To learn from.
        augment: Varies them.
        schedule: Epochs, batch size of all processes together, learning rate, optimizer, seed.
        fabric: Devices and precision.
    """

    options: Options
    nets: SubnetSampler
    supervision: Supervision
    images: Batches
    augment: Any
    schedule: TrainConfig
    fabric: "Fabric"

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.schedule.steps_per_epoch(len(self.images))

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of an epoch, without the first so many."""
        return self.images.batches(
            self.schedule.batch_size,
            device=self.fabric.device,
            seed=self.schedule.seed,
            epoch=epoch,
            augment=self.augment,
            drop_last=len(self.images) >= self.schedule.batch_size,
            start=start,
        )


class SupernetTraining:
    """A training in progress. Whatever changes in it lies here, and all of it goes into a checkpoint.

    Args:
        course: What does not change.
        supernet: On the device; trained in place.

    Attributes:
        course: As given.
        epoch: Epochs done.
        history: A JSON object for each of them.
        tally: What was trained how often.
    """

    def __init__(self, course: SWPSearchConfig, supernet: Supernet):
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.tally = TrainingCounts(course.options)
        self.course, self._supernet = course, supernet
        self._weights = [p for p in supernet.parameters() if p.requires_grad]
        self._optimizer = course.schedule.optimizer.build(supernet, course.schedule.learning_rate)
        self._partway: EpochState | None = None
        self._draw = np.random.default_rng()

    def train_epoch(self, meter: Meter, between: Callable[[], None] = nothing) -> None:
        """One pass over the training images, or its rest.

        Args:
            meter: Where it is shown.
            between: Called after every step, when all that changes can be saved.

        Raises:
            TrainingError: If a loss or a weight is no longer finite.
        """
        course, schedule = self.course, self.course.schedule
        part = self._partway = self._partway or EpochState(self.epoch, course.fabric)
        first, rate = self.epoch * course.steps, 0.0
        if part.steps == 0:
            self._draw = np.random.default_rng((schedule.seed, self.epoch))
        self._supernet.train()
        with part.opened(schedule.seed, meter):
            for images, labels in course.batches(self.epoch, part.steps):
                rate = schedule.learning_rate_at(first + part.steps, steps=schedule.epochs * course.steps)
                total, parts = self.learn(images, labels, rate, self._draw)
                if part.ledger.add(total, parts, rate) or part.steps == course.steps:
                    part.ledger.look(rate)
                    part.ledger.show(meter, {"loss": part.ledger.latest, "learning_rate": rate})
                between()
        if not finite(self._supernet):
            raise diverged("weights", f"the end of epoch {part.ledger.epoch}", rate)
        self._partway = None
        self.epoch += 1
        self._close(part.ledger.means, part.seconds, meter)

    def learn(
        self, images: Tensor, labels: Tensor, rate: float, draw: np.random.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: gradients of all networks are added up, then all weights move once.

        The loss is  CE(full net, labels) + mean over the other networks of sum over the stages of the supervision's.
        No gradient crosses a cut, nor reaches the full net through what it teaches.

        Returns:
            The loss of the whole batch, in all processes alike, and its parts.
        """
        course, supernet, stages = self.course, self._supernet, self.course.options.stages
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        images, labels = (own_part(course.fabric, tensor) for tensor in (images, labels))
        images = channels_last(images)
        with course.fabric.autocast(), nullcontext() if course.nets.full_learns else torch.no_grad():
            logits, handed_on = features(supernet, stages, images)
        full = F.cross_entropy(logits.float(), labels)
        if course.nets.full_learns:
            course.fabric.backward(full)
            self.tally.add(course.options.whole)
        shared = None if course.fabric.world_size == 1 else partial(averaged, course.fabric)
        target, beside = Target.of((*handed_on, logits), labels, shared), course.nets.of(course.options, draw)
        of_stage = torch.zeros(len(stages), device=full.device)
        for rows in beside:
            with course.fabric.autocast():
                outputs = run_stages(supernet, course.options.subnet(rows), stages, images, handed_on)
            losses = course.supervision.losses(outputs, target) / len(beside)
            course.fabric.backward(losses.sum())
            of_stage += losses.detach()
            self.tally.add(rows)
        average_gradients_(course.fabric, self._weights)
        self._optimizer.step()
        seen = averaged(course.fabric, torch.cat([full.detach().reshape(1), of_stage]))
        names = ["full", *(f"stage_{number}" for number in range(1, len(stages) + 1))]
        return seen.sum(), dict(zip(names, seen, strict=True))

    def _close(self, means: Mapping[str, float], seconds: float, meter: Meter) -> None:
        stages = [means[f"stage_{number}"] for number in range(1, len(self.course.options.stages) + 1)]
        fairness = self.tally.fairness
        self.history.append(
            {"epoch": self.epoch, "full": means["full"], "stages": stages, "fairness": fairness, "seconds": seconds}
        )
        numbers = {f"epoch_{name}_loss": value for name, value in means.items()}
        line = (
            f"epoch {self.epoch}/{self.course.schedule.epochs}  full net {means['full']:.4f}  "
            f"stages {' '.join(f'{loss:.3f}' for loss in stages)}  fairness {fairness:.2f}  {seconds:.1f} s"
        )
        meter.epoch(self.epoch, {**numbers, "fairness": fairness}, line)

    def saved(self, settings: Mapping[str, str]) -> Saved:
        """Everything that changes in a training, to go on from here."""
        tensors = {f"supernet/{name}": t for name, t in tensors_of(self._supernet).items()}
        tensors |= {f"optimizer/{key}": t for key, t in optimizer_tensors(self._optimizer, self._supernet).items()}
        numbers: dict[str, Any] = {"history": self.history, "tally": self.tally.to_json()}
        if self._partway is None:
            return Saved(self.epoch, tensors, numbers, settings)
        numbers |= {"partway": self._partway.numbers(), "draw": self._draw.bit_generator.state}
        return Saved(self.epoch, {**tensors, **self._partway.tensors()}, numbers, settings, self._partway.steps)

    def restore(self, saved: Saved) -> None:
        """Inverse of `saved`."""
        self.epoch = min(saved.epoch, self.course.schedule.epochs)
        self.history = [dict(entry) for entry in saved.numbers["history"]]
        self.tally.restore(saved.numbers["tally"])
        write_tensors_(self._supernet, saved.under("supernet/"))
        write_optimizer_(self._optimizer, self._supernet, saved.under("optimizer/"))
        if "partway" in saved.numbers:
            self._partway = EpochState.restored(saved, saved.numbers["partway"], self.course.fabric)
            self._draw.bit_generator.state = saved.numbers["draw"]
