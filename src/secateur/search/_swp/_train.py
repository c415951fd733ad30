"""Training of the supernet: the full net from the labels, the others stage by stage from the full net."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.search._swp._nets import Nets
from secateur.search._swp._options import Options
from secateur.search._swp._supervision import Supervision, Target
from secateur.search._swp._tally import Tally
from secateur.supernet import Supernet, features, run_stages
from secateur.train import (
    Batches,
    Meter,
    Partway,
    Saved,
    Schedule,
    average_gradients_,
    averaged,
    channels_last,
    diverged,
    finite,
    nothing,
    optimiser_tensors,
    own_part,
    tensors_of,
    write_optimiser_,
    write_tensors_,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True, eq=False)
class Course:
    """Everything of a training that does not change.

    Attributes:
        options: What there is to choose from.
        nets: Which networks learn in a step.
        supervision: What those beside the full one learn from.
        images: To learn from.
        augment: Varies them.
        schedule: Epochs, batch size of all processes together, learning rate, optimiser, seed.
        fabric: Devices and precision.
    """

    options: Options
    nets: Nets
    supervision: Supervision
    images: Batches
    augment: Any
    schedule: Schedule
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


class Run:
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

    def __init__(self, course: Course, supernet: Supernet):
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.tally = Tally(course.options)
        self.course, self._supernet = course, supernet
        self._weights = [p for p in supernet.parameters() if p.requires_grad]
        self._optimiser = course.schedule.optimiser.build(supernet, course.schedule.learning_rate)
        self._partway: Partway | None = None
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
        part = self._partway = self._partway or Partway(self.epoch, course.fabric)
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
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.zero_grad()
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
        self._optimiser.step()
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
        tensors |= {f"optimiser/{key}": t for key, t in optimiser_tensors(self._optimiser, self._supernet).items()}
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
        write_optimiser_(self._optimiser, self._supernet, saved.under("optimiser/"))
        if "partway" in saved.numbers:
            self._partway = Partway.restored(saved, saved.numbers["partway"], self.course.fabric)
            self._draw.bit_generator.state = saved.numbers["draw"]
