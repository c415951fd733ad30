"""The training loop, written once: a `TrainingStep` says what is computed, and a `Trainer` runs it for some epochs.

`fit`, TAS and SWP each give a step. The trainer divides batches among processes, keeps the moving average of the
weights, calls the callbacks, writes checkpoints, and resumes a run so that it ends with the bits of an uninterrupted
one: everything that changes lies in the step's learners, generators and own state, or in the epoch in progress.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._batches import batch_length
from secateur.errors import TrainingError
from secateur.train.callbacks import (
    Callbacks,
    DivergenceError,
    DivergenceWatch,
    LoopCallbacks,
    LossMeter,
    Silent,
    divergence_error,
)
from secateur.train.checkpoint import (
    Checkpoint,
    Checkpointer,
    MovingAverage,
    Tensors,
    checkpointing,
    clone_tensors,
    is_finite,
    load_checkpoint,
    optimizer_tensors,
    tensors_of,
    write_optimizer_,
    write_tensors_,
)
from secateur.train.config import RunSettings, TrainConfig
from secateur.train.device import random_states, seeded, set_random_states
from secateur.train.distributed import (
    average_gradients_,
    gather,
    mean_over_processes,
    own_shard,
    synchronized_batch_norms,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric


_LOGGER = logging.getLogger("secateur")


class Learner:
    """A module in training and the optimizer that changes it.

    Args:
        module: Lies on the device; changed in place.
        optimizer: Of the module's parameters.
        fabric: The processes that train copies of the module.
        clip_norm: See `TrainConfig.clip_norm`.

    Attributes:
        module: As given.
        parameters: The parameters that are trained.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, fabric: "Fabric", clip_norm: float | None = None
    ) -> None:
        self.module = module
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._optimizer, self._fabric, self._clip_norm = optimizer, fabric, clip_norm

    @classmethod
    def of(cls, module: nn.Module, train: TrainConfig, fabric: "Fabric") -> "Learner":
        """A learner with the optimizer and the gradient clipping of a config."""
        return cls(module, train.optimizer.build(module, train.learning_rate), fabric, train.clip_norm)

    def set_learning_rate(self, rate: float) -> None:
        """Set the learning rate of all parameters."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def zero_grad(self) -> None:
        """Drop the gradients of the step before."""
        self._optimizer.zero_grad()

    def update(self) -> None:
        """Take one step of the optimizer, with gradients averaged over the processes, so that all move alike."""
        # Averaged before clipping: the norm is that of the gradient of the whole batch.
        average_gradients_(self._fabric, self.parameters)
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self._clip_norm)
        self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes, by name; no copies."""
        module = {f"module/{name}": tensor for name, tensor in tensors_of(self.module).items()}
        optimizer = optimizer_tensors(self._optimizer, self.module)
        return module | {f"optimizer/{name}": tensor for name, tensor in optimizer.items()}

    def restore(self, saved: Checkpoint, prefix: str) -> None:
        """Inverse of `tensors`, whose names have a prefix in a checkpoint."""
        write_tensors_(self.module, saved.under(f"{prefix}module/"))
        write_optimizer_(self._optimizer, self.module, saved.under(f"{prefix}optimizer/"))

    def reset(self, module: Tensors) -> None:
        """Give the module the tensors it began with, and the optimizer no memory."""
        write_tensors_(self.module, module)
        self._optimizer.state.clear()


@dataclass(frozen=True, eq=False)
class Shard:
    """The part of a batch that one process computes.

    Attributes:
        tensors: The whole batch, or with n processes every n-th item of each part: tensors, or trees of them.
        sizes: The number of items of each part in the whole batch; 0 for a part that is None.
        step: Number of the step, from 0 over all epochs.
    """

    tensors: tuple[Any, ...]
    sizes: tuple[int, ...]
    step: int


@dataclass(frozen=True, eq=False)
class Losses:
    """The losses of one shard, whose means over the processes are those of the batch.

    Attributes:
        parts: Scalars by name.
        total: The loss that is minimized; None means the sum of the parts.
    """

    parts: Mapping[str, Tensor]
    total: Tensor | None = None


@dataclass(frozen=True, eq=False)
class EpochSummary:
    """What the loop knows of an epoch that has ended.

    Attributes:
        epoch: From 1; 0 is before training.
        losses: Means over the steps: "total" and each part; empty before training.
        learning_rate: Learning rate of the last step; None before training.
        step: Number of the last step, from 0 over all epochs.
        seconds: Wall-clock time of the steps.
        images: Images of the first tensor of the batches.
        average: The moving average of `TrainingStep.averaged`; None if none is kept.
    """

    epoch: int
    losses: Mapping[str, float]
    learning_rate: float | None
    step: int
    seconds: float
    images: int
    average: nn.Module | None


