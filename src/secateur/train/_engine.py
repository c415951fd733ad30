"""The training loop: a student, what it learns from, and all the state that changes meanwhile."""

import copy
import dataclasses
import math
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from secateur.distill import AlignedFeatures, FeatureWatch, Objective, TapWatch
from secateur.errors import TrainingError
from secateur.sparsity import Sparsify
from secateur.train._batches import Batches
from secateur.train._checkpoint import Saved
from secateur.train._evaluate import check_labels, check_logits, measure
from secateur.train._ledger import Ledger, diverged
from secateur.train._machine import Precision, channels_last, placed, seeded
from secateur.train._progress import Meter
from secateur.train._record import EpochRecord
from secateur.train._remember import RememberedLogits
from secateur.train._schedule import Schedule
from secateur.train._state import (
    MovingAverage,
    Tensors,
    copied,
    finite,
    optimiser_tensors,
    tensors_of,
    write_optimiser_,
    write_tensors_,
)
from secateur.train._teaching import Teaching

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Task:
    """What to learn and from what: everything of a run that does not change."""

    source: Batches
    validation: Batches | None
    augment: Any
    objective: Objective
    schedule: Schedule
    alignment: AlignedFeatures | None
    fabric: "Fabric"
    sparsify: Sparsify | None = None

    @property
    def steps(self) -> int:
        """Optimiser steps of one epoch."""
        return self.schedule.steps_per_epoch(len(self.source))

    def density_after(self, epoch: int) -> float | None:
        """Kept fraction of the weights after so many epochs; None if none are pruned."""
        steps = self.schedule.epochs * self.steps
        return None if self.sparsify is None else self.sparsify.density_before(max(epoch * self.steps - 1, 0), steps)

    def settled(self, epoch: int) -> bool:
        """Whether so many epochs have ended with as few weights as the result may have."""
        return self.density_after(epoch) == self.density_after(self.schedule.epochs)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of an epoch, from 0."""
        batch_size = self.schedule.batch_size
        return self.source.batches(
            batch_size,
            device=self.fabric.device,
            seed=self.schedule.seed,
            epoch=epoch,
            augment=self.augment,
            drop_last=len(self.source) >= batch_size,
        )


@dataclass(frozen=True)
class Best:
    """The best epoch so far: highest validation accuracy, then lowest validation loss, then earliest."""

    epoch: int
    accuracy: float
    loss: float
    tensors: Tensors


class Engine:
    """A run in progress. Whatever changes in it lies here, and all of it goes into a checkpoint.

    Attributes:
        history: Records of the epochs so far.
        best: The best epoch so far; None without a validation split.
        epoch: Epochs trained.
    """

    def __init__(
        self, task: Task, student: nn.Module, teacher: nn.Module | None, memory: RememberedLogits | None = None
    ) -> None:
        device = task.fabric.device
        self.history: list[EpochRecord] = []
        self.best: Best | None = None
        self.epoch = 0
        self._task = task
        self._student = placed(student, device).train()
        self._teacher = None if teacher is None else placed(teacher, device).eval().requires_grad_(requires_grad=False)
        # Set up by Fabric too, so that both models see their input in the same precision.
        self._teaching = None
        if self._teacher is not None:
            self._teaching = Teaching(task.fabric.setup_module(self._teacher, move_to_device=False), memory)
        decay = task.schedule.ema_decay
        self._average = None if decay is None else MovingAverage(self._student, decay)
        # A copy, because losses may learn too: adaptors, variances, embeddings.
        self._objective = copy.deepcopy(task.objective)
        self._losses = self._objective.learned.to(device).train()
        learners = nn.ModuleList([self._student, self._losses])
        self._optimiser = task.schedule.optimiser.build(learners, task.schedule.learning_rate)
        self._forward, self._stepper = task.fabric.setup(self._student, self._optimiser, move_to_device=False)
        self._checked = False

    @property
    def result(self) -> Tensors:
        """The tensors to return: of the best epoch on validation, or the latest without a validation split."""
        return tensors_of(self._judged) if self.best is None else self.best.tensors

    def validate_start(self, meter: Meter) -> None:
        """Epoch 0: the student before training, if there is a validation split."""
        if self._task.validation is not None:
            self._close(EpochRecord(0, None, {}, None, None, None, 0.0, None), meter)

    def train_epoch(self, meter: Meter) -> None:
        """One pass over the training images, then validation.

        Raises:
            TrainingError: If a loss or a weight is no longer finite, or the source breaks its promises.
        """
        began = perf_counter()
        ledger = Ledger(self.epoch + 1)
        steps, schedule = self._task.steps, self._task.schedule
        rate, images_seen, looked = 0.0, 0, False
        with seeded(self._task.fabric.device, schedule.seed, self.epoch), ExitStack() as stack:
            stack.enter_context(self._taught())
            watch, taps = self._watch(stack), self._watch_taps(stack)
            for step, (images, labels) in enumerate(self._task.batches(self.epoch), self.epoch * steps):
                rate = schedule.learning_rate_at(step, steps=schedule.epochs * steps)
                if self._task.sparsify is not None:
                    self._task.sparsify.update_(self._student, step, schedule.epochs * steps)
                looked = ledger.add(*self._step(images, labels, rate, watch, taps), rate)
                images_seen += len(images)
                if looked:
                    _show(meter, ledger, rate)
            ledger.look(rate)
        self._check_epoch(ledger, rate)
        if not looked:
            _show(meter, ledger, rate)
        seconds = perf_counter() - began
        self.epoch += 1
        means = ledger.means
        total = means.pop("total")
        self._close(
            EpochRecord(self.epoch, total, means, rate, None, None, seconds, images_seen / seconds),
            meter,
        )

    def saved(self, settings: dict[str, str]) -> Saved:
        """Everything that changes in a run, to go on from here."""
        tensors: dict[str, Tensor] = {}
        for model, here, optimiser in self._learners:
            tensors |= {f"{here}{name}": t for name, t in tensors_of(model).items()}
            tensors |= {f"{optimiser}{name}": t for name, t in optimiser_tensors(self._optimiser, model).items()}
        if self._average is not None:
            tensors |= {f"average/{name}": t for name, t in tensors_of(self._average.model).items()}
        best = None
        if self.best is not None:
            tensors |= {f"best/{name}": t for name, t in self.best.tensors.items()}
            best = {"epoch": self.best.epoch, "accuracy": self.best.accuracy, "loss": self.best.loss}
        history = [record.to_json() for record in self.history]
        updates = 0 if self._average is None else self._average.updates
        return Saved(self.epoch, tensors, {"history": history, "best": best, "updates": updates}, settings)

    def restore(self, saved: Saved) -> None:
        """Inverse of `saved`."""
        self.epoch = saved.epoch
        self.history = [EpochRecord.from_json(record) for record in saved.numbers["history"]]
        for model, here, optimiser in self._learners:
            write_tensors_(model, saved.under(here))
            write_optimiser_(self._optimiser, model, saved.under(optimiser))
        if self._average is not None:
            write_tensors_(self._average.model, saved.under("average/"))
            self._average.updates = int(saved.numbers["updates"])
        if saved.numbers["best"] is not None:
            self.best = Best(**saved.numbers["best"], tensors=saved.under("best/"))

    @property
    def _learners(self) -> tuple[tuple[nn.Module, str, str], ...]:
        """What the optimiser changes, and where a checkpoint holds it and its running means."""
        return (self._student, "student/", "optimiser/"), (self._losses, "losses/", "losses-optimiser/")

    @property
    def _judged(self) -> nn.Module:
        """What is validated and returned."""
        return self._student if self._average is None else self._average.model

    @contextmanager
    def _taught(self) -> Generator[None]:
        """An epoch of the teacher's. If the losses are no numbers because its logits are none, the error says that."""
        if self._teaching is None:
            yield
            return
        self._teaching.begin(self.epoch)
        try:
            yield
        except TrainingError:
            self._teaching.check()
            raise
        self._teaching.end()
        if self.epoch == 0:
            self._teaching.warn_of_guessing()

    def _watch(self, stack: ExitStack) -> FeatureWatch | None:
        alignment = self._task.alignment
        if alignment is None or self._teacher is None or not self._objective.feature_weight:
            return None
        return stack.enter_context(alignment.watch(self._student, self._teacher))

    def _watch_taps(self, stack: ExitStack) -> TapWatch | None:
        if self._teacher is None or not self._objective.terms:
            return None
        return stack.enter_context(self._objective.watch(self._student, self._teacher))

    def _step(
        self, images: Tensor, labels: Tensor, rate: float, watch: FeatureWatch | None, taps: TapWatch | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        images = channels_last(images)
        teacher_logits = None if self._teaching is None else self._teaching.logits(images, labels)
        logits = self._forward(images)
        if not self._checked:
            self._check_first(logits, labels)
        total, parts = self._objective(
            logits,
            teacher_logits=teacher_logits,
            labels=labels,
            feature=None if watch is None else watch.loss(),
            watch=taps,
        )
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.zero_grad()
        self._task.fabric.backward(total)
        self._stepper.step()
        if self._average is not None:
            self._average.update(self._student)
        return total, dict(parts)

    def _close(self, record: EpochRecord, meter: Meter) -> None:
        """Validate, remember the best, enter the record."""
        validation = self._task.validation
        if validation is not None:
            schedule = self._task.schedule
            result = measure(
                self._judged.eval(),
                validation,
                batch_size=schedule.batch_size,
                precision=Precision.FLOAT32,
                device=self._task.fabric.device,
            )
            self._student.train()
            if not math.isfinite(result.loss):
                raise diverged(f"validation loss ({result.loss:g})", f"epoch {record.epoch}", schedule.learning_rate)
            record = dataclasses.replace(record, validation_accuracy=result.top1, validation_loss=result.loss)
            better = self.best is None or (result.top1, -result.loss) > (self.best.accuracy, -self.best.loss)
            if better and self._task.settled(record.epoch):
                self.best = Best(record.epoch, result.top1, result.loss, copied(tensors_of(self._judged)))
        record = dataclasses.replace(record, density=self._task.density_after(record.epoch))
        self.history.append(record)
        meter.epoch(record.epoch, record.numbers, record.line(self._task.schedule.epochs))

    def _check_first(self, logits: Tensor, labels: Tensor) -> None:
        self._checked = True
        check_logits(logits, len(labels))
        if self._objective.label_weight or self._objective.terms:
            check_labels(labels, logits.shape[1])

    def _check_epoch(self, ledger: Ledger, rate: float) -> None:
        if ledger.steps != self._task.steps:
            raise TrainingError(
                f"`source` must give {self._task.steps} batches of {self._task.schedule.batch_size} images per epoch; "
                f"got {ledger.steps} (epoch {ledger.epoch}). Its len() must be the number of images it gives."
            )
        if not finite(self._student):
            raise diverged("weights", f"the end of epoch {ledger.epoch}", rate)


def _show(meter: Meter, ledger: Ledger, rate: float) -> None:
    meter.step(ledger.epoch, ledger.steps, {"loss": ledger.latest, "learning_rate": rate})
