"""Training of the supernet of SWP: which networks learn in a step, and what they learn from."""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from secateur._arrays import IntArray
from secateur._kinds import settings
from secateur.distill.logit_losses import kd_loss
from secateur.errors import BudgetError, TrainingError
from secateur.graph.stages import Stage
from secateur.nas.stagewise import run_stages, stage_features, stage_losses, stage_variances
from secateur.nas.supernet import Supernet
from secateur.nas.swp_candidates import CandidateRows, CandidateSpace, StageOptions
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.train.checkpoint import Tensors
from secateur.train.config import Batches, TrainConfig, epoch_batches
from secateur.train.device import channels_last
from secateur.train.distributed import mean_over_processes
from secateur.train.trainer import EpochReport, EpochSummary, Learner, Losses, Shard, TrainingStep

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class SubnetSampler(ABC):
    """Which networks learn in a step. Implementations are frozen dataclasses."""

    @property
    @abstractmethod
    def full_learns(self) -> bool:
        """Whether the full net learns from the labels, or only hands its features on."""

    @abstractmethod
    def of(self, options: CandidateSpace, draw: np.random.Generator) -> tuple[CandidateRows, ...]:
        """Return the other networks of one step, as candidates of every stage."""


@settings
class SandwichSampler(SubnetSampler):
    """The full net, the smallest net, and some random ones: every channel learns in every step.

    Attributes:
        random: The number of random nets.

    References:
        Zhang et al. (SWP), arXiv:2011.04908; Yu & Huang, arXiv:1903.05134, Section 3.1, the sandwich rule.
    """

    random: int = 2

    def __post_init__(self) -> None:
        if self.random < 0:
            raise TrainingError(f"`random` must not be negative; got {self.random}. 2 is usual.")

    @property
    def full_learns(self) -> bool:
        """See `SubnetSampler.full_learns`."""
        return True

    def of(self, options: CandidateSpace, draw: np.random.Generator) -> tuple[CandidateRows, ...]:
        """See `SubnetSampler.of`: the smallest net and the random ones."""
        return (options.smallest, *(options.sample(draw) for _ in range(self.random)))


@settings
class RandomSampler(SubnetSampler):
    """Random networks alone, the ablation of the sandwich. The last channels learn rarely, the full net never.

    Attributes:
        random: The number of random nets.
    """

    random: int = 3

    def __post_init__(self) -> None:
        if self.random < 1:
            raise TrainingError(f"`random` must be at least 1; got {self.random}. 3 is usual.")

    @property
    def full_learns(self) -> bool:
        """See `SubnetSampler.full_learns`."""
        return False

    def of(self, options: CandidateSpace, draw: np.random.Generator) -> tuple[CandidateRows, ...]:
        """See `SubnetSampler.of`: the random nets."""
        return tuple(options.sample(draw) for _ in range(self.random))


@dataclass(frozen=True, eq=False)
class SupervisionTarget:
    """What the full net has computed for a batch, and its labels; the same for all networks that learn from it.

    Attributes:
        outputs: Outputs of every stage, float32 or better, detached.
        labels: (batch,) class numbers, or the targets of another task.
        averaged: Returns the mean of a tensor over the processes, each of which has a part of the batch; None if there
            is one process.
    """

    outputs: tuple[Tensor, ...]
    labels: Any
    averaged: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(
        cls, outputs: Sequence[Tensor], labels: Any, averaged: Callable[[Tensor], Tensor] | None = None
    ) -> "SupervisionTarget":
        """Return the target of outputs of any precision."""
        # bfloat16 has too few digits for differences of features; float64 models stay as they are.
        kinds = [torch.promote_types(torch.float32, output.dtype) for output in outputs]
        outputs = tuple(output.detach().to(kind) for output, kind in zip(outputs, kinds, strict=True))
        return cls(outputs, labels, averaged)

    @cached_property
    def variances(self) -> Tensor:
        """(stages,) variances of the whole batch, see `stage_variances`."""
        own = stage_variances(self.outputs)
        if self.averaged is None:
            return own
        # Var(x) = E[Var_i + mean_i^2] - E[mean_i]^2 over equal parts i.
        # With a variance of its own, a process would weight stages differently from a single one (1e-3 of the first
        # loss). In float64, because two nearly equal numbers are subtracted.
        means = torch.stack([output.mean() for output in self.outputs]).double()
        squares, means = self.averaged(torch.cat([own.double() + means**2, means])).chunk(2)
        return (squares - means**2).to(own)


class Supervision(ABC):
    """The loss of a network's stages, in training and scoring. Implementations are frozen dataclasses."""

    def check(self, stages: Sequence[Stage]) -> None:
        """Refuse stages that the loss cannot be computed for."""
        # Only the last stage returns logits; a feature between stages can be compared with neither labels nor logits.
        if len(stages) > 1:
            raise BudgetError(
                f"`supervision` must be InPlace() for a model in stages; got {self} for {len(stages)} of them. "
                "Or search the whole net at once: cuts=()."
            )

    @abstractmethod
    def losses(self, outputs: Sequence[Tensor], target: SupervisionTarget) -> Tensor:
        """Return the mean losses over a batch, (stages,).

        Args:
            outputs: Outputs of the network's stages.
            target: Outputs of the full net's stages, and labels.
        """


