"""The training loop: a student, what it learns from, and all the state that changes meanwhile."""

import dataclasses
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.errors import TrainingError
from secateur.train._checkpoint import Saved
from secateur.train._evaluate import measure
from secateur.train._learner import Learner
from secateur.train._ledger import Ledger, diverged
from secateur.train._machine import Precision, in_precision, placed
from secateur.train._partway import Partway, nothing
from secateur.train._progress import Meter
from secateur.train._record import EpochRecord
from secateur.train._remember import RememberedLogits
from secateur.train._state import Tensors, copied, finite, tensors_of
from secateur.train._task import Task
from secateur.train._teaching import Teaching


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
        self.history: list[EpochRecord] = []
        self.best: Best | None = None
        self.epoch = 0
        self._task = task
        self._partway: Partway | None = None
        self._teaching = None
        if teacher is not None:
            teacher = placed(teacher, task.fabric.device).eval().requires_grad_(requires_grad=False)
            self._teaching = Teaching(in_precision(task.fabric, task.execution.prepared(teacher)), memory)
        self._learner = Learner(task, student, teacher)

    @property
    def result(self) -> Tensors:
        """The tensors to return: of the best epoch on validation, or the latest without a validation split."""
        return tensors_of(self._learner.judged) if self.best is None else self.best.tensors

    def validate_start(self, meter: Meter) -> None:
        """Epoch 0: the student before training, if there is a validation split."""
        if self._task.validation is not None:
            self._close(EpochRecord(0, None, {}, None, None, None, 0.0, None), meter)

    def train_epoch(self, meter: Meter, between: Callable[[], None] = nothing) -> None:
        """One pass over the training images, or what is left of it, then validation.

        Args:
            meter: Where it is shown.
            between: Called after every step, when all that changes can be saved.

        Raises:
            TrainingError: If a loss or a weight is no longer finite, or the source breaks its promises.
        """
        task, learner = self._task, self._learner
        part = self._partway = self._partway or Partway(self.epoch, task.fabric)
        first = self.epoch * task.steps
        teach = None if self._teaching is None else self._teaching.logits
        with (
            part.opened(task.schedule.seed, meter),
            self._taught(),
            learner.watching(),
            task.execution.running(),
        ):
            for images, labels in task.batches(self.epoch, part.steps):
                step = first + part.steps
                rate = task.learning_rate_at(step)
                if task.sparsify is not None:
                    task.sparsify.update_(learner.student, step, task.schedule.epochs * task.steps)
                looked = part.ledger.add(*learner.step(images, labels, rate, teach), rate)
                part.images += len(images)
                if looked:
                    _show(meter, part.ledger, rate)
                between()
            rate = task.learning_rate_at(first + part.steps - 1) if part.steps else 0.0
            part.ledger.look(rate)
        self._check_epoch(part.ledger, rate)
        if part.ledger.unshown:
            _show(meter, part.ledger, rate)
        self._partway = None
        self.epoch += 1
        means, seconds = part.ledger.means, part.seconds
        total = means.pop("total")
        self._close(
            EpochRecord(self.epoch, total, means, rate, None, None, seconds, part.images / seconds),
            meter,
        )

    def saved(self, settings: dict[str, str]) -> Saved:
        """Everything that changes in a run, to go on from here.

        Raises:
            TrainingError: If a loss is no longer finite.
        """
        tensors = self._learner.tensors()
        best = None
        if self.best is not None:
            tensors |= {f"best/{name}": t for name, t in self.best.tensors.items()}
            best = {"epoch": self.best.epoch, "accuracy": self.best.accuracy, "loss": self.best.loss}
        history = [record.to_json() for record in self.history]
        numbers: dict[str, Any] = {"history": history, "best": best, "updates": self._learner.updates}
        part, teaching = self._partway, self._teaching
        if part is None:
            return Saved(self.epoch, tensors, numbers, settings)
        numbers["partway"] = part.numbers()
        tensors |= part.tensors()
        if teaching is not None:
            numbers["teaching"] = teaching.numbers()
            tensors |= {f"teaching/{name}": t for name, t in teaching.tensors().items()}
        return Saved(self.epoch, tensors, numbers, settings, part.steps)

    def restore(self, saved: Saved) -> None:
        """Inverse of `saved`."""
        self.epoch = saved.epoch
        self.history = [EpochRecord.from_json(record) for record in saved.numbers["history"]]
        self._learner.restore(saved)
        if saved.numbers["best"] is not None:
            self.best = Best(**saved.numbers["best"], tensors=saved.under("best/"))
        if saved.step:
            self._partway = Partway.restored(saved, saved.numbers["partway"], self._task.fabric)
            if self._teaching is not None:
                self._teaching.resume_with(saved.numbers["teaching"], saved.under("teaching/"))

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
        if self.epoch == 0 and self._task.fabric.is_global_zero:
            self._teaching.warn_of_guessing()

    def _close(self, record: EpochRecord, meter: Meter) -> None:
        """Validate, remember the best, enter the record."""
        validation = self._task.validation
        if validation is not None:
            schedule = self._task.schedule
            result = measure(
                self._learner.judged.eval(),
                validation,
                batch_size=schedule.batch_size,
                precision=Precision.FLOAT32,
                device=self._task.fabric.device,
                fabric=self._task.fabric,
            )
            self._learner.student.train()
            if not math.isfinite(result.loss):
                raise diverged(f"validation loss ({result.loss:g})", f"epoch {record.epoch}", schedule.learning_rate)
            record = dataclasses.replace(record, validation_accuracy=result.top1, validation_loss=result.loss)
            better = self.best is None or (result.top1, -result.loss) > (self.best.accuracy, -self.best.loss)
            if better and self._task.settled(record.epoch):
                self.best = Best(record.epoch, result.top1, result.loss, copied(tensors_of(self._learner.judged)))
        record = dataclasses.replace(record, density=self._task.density_after(record.epoch))
        self.history.append(record)
        meter.epoch(record.epoch, record.numbers, record.line(self._task.schedule.epochs))

    def _check_epoch(self, ledger: Ledger, rate: float) -> None:
        if ledger.steps != self._task.steps:
            raise TrainingError(
                f"`source` must give {self._task.steps} batches of {self._task.schedule.batch_size} images per epoch; "
                f"got {ledger.steps} (epoch {ledger.epoch}). Its len() must be the number of images it gives."
            )
        if not finite(self._learner.student):
            raise diverged("weights", f"the end of epoch {ledger.epoch}", rate)


def _show(meter: Meter, ledger: Ledger, rate: float) -> None:
    ledger.show(meter, {"loss": ledger.latest, "learning_rate": rate})