@dataclass(frozen=True)
class EpochReport:
    """What a step measures after an epoch.

    Attributes:
        record: A JSON object, the entry of the history.
        numbers: Numbers by name, for logs.
        line: The epoch in words, for people.
    """

    record: dict[str, Any]
    numbers: Mapping[str, float]
    line: str


class TrainingStep(ABC):
    """What one step of a training computes, the state that it changes, and what is measured after an epoch.

    Attributes:
        loop: Name of the loop for callbacks, one word such as ``train`` or ``search``.
        train: Epochs, learning rate and seed.
        fabric: Device and processes.
        steps: Steps of an epoch.
        learners: What is trained, by name. The first learner follows the learning rate of ``train``.
        generators: Random numbers that the step draws itself, by name; the same in all processes.
        averaged: The module whose moving average is kept where ``train`` asks for one; None keeps none.
    """

    loop: str
    train: TrainConfig
    fabric: "Fabric"
    steps: int
    learners: Mapping[str, Learner]
    generators: Mapping[str, torch.Generator | np.random.Generator] = MappingProxyType({})
    averaged: nn.Module | None = None

    @abstractmethod
    def batches(self, epoch: int, start: int) -> Iterator[tuple[Any, ...]]:
        """The batches of an epoch, the same in all processes, without the first ones.

        Args:
            epoch: From 0.
            start: How many batches to leave out.
        """

    @abstractmethod
    def learn(self, shard: Shard) -> Losses:
        """Compute the gradients of a shard and update the learners."""

    @abstractmethod
    def measure(self, summary: EpochSummary) -> EpochReport:
        """Measure what an epoch has led to."""

    def measure_start(self) -> EpochReport | None:
        """Measure what there is before training; None if there is nothing to measure."""
        return None

    @abstractmethod
    def running(self, epoch: int) -> AbstractContextManager[None]:
        """Return the context that the steps of an epoch run in; a resumed epoch enters it again."""

    def begin(self, epoch: int) -> None:
        """Seed the generators for an epoch, from 0; not called where an epoch is resumed in its middle."""
        del epoch

    def begin_again(self, beginning: Mapping[str, Tensors]) -> None:
        """Forget a training that diverged.

        Args:
            beginning: The tensors of the learners' modules before training, by name of the learner.
        """
        for name, learner in self.learners.items():
            learner.reset(beginning[name])

    def numbers(self, loss: float, rate: float, step: int) -> dict[str, float]:
        """The numbers of a step that are shown within an epoch."""
        del step
        return {"loss": loss, "learning_rate": rate}

    def state(self, *, within_epoch: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What changes beside learners and generators: a JSON object, and tensors by name.

        Args:
            within_epoch: Whether an epoch is in progress, whose own state is needed too.
        """
        del within_epoch
        return {}, {}

    def restore(self, numbers: Mapping[str, Any], tensors: Tensors) -> None:
        """Inverse of `state`."""
        del numbers, tensors


class EpochState:
    """The losses, the time and the random numbers of an epoch in progress.

    Args:
        epoch: From 0.
        fabric: Device and processes.
        watch: Finds losses that are far too high; None takes any.

    Attributes:
        losses: Losses so far.
        images: Images so far.
    """

    def __init__(self, epoch: int, fabric: "Fabric", watch: DivergenceWatch | None = None) -> None:
        self.losses = LossMeter(epoch + 1, watch, together=fabric.world_size > 1)
        self.images = 0
        self._epoch, self._fabric = epoch, fabric
        self._interrupted: tuple[Tensor, ...] | None = None
        self._spent, self._began = 0.0, perf_counter()

    @property
    def steps(self) -> int:
        """Steps so far."""
        return self.losses.steps

    @property
    def seconds(self) -> float:
        """Wall-clock time so far, summed over all runs that the epoch was interrupted and resumed in."""
        return self._spent + perf_counter() - self._began

    @contextmanager
    def opened(self, seed: int, callbacks: LoopCallbacks) -> Generator[None]:
        """Set the random numbers of the epoch: those of its beginning, or those where it was interrupted.

        Args:
            seed: Seed of the whole run.
            callbacks: Shown again what they were shown of the epoch before it was interrupted.
        """
        # Each process has numbers of its own: dropout must not drop the same units in all parts of a batch.
        rank = (self._fabric.global_rank,) if self._fabric.world_size > 1 else ()
        with seeded(self._fabric.device, seed, self._epoch, *rank):
            # Seeded all the same, so that the caller's states are restored at the end.
            if self._interrupted is not None:
                set_random_states(self._fabric.device, self._interrupted)
            self.losses.show_again(callbacks)
            yield

    def numbers(self) -> dict[str, Any]:
        """Return losses, images and time as a JSON object.

        Raises:
            TrainingError: If a loss is not finite.
        """
        return {"losses": self.losses.to_json(), "images": self.images, "seconds": self.seconds}

    def tensors(self) -> dict[str, Tensor]:
        """The random states of all processes, (processes, bytes) for each generator of torch."""
        states = random_states(self._fabric.device)
        return {f"random/{number}": gather(self._fabric, state).cpu() for number, state in enumerate(states)}

    @classmethod
    def restored(
        cls, epoch: int, saved: Checkpoint, fabric: "Fabric", watch: DivergenceWatch | None = None
    ) -> "EpochState":
        """Inverse of `numbers` and `tensors`."""
        found, numbers = cls(epoch, fabric, watch), saved.numbers["partway"]
        found.losses = LossMeter.from_json(epoch + 1, numbers["losses"], watch, together=fabric.world_size > 1)
        found.images, found._spent = int(numbers["images"]), float(numbers["seconds"])
        states = saved.under("random/")
        # Each process continues with the random numbers of its own.
        found._interrupted = tuple(states[str(number)][fabric.global_rank] for number in range(len(states)))
        return found


class Trainer:
    """A training in progress.

    Args:
        step: What is trained. Its learners are changed in place.
        restarts: How often a training that diverges begins again at most, each time with a tenth of the learning rate.

    Attributes:
        epoch: Epochs done.
        history: One JSON object per epoch, see `EpochReport.record`.
        divergences: A sentence for each time that the training began again.
    """

    def __init__(self, step: TrainingStep, restarts: int = 0) -> None:
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.divergences: list[str] = []
        self._step, self._restarts = step, restarts
        self._average = self._new_average()
        self._partway: EpochState | None = None
        # The beginning is not part of checkpoints: whoever resumes has the same student.
        learners = step.learners if restarts else {}
        self._beginning = {name: clone_tensors(tensors_of(learner.module)) for name, learner in learners.items()}
        self._watch = DivergenceWatch() if restarts else None

    def _new_average(self) -> MovingAverage | None:
        # Searches name no module to average: their supernet is only a means to an architecture.
        step, decay = self._step, self._step.train.ema_decay
        return None if decay is None or step.averaged is None else MovingAverage(step.averaged, decay)

    @property
    def average(self) -> nn.Module | None:
        """The moving average of `TrainingStep.averaged`; None if none is kept."""
        return None if self._average is None else self._average.model

    def resume(self, folder: Path | None, settings: Mapping[str, str]) -> Checkpoint | None:
        """Restore the newest checkpoint of a folder and return it; None if there is none.

        Args:
            folder: Folder for checkpoints; None has none.
            settings: Everything that must be equal for a run to be the same run.

        Raises:
            TrainingError: If the checkpoint is of a run with other settings, or the processes find different ones.
        """
        saved = None if folder is None else load_checkpoint(folder, settings)
        # Before restoring, because processes at different steps would wait for each other forever.
        if self._step.fabric.world_size > 1:
            _check_same_checkpoint(self._step.fabric, saved)
        if saved is not None:
            self.restore(saved)
        return saved

    def run(self, run: RunSettings, state: Callable[[], Checkpoint]) -> None:
        """Train to the last epoch, with a checkpoint after every epoch and within long ones.

        Args:
            run: Folder and policy of the checkpoints, and callbacks.
            state: Returns what a checkpoint holds.

        Raises:
            DivergenceError: If a loss or a weight is no longer finite; the last checkpoints stay.
            Stopped: If that was requested.
        """
        # All processes compute the same numbers; one of them shows them.
        callbacks = run.callbacks if self._step.fabric.is_global_zero else Silent()
        with checkpointing(run.folder, run.checkpoints, self._step.fabric) as checkpointer:
            while (problem := self._train(checkpointer, callbacks, state)) is not None:
                if len(self.divergences) == self._restarts:
                    raise problem
                self._begin_again(problem)
                # Those of before are of later epochs, and would be taken for newer.
                checkpointer.replace_all(state)

    def _train(
        self, checkpointer: Checkpointer, callbacks: Callbacks, state: Callable[[], Checkpoint]
    ) -> DivergenceError | None:
        """Train to the last epoch; return why the training diverged, if it did."""
        step, epochs = self._step, self._step.train.epochs
        with callbacks.start(step.loop, epochs=epochs, steps=step.steps, done=self.epoch) as shown:
            # A run resumed within its first epoch has measured the start already.
            if self.epoch == 0 and not self.history:
                self._report(0, step.measure_start(), shown)
            try:
                while self.epoch < epochs:
                    self.train_epoch(shown, lambda: checkpointer.between(state))
                    checkpointer.save(state)
            except DivergenceError as problem:
                return problem
        return None

    def _begin_again(self, problem: DivergenceError) -> None:
        """Go back to the beginning, with a tenth of the learning rate."""
        # Counted before the list grows: the learning rate of the attempt that has just failed.
        said, before = str(problem).partition(". ")[0], self._step.train.learning_rate / 10 ** len(self.divergences)
        self.divergences.append(
            f"The training diverged: {said}. "
            f"It began again with the learning rate {before / 10:g} instead of {before:g}."
        )
        if self._step.fabric.is_global_zero:
            _LOGGER.warning(self.divergences[-1])
        self._step.begin_again(self._beginning)
        self.epoch, self.history, self._partway = 0, [], None
        self._average, self._watch = self._new_average(), DivergenceWatch()

    def _rate(self, step: int, steps: int) -> float:
        """The learning rate of a step of the whole run."""
        rate = self._step.train.learning_rate_at(step, steps=steps)
        return rate / 10 ** len(self.divergences) if self.divergences else rate

    def train_epoch(self, callbacks: LoopCallbacks, between: Callable[[], None] = lambda: None) -> None:
        """Make one pass over the training images, or what is left of it, and measure what it led to.

        Args:
            callbacks: Called with the numbers of steps and of the epoch.
            between: Called after every step, when everything that changes can be saved.

        Raises:
            TrainingError: If a loss or a weight is no longer finite, or the number of batches is not the promised one.
        """
        step, train = self._step, self._step.train
        first, total = self.epoch * step.steps, train.epochs * step.steps
        # Set as long as the epoch is in progress, because a checkpoint within it must hold its state.
        part = self._partway = self._partway or EpochState(self.epoch, step.fabric, self._watch)
        # A resumed epoch has restored its generators. Seeding them again would repeat their numbers.
        if part.steps == 0:
            step.begin(self.epoch)
        with part.opened(train.seed, callbacks), step.running(self.epoch):
            for batch in step.batches(self.epoch, part.steps):
                number = first + part.steps
                rate = self._rate(number, total)
                looked = part.losses.add(self.train_step(batch, number, rate), rate)
                part.images += batch_length(batch[0])
                # The last step is always shown, before the checkpoint that may follow, so that logs have no gap.
                if looked or part.steps == step.steps:
                    part.losses.read()
                    part.losses.show(callbacks, step.numbers(part.losses.latest, rate, number))
                between()
            # With several processes, a divergence since the last look is raised here, in all of them at once.
            part.losses.look()
        last = first + part.steps - 1
        rate = self._rate(last, total) if part.steps else 0.0
        self._check_epoch(part.losses, rate)
        # From here on a checkpoint is one of the end of the epoch, without random states: the next epoch seeds anew.
        self._partway = None
        self.epoch += 1
        summary = EpochSummary(self.epoch, part.losses.means, rate, last, part.seconds, part.images, self.average)
        self._report(self.epoch, step.measure(summary), callbacks)

    def train_step(self, batch: tuple[Any, ...], number: int, rate: float) -> dict[str, Tensor]:
        """Take one step; with several processes each takes its part of the batch, and all move alike.

        Args:
            batch: The same in all processes.
            number: Number of the step, from 0 over all epochs.
            rate: Learning rate of the first learner.

        Returns:
            The losses of the whole batch: "total" first, then each part.
        """
        step, fabric = self._step, self._step.fabric
        next(iter(step.learners.values())).set_learning_rate(rate)
        own = tuple(own_shard(fabric, part) for part in batch)
        # Batch norms see the whole batch, so that the step is that of one process.
        with synchronized_batch_norms(fabric):
            losses = step.learn(Shard(own, tuple(0 if part is None else batch_length(part) for part in batch), number))
        # After the step has updated the weights; the same in all processes.
        if self._average is not None and step.averaged is not None:
            self._average.update(step.averaged)
        # All losses in one message. A total that is the sum of its parts need not travel.
        totals = [] if losses.total is None else [losses.total.detach()]
        seen = mean_over_processes(fabric, torch.stack([*totals, *(part.detach() for part in losses.parts.values())]))
        total = seen.sum() if losses.total is None else seen[0]
        return {"total": total, **dict(zip(losses.parts, seen[len(totals) :], strict=True))}

    def saved(self, settings: Mapping[str, str]) -> Checkpoint:
        """Return everything that changes, to resume from here.

        Raises:
            TrainingError: If a loss is no longer finite.
        """
        step, part = self._step, self._partway
        own_numbers, own_tensors = step.state(within_epoch=part is not None)
        numbers: dict[str, Any] = {"epoch": self.epoch, "history": self.history, "own": own_numbers}
        tensors = {f"own/{name}": tensor for name, tensor in own_tensors.items()}
        for name, learner in step.learners.items():
            tensors |= {f"{name}/{key}": tensor for key, tensor in learner.tensors().items()}
        if self._average is not None:
            numbers["updates"] = self._average.updates
            tensors |= {f"average/{name}": tensor for name, tensor in tensors_of(self._average.model).items()}
        if part is not None:
            numbers["partway"] = part.numbers()  # Reads the losses, which the watch sees then.
        if self._watch is not None:
            numbers |= {"divergences": self.divergences, "watch": self._watch.to_json()}
        if part is None:
            return Checkpoint(self.epoch, tensors, numbers, settings)
        # Generators are seeded at the beginning of every epoch, so that only their states within one matter.
        numbers["generators"] = {}
        tensors |= part.tensors()
        for name, generator in step.generators.items():
            if isinstance(generator, torch.Generator):
                tensors[f"generator/{name}"] = generator.get_state()
            else:
                numbers["generators"][name] = generator.bit_generator.state
        return Checkpoint(self.epoch, tensors, numbers, settings, part.steps)

    def restore(self, saved: Checkpoint) -> None:
        """Inverse of `saved`."""
        step, numbers = self._step, saved.numbers
        self.epoch = int(numbers["epoch"])
        self.history = [dict(record) for record in numbers["history"]]
        for name, learner in step.learners.items():
            learner.restore(saved, f"{name}/")
        if self._average is not None:
            write_tensors_(self._average.model, saved.under("average/"))
            self._average.updates = int(numbers["updates"])
        step.restore(numbers["own"], saved.under("own/"))
        # Before the state of the epoch, which notes its losses in the watch.
        if self._watch is not None:
            self.divergences = list(numbers["divergences"])
            self._watch = DivergenceWatch.from_json(numbers["watch"])
        if "partway" not in numbers:
            return
        self._partway = EpochState.restored(self.epoch, saved, step.fabric, self._watch)
        for name, generator in step.generators.items():
            if isinstance(generator, torch.Generator):
                # A copy, because torch wants the bytes aligned.
                generator.set_state(saved.tensors[f"generator/{name}"].clone())
            else:
                generator.bit_generator.state = numbers["generators"][name]

    def _report(self, epoch: int, report: EpochReport | None, callbacks: LoopCallbacks) -> None:
        if report is not None:
            self.history.append(report.record)
            callbacks.epoch(epoch, report.numbers, report.line)

    def _check_epoch(self, losses: LossMeter, rate: float) -> None:
        step = self._step
        if losses.steps != step.steps:
            raise TrainingError(
                f"`source` must give {step.steps} batches of {step.train.batch_size} images per epoch; "
                f"got {losses.steps} (epoch {losses.epoch}). Its len() must be the number of images it gives."
            )
        # No loss has shown what the last step of the epoch did to the weights, and a checkpoint follows.
        if not is_finite(next(iter(step.learners.values())).module):
            raise divergence_error("weights", f"the end of epoch {losses.epoch}", rate)
        if self._watch is not None and self._watch.ends_above and losses.epoch == step.train.epochs:
            bound = f"below {self._watch.limit:.3g}"
            raise divergence_error(f"loss ({losses.latest:g})", f"the end of epoch {losses.epoch}", rate, bound)


def _check_same_checkpoint(fabric: "Fabric", saved: Checkpoint | None) -> None:
    """Refuse processes that have found different checkpoints."""
    # No checkpoint counts as one before the first epoch.
    own = torch.tensor([-1, 0] if saved is None else [saved.epoch, saved.step])
    if len(gather(fabric, own).unique(dim=0)) > 1:
        raise TrainingError(
            "`checkpoint` must be one folder that all processes see; got different checkpoints in them. "
            "Use a folder that all machines share."
        )