@settings
class InPlace(Supervision):
    """In-place distillation of the output of each stage from that of the full net, see `stage_losses`."""

    def check(self, stages: Sequence[Stage]) -> None:
        """See `Supervision.check`: any stages are fine."""

    def losses(self, outputs: Sequence[Tensor], target: SupervisionTarget) -> Tensor:
        """Return mean((y - x)^2) / Var(x) of each stage."""
        return stage_losses(outputs, target.outputs, target.variances)


@settings
class SoftLabels(Supervision):
    """In-place distillation of the logits alone, for models without stages, as AutoSlim does it.

    References:
        Yu & Huang, arXiv:1903.05134, Section 3.2; Yu & Huang (AutoSlim), arXiv:1903.11728.
    """

    def losses(self, outputs: Sequence[Tensor], target: SupervisionTarget) -> Tensor:
        """Return KL(softmax(x) || softmax(y)) of the logits."""
        return kd_loss(outputs[-1].float(), target.outputs[-1], temperature=1.0).reshape(1)


@settings
class Labels(Supervision):
    """The loss of the task with the labels, without distillation, for models without stages.

    Attributes:
        task: See `SWP`.
    """

    task: Task = field(default=Classification(), repr=False)

    def losses(self, outputs: Sequence[Tensor], target: SupervisionTarget) -> Tensor:
        """Return the loss of the task: the cross-entropy of classifiers."""
        return self.task.loss(outputs[-1].float(), target.labels).reshape(1)


@dataclass(frozen=True, eq=False)
class SWPSearchConfig:
    """What the training of a supernet is made of. Nothing of it changes during the training.

    Attributes:
        options: The candidates of every stage.
        sampler: Chooses the networks that learn in a step.
        supervision: What those beside the full one learn from.
        images: Images to learn from.
        augment: Augmentation of the images.
        train: Epochs, batch size of all processes together, learning rate, optimizer and seed.
        fabric: Devices and precision.
        task: The loss of the full net.
    """

    options: CandidateSpace
    sampler: SubnetSampler
    supervision: Supervision
    images: Batches
    augment: Any
    train: TrainConfig
    fabric: "Fabric"
    task: Task = Classification()  # noqa: RUF009 - frozen


class SupernetStep(TrainingStep):
    """A step of the supernet: the full net learns from the labels, the others stage by stage from the full net.

    Args:
        config: What does not change.
        supernet: On the device; trained in place.

    Attributes:
        config: As given.
        counts: Which channels and candidates were trained.
        draw: Random numbers by which networks are drawn.
    """

    def __init__(self, config: SWPSearchConfig, supernet: Supernet) -> None:
        self.loop, self.train, self.fabric = "search", config.train, config.fabric
        self.steps = config.train.steps_per_epoch(len(config.images))
        # `begin` seeds the numbers of every epoch.
        self.config, self.counts, self.draw = config, TrainingCounts(config.options), np.random.default_rng()
        self._supernet = supernet
        self._weights = Learner.of(supernet, config.train, config.fabric)
        self.learners, self.generators = {"supernet": self._weights}, {"draw": self.draw}

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, ...]]:
        """See `TrainingStep.batches`: images and labels."""
        config, device = self.config, self.fabric.device
        return epoch_batches(config.images, self.train, device=device, epoch=epoch, augment=config.augment, start=start)

    def begin(self, epoch: int) -> None:
        """See `TrainingStep.begin`."""
        # In place, because `generators` refers to the same object. Seeded by the epoch: a resumed training draws what
        # an uninterrupted one draws.
        self.draw.bit_generator.state = np.random.default_rng((self.train.seed, epoch)).bit_generator.state

    @contextmanager
    def running(self, epoch: int) -> Generator[None]:
        """See `TrainingStep.running`: in training mode."""
        del epoch
        self._supernet.train()
        yield

    def learn(self, shard: Shard) -> Losses:
        """See `TrainingStep.learn`: gradients of all networks are added up, then all weights move once.

        The loss is  L(full net, labels) + mean over the other networks of the sum over the stages of the supervision's
        loss. No gradient crosses a cut, nor reaches the full net through what it teaches.
        """
        config, supernet, stages = self.config, self._supernet, self.config.options.stages
        images, labels = channels_last(shard.tensors[0]), shard.tensors[1]
        self._weights.zero_grad()
        with self.fabric.autocast(), nullcontext() if config.sampler.full_learns else torch.no_grad():
            logits, stage_inputs = stage_features(supernet, stages, images)
        full = config.task.loss(logits.float(), labels)
        if config.sampler.full_learns:
            # At once, so that the activations of the full net are free before the other networks run.
            self.fabric.backward(full)
            self.counts.add(config.options.largest)
        # The loss of a stage is relative to the variance of the whole batch, of which this process has a part.
        shared = None if self.fabric.world_size == 1 else partial(mean_over_processes, self.fabric)
        target = SupervisionTarget.of((*stage_inputs, logits), labels, shared)
        networks = config.sampler.of(config.options, self.draw)
        of_stage = torch.zeros(len(stages), device=full.device)
        for rows in networks:
            with self.fabric.autocast():
                outputs = run_stages(supernet, config.options.subnet(rows), stages, images, stage_inputs)
            # The paper gives neither the loss nor its weight: a mean over the networks, beside the cross-entropy with
            # weight 1.
            losses = config.supervision.losses(outputs, target) / len(networks)
            # One network at a time, so that only its activations are in memory.
            self.fabric.backward(losses.sum())
            of_stage += losses.detach()
            self.counts.add(rows)
        # Once for all networks, with one message to the other processes after the last backward pass.
        self._weights.update()
        # No total: it is the sum of these parts.
        names = [f"stage_{number}" for number in range(1, len(stages) + 1)]
        return Losses({"full": full.detach(), **dict(zip(names, of_stage, strict=True))})

    def measure(self, summary: EpochSummary) -> EpochReport:
        """See `TrainingStep.measure`: the losses, and how fairly channels were trained."""
        means, seconds, fairness = summary.losses, summary.seconds, self.counts.fairness
        full, stages = means["full"], [value for name, value in means.items() if name.startswith("stage_")]
        record = {"epoch": summary.epoch, "full": full, "stages": stages, "fairness": fairness, "seconds": seconds}
        numbers = {f"epoch_{name}_loss": value for name, value in means.items()}
        line = (
            f"epoch {summary.epoch}/{self.train.epochs}  full net {full:.4f}  "
            f"stages {' '.join(f'{loss:.3f}' for loss in stages)}  fairness {fairness:.2f}  {seconds:.1f} s"
        )
        return EpochReport(record, {**numbers, "fairness": fairness}, line)

    def state(self, *, within_epoch: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `TrainingStep.state`: the counts."""
        del within_epoch
        return {"counts": self.counts.to_json()}, {}

    def restore(self, numbers: Mapping[str, Any], tensors: Tensors) -> None:
        """Inverse of `state`."""
        del tensors
        self.counts.restore(numbers["counts"])


class TrainingCounts:
    """Counts how often every removable channel was trained, and which candidates were.

    Args:
        options: The candidates of every stage.
    """

    def __init__(self, options: CandidateSpace):
        self._options = options
        costs = options.context.costs
        self._times = {costs.axes[axis]: Counter[int]() for stage in options.of_stage for axis in stage.axes}
        self._seen: list[set[int]] = [set() for _ in options.of_stage]
        self._holders = {name: _holders(options, name) for name in self._times}

    def add(self, rows: CandidateRows) -> None:
        """Count a network that was trained."""
        for stage, seen, row in zip(self._options.of_stage, self._seen, rows, strict=True):
            seen.add(_number(stage, row))
        subnet, axes = self._options.subnet(rows), self._options.context.costs.axes
        removed = frozenset(subnet.removed_blocks)
        widths = dict(zip(axes, subnet.widths, strict=True))
        for name, times in self._times.items():
            # Channels learn unless every tensor that has them was removed with a block.
            if not all(holders & removed for holders in self._holders[name]):
                times[widths[name]] += 1

    @property
    def fairness(self) -> float:
        """How often the least trained channel was trained, relative to the most trained one; the minimum over all axes.

        A channel learns in every network that is wide enough for it and has its block. 1 is fair, and 0 means that some
        channel never learned.
        """
        if not any(self._seen):
            return 1.0
        sizes = self._options.context.inputs.graph.sizes
        # Subnets are prefixes: the first channel learns in every network, the last one only in those of full width.
        return min((times[sizes[name]] / max(times.total(), 1) for name, times in self._times.items()), default=1.0)

    @property
    def candidates(self) -> list[dict[str, float]]:
        """For each stage log10 of the number of its candidates, and how many of them were trained."""
        return [
            {"log10": math.log10(stage.size), "trained": len(seen)}
            for stage, seen in zip(self._options.of_stage, self._seen, strict=True)
        ]

    def to_json(self) -> dict[str, object]:
        """Return the counts as a JSON object."""
        times = {name: sorted(times.items()) for name, times in self._times.items()}
        return {"times": times, "seen": [sorted(seen) for seen in self._seen]}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Inverse of `to_json`."""
        times: Mapping[str, Sequence[tuple[int, int]]] = saved["times"]
        self._times = {name: Counter(dict(pairs)) for name, pairs in times.items()}
        self._seen = [set(numbers) for numbers in saved["seen"]]


def _number(stage: StageOptions, row: IntArray) -> int:
    """Return the number of a candidate among all of its stage."""
    # One int per candidate instead of an array, because a long training meets hundreds of thousands.
    number = 0
    for top, chosen in zip(stage.max_numbers.tolist(), row.tolist(), strict=True):
        number = number * (top + 1) + chosen
    return number


def _holders(options: CandidateSpace, axis: str) -> list[frozenset[str]]:
    """Return for each tensor with the channels of an axis the blocks that it is removed with."""
    graph = options.context.inputs.graph
    return [
        frozenset(block.name for block in graph.removable if site.tensor in block.tensors)
        for site in graph.by_name[axis].sites
    ]
