"""What a training run leaves behind.

Losses of an epoch, read from the device rarely.

An epoch in progress, for checkpoints within it.

A student and what learns beside it: one step of the optimizer.

The training loop: a student, what it learns from, and all the state that changes meanwhile."""

import copy
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.distill.taps import FeatureWatch, TapWatch
from secateur.errors import TrainingError
from secateur.train.callbacks import Meter
from secateur.train.checkpoint import (
    MovingAverage,
    Saved,
    Tensors,
    copied,
    finite,
    optimizer_tensors,
    tensors_of,
    write_optimizer_,
    write_tensors_,
)
from secateur.train.config import TrainingTask
from secateur.train.device import (
    Precision,
    channels_last,
    in_precision,
    placed,
    random_states,
    seeded,
    set_random_states,
)
from secateur.train.distributed import average_gradients_, averaged, gathered, own_part, synchronized_norms
from secateur.train.evaluate import check_logits, check_targets, measure
from secateur.train.teacher import TeacherCache, TeacherRunner

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class EpochRecord:
    """The numbers of one epoch. Epoch 0 is the student before training: validated only.

    Attributes:
        epoch: From 1; 0 is before training.
        train_loss: Mean total loss over the epoch's steps, in nats if the objective has no feature part; None at 0.
        parts: Mean of each part of the loss before weighting: "label" and "kd" in nats, "feature" dimensionless, and
            each term of the objective by its name.
        learning_rate: Of the epoch's last step; None at 0.
        validation_accuracy: Fraction of validation images whose highest logit is the label's; None if not validated.
        validation_loss: Mean cross-entropy on the validation images, in nats; None if not validated.
        seconds: Wall-clock time of the epoch's training steps, without validation; 0.0 at 0.
        images_per_s: Training images per second; None at 0.
        density: Kept fraction of the weights that may be pruned, at the end of the epoch; None if none are.
    """

    epoch: int
    train_loss: float | None
    parts: Mapping[str, float]
    learning_rate: float | None
    validation_accuracy: float | None
    validation_loss: float | None
    seconds: float
    images_per_s: float | None
    density: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "EpochRecord":
        """Inverse of `to_json`."""
        return cls(**data)

    @property
    def numbers(self) -> dict[str, float]:
        """What there is to plot or tabulate over the epochs, by name."""
        means = {f"mean_{name}": value for name, value in self.parts.items()}
        found = {
            "mean_loss": self.train_loss,
            **means,
            "last_learning_rate": self.learning_rate,
            "validation_accuracy": self.validation_accuracy,
            "validation_loss": self.validation_loss,
            "seconds": self.seconds if self.epoch else None,
            "images_per_s": self.images_per_s,
            "density": self.density,
        }
        return {name: value for name, value in found.items() if value is not None}

    def line(self, epochs: int) -> str:
        """One of so many epochs in words: ``epoch 3/20  loss 0.4120 (kd 0.4120)  lr 0.012  validation 91.20 %``."""
        words = [f"epoch {self.epoch}/{epochs}"]
        if self.train_loss is not None:
            parts = ", ".join(f"{name} {value:.4f}" for name, value in self.parts.items())
            words.append(f"loss {self.train_loss:.4f} ({parts})")
        if self.learning_rate is not None:
            words.append(f"lr {self.learning_rate:.2g}")
        if self.validation_accuracy is not None:
            words.append(f"validation {100 * self.validation_accuracy:.2f} % (loss {self.validation_loss:.4f})")
        if self.density is not None:
            words.append(f"weights {100 * self.density:.1f} %")
        if self.images_per_s is not None:
            words.append(f"{self.seconds:.1f} s  {self.images_per_s:.0f} images/s")
        return "  ".join(words)


@dataclass(frozen=True)
class Trained:
    """A trained student and how it came about.

    Attributes:
        model: A new module in eval mode, on the device of the student that was given.
        history: One record per epoch; with a validation split it begins with epoch 0, before training.
        best_epoch: The epoch the model is from.
        best_accuracy: Its validation accuracy as a fraction, or None: there was no validation split and the
            last epoch was returned.
        precision: The number formats used in training.
        device: The device used in training, such as "cpu".
    """

    model: nn.Module
    history: tuple[EpochRecord, ...]
    best_epoch: int
    best_accuracy: float | None
    precision: Precision
    device: str


STEPS_PER_LOOK = 20
"""At most so many steps between two looks at the losses. A look waits for the device, so it must be rare."""

SECONDS_PER_LOOK = 1.0
"""When steps take long, look sooner: somebody may be watching, and one wait per second costs nothing."""


class LossMeter:
    """Sums up the losses of one epoch; finds the step of the first that is not finite; remembers what was shown of it.

    Attributes:
        epoch: From 1.
        steps: Steps seen.
        latest: The total loss of the last step looked at.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.steps = 0
        self.latest = math.nan
        self._sums: dict[str, float] = {}
        self._unseen: list[Tensor] = []
        self._shown: list[tuple[int, dict[str, float]]] = []
        self._rate = 0.0
        self._looked = perf_counter()

    def add(self, total: Tensor, parts: Mapping[str, Tensor], rate: float) -> bool:
        """Note the losses of one step, still on the device; says whether it took a look at them."""
        if not self._sums:
            self._sums = dict.fromkeys(["total", *parts], 0.0)
        self._unseen.append(torch.stack([total.detach(), *parts.values()]))
        self.steps += 1
        self._rate = rate
        looks = len(self._unseen) == STEPS_PER_LOOK or perf_counter() - self._looked > SECONDS_PER_LOOK
        if looks:
            self.look(rate)
        return looks

    def look(self, rate: float) -> None:
        """Read the losses not read yet.

        Raises:
            TrainingError: If one of them is not finite.
        """
        rows = torch.stack(self._unseen).tolist() if self._unseen else []
        first = self.steps - len(rows) + 1
        self._unseen.clear()
        self._looked = perf_counter()
        for step, row in enumerate(rows, first):
            if not all(map(math.isfinite, row)):
                values = ", ".join(f"{name} {value:g}" for name, value in zip(self._sums, row, strict=True))
                raise diverged(f"loss ({values})", f"epoch {self.epoch}, step {step}", rate)
            for name, value in zip(self._sums, row, strict=True):
                self._sums[name] += value
            self.latest = row[0]

    def show(self, meter: Meter, numbers: Mapping[str, float]) -> None:
        """Show numbers of the step that was looked at."""
        self._shown.append((self.steps, dict(numbers)))
        meter.step(self.epoch, self.steps, numbers)

    def show_again(self, meter: Meter) -> None:
        """Everything that was shown of the epoch before it was interrupted, so that no log has a gap."""
        for step, numbers in self._shown:
            meter.step(self.epoch, step, numbers)

    @property
    def unshown(self) -> bool:
        """Whether the last step was not shown."""
        return not self._shown or self._shown[-1][0] < self.steps

    @property
    def means(self) -> dict[str, float]:
        """Mean over the steps: "total" and each part; looks at the losses not read yet.

        Raises:
            TrainingError: See `look`.
        """
        self.look(self._rate)
        return {name: value / self.steps for name, value in self._sums.items()}

    def to_json(self) -> dict[str, Any]:
        """A JSON object of everything; looks at the losses not read yet.

        Raises:
            TrainingError: See `look`.
        """
        self.look(self._rate)
        return {"steps": self.steps, "latest": self.latest, "sums": self._sums, "shown": self._shown}

    @classmethod
    def from_json(cls, epoch: int, data: Mapping[str, Any]) -> "LossMeter":
        """Inverse of `to_json`."""
        ledger = cls(epoch)
        ledger.steps, ledger.latest = int(data["steps"]), float(data["latest"])
        ledger._sums = {name: float(value) for name, value in data["sums"].items()}
        ledger._shown = [(int(step), dict(numbers)) for step, numbers in data["shown"]]
        return ledger


def diverged(what: str, where: str, rate: float) -> TrainingError:
    """The error for a run whose numbers are no longer finite."""
    return TrainingError(
        f"the {what} must stay finite; that failed at {where} (learning rate {rate:.3g}). "
        "Lower the learning rate or warm up longer, and check that the images are normalized."
    )


def nothing() -> None:
    """What a loop calls between steps if nobody saves."""


class EpochState:
    """The sums, the time and the random numbers of an epoch, as far as it has come.

    Args:
        epoch: From 0.
        fabric: Device and processes.

    Attributes:
        ledger: Losses so far.
        images: Seen so far.
    """

    def __init__(self, epoch: int, fabric: "Fabric") -> None:
        self.ledger = LossMeter(epoch + 1)
        self.images = 0
        self._epoch, self._fabric = epoch, fabric
        self._left: tuple[Tensor, ...] | None = None
        self._spent, self._began = 0.0, perf_counter()

    @property
    def steps(self) -> int:
        """Done so far."""
        return self.ledger.steps

    @property
    def seconds(self) -> float:
        """Wall-clock time spent so far, by all processes that took part one after the other."""
        return self._spent + perf_counter() - self._began

    @contextmanager
    def opened(self, seed: int, meter: Meter) -> Generator[None]:
        """Random numbers of the epoch: from its beginning, or from where it was interrupted.

        Each of several processes has its own. What was shown of the epoch before it was interrupted is shown again, so
        that no log has a gap.

        Args:
            seed: Of the whole run.
            meter: Where the epoch is shown.
        """
        rank = (self._fabric.global_rank,) if self._fabric.world_size > 1 else ()
        with seeded(self._fabric.device, seed, self._epoch, *rank):
            if self._left is not None:
                set_random_states(self._fabric.device, self._left)
            self.ledger.show_again(meter)
            yield

    def numbers(self) -> dict[str, Any]:
        """A JSON object; looks at the losses not read yet.

        Raises:
            TrainingError: If one of them is not finite.
        """
        return {"ledger": self.ledger.to_json(), "images": self.images, "seconds": self.seconds}

    def tensors(self) -> dict[str, Tensor]:
        """Where the random numbers of all processes are, (processes, bytes) for each generator."""
        states = random_states(self._fabric.device)
        return {f"random/{number}": gathered(self._fabric, state).cpu() for number, state in enumerate(states)}

    @classmethod
    def restored(cls, saved: Saved, numbers: Mapping[str, Any], fabric: "Fabric") -> "EpochState":
        """Inverse of `numbers` and `tensors`."""
        partway = cls(saved.epoch, fabric)
        partway.ledger = LossMeter.from_json(saved.epoch + 1, numbers["ledger"])
        partway.images, partway._spent = int(numbers["images"]), float(numbers["seconds"])
        states = saved.under("random/")
        partway._left = tuple(states[str(number)][fabric.global_rank] for number in range(len(states)))
        return partway


Teach = Callable[[Tensor, Tensor], Tensor]
"""Gives the teacher's logits for images and their labels."""


class Learner:
    """A copy of a student in training, with its losses, optimizer and moving average.

    Args:
        task: What to learn.
        student: Copied.
        teacher: As it lies on the device; None if there is none. For features only.

    Attributes:
        student: In training mode, on the device.
    """

    def __init__(self, task: TrainingTask, student: nn.Module, teacher: nn.Module | None) -> None:
        self.student = placed(student, task.fabric.device).train()
        self._task, self._teacher = task, teacher
        schedule = task.schedule
        self._average = None if schedule.ema_decay is None else MovingAverage(self.student, schedule.ema_decay)
        # A copy, because losses may learn too: adaptors, variances, embeddings.
        self._objective = copy.deepcopy(task.objective)
        self._losses = self._objective.learned.to(task.fabric.device).train()
        learners = nn.ModuleList([self.student, self._losses])
        self._learning = [p for p in learners.parameters() if p.requires_grad]
        self._optimizer = schedule.optimizer.build(learners, schedule.learning_rate)
        self._forward = in_precision(task.fabric, task.execution.prepared(self.student))
        self._features: FeatureWatch | None = None
        self._taps: TapWatch | None = None
        self._checked = False

    @property
    def judged(self) -> nn.Module:
        """What is validated and returned."""
        return self.student if self._average is None else self._average.model

    @contextmanager
    def watching(self) -> Generator[None]:
        """Listen to the features that the losses compare."""
        alignment, teacher = self._task.alignment, self._teacher
        with ExitStack() as stack:
            if alignment is not None and teacher is not None and self._objective.feature_weight:
                self._features = stack.enter_context(alignment.watch(self.student, teacher))
            if teacher is not None and self._objective.terms:
                self._taps = stack.enter_context(self._objective.watch(self.student, teacher))
            yield
        self._features = self._taps = None

    def step(
        self, images: Tensor, labels: Tensor, rate: float, teach: Teach | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step of the optimizer; of several processes each takes its part of the batch, and all move alike.

        The gradient is that of the mean loss over the batch: the parts that it is computed in count by their images.

        Args:
            images: A batch, the same in all processes.
            labels: Of the batch.
            rate: Learning rate.
            teach: Gives the teacher's logits; None without a teacher.

        Returns:
            The loss of the batch and its parts, in all processes alike.
        """
        fabric, schedule = self._task.fabric, self._task.schedule
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        names: list[str] = []
        sums: Tensor | None = None
        own = channels_last(own_part(fabric, images)), own_part(fabric, labels)
        with synchronized_norms(fabric):
            for some, of_them in zip(*(tensor.tensor_split(schedule.accumulate) for tensor in own), strict=True):
                total, parts = self._loss(some, of_them, teach)
                weight = len(of_them) * fabric.world_size / len(labels)  # 1 of one part, exactly.
                fabric.backward(total * weight)
                names = list(parts)
                losses = torch.stack([total.detach(), *parts.values()]) * weight
                sums = losses if sums is None else sums + losses
        average_gradients_(fabric, self._learning)
        if schedule.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._learning, schedule.clip_norm)
        self._optimizer.step()
        if self._average is not None:
            self._average.update(self.student)
        assert sums is not None
        seen = averaged(fabric, sums)
        return seen[0], dict(zip(names, seen[1:], strict=True))

    def _loss(self, images: Tensor, labels: Tensor, teach: Teach | None) -> tuple[Tensor, dict[str, Tensor]]:
        teacher_logits = None if teach is None else teach(images, labels)
        logits = self._forward(images)
        if not self._checked:
            self._check_first(logits, labels)
        total, parts = self._objective(
            logits,
            teacher_logits=teacher_logits,
            labels=labels,
            feature=None if self._features is None else self._features.loss(),
            watch=self._taps,
        )
        return total, dict(parts)

    def _check_first(self, logits: Tensor, labels: Tensor) -> None:
        self._checked = True
        check_logits(logits, len(labels))
        if self._objective.label_weight or self._objective.terms:
            check_targets(labels, logits.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes, by name; no copies."""
        tensors: dict[str, Tensor] = {}
        for model, here, optimizer in self._learners:
            tensors |= {f"{here}{name}": t for name, t in tensors_of(model).items()}
            tensors |= {f"{optimizer}{name}": t for name, t in optimizer_tensors(self._optimizer, model).items()}
        if self._average is not None:
            tensors |= {f"average/{name}": t for name, t in tensors_of(self._average.model).items()}
        return tensors

    @property
    def updates(self) -> int:
        """Of the moving average."""
        return 0 if self._average is None else self._average.updates

    def restore(self, saved: Saved) -> None:
        """Inverse of `tensors` and `updates`."""
        for model, here, optimizer in self._learners:
            write_tensors_(model, saved.under(here))
            write_optimizer_(self._optimizer, model, saved.under(optimizer))
        if self._average is not None:
            write_tensors_(self._average.model, saved.under("average/"))
            self._average.updates = int(saved.numbers["updates"])

    @property
    def _learners(self) -> Iterator[tuple[nn.Module, str, str]]:
        """What the optimizer changes, and where a checkpoint holds it and its running means."""
        yield self.student, "student/", "optimizer/"
        yield self._losses, "losses/", "losses-optimizer/"


@dataclass(frozen=True)
class Best:
    """The best epoch so far: highest validation accuracy, then lowest validation loss, then earliest."""

    epoch: int
    accuracy: float
    loss: float
    tensors: Tensors


class Trainer:
    """A run in progress. Whatever changes in it lies here, and all of it goes into a checkpoint.

    Attributes:
        history: Records of the epochs so far.
        best: The best epoch so far; None without a validation split.
        epoch: Epochs trained.
    """

    def __init__(
        self, task: TrainingTask, student: nn.Module, teacher: nn.Module | None, memory: TeacherCache | None = None
    ) -> None:
        self.history: list[EpochRecord] = []
        self.best: Best | None = None
        self.epoch = 0
        self._task = task
        self._partway: EpochState | None = None
        self._teaching = None
        if teacher is not None:
            teacher = placed(teacher, task.fabric.device).eval().requires_grad_(requires_grad=False)
            self._teaching = TeacherRunner(in_precision(task.fabric, task.execution.prepared(teacher)), memory)
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
        part = self._partway = self._partway or EpochState(self.epoch, task.fabric)
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
            self._partway = EpochState.restored(saved, saved.numbers["partway"], self._task.fabric)
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

    def _check_epoch(self, ledger: LossMeter, rate: float) -> None:
        if ledger.steps != self._task.steps:
            raise TrainingError(
                f"`source` must give {self._task.steps} batches of {self._task.schedule.batch_size} images per epoch; "
                f"got {ledger.steps} (epoch {ledger.epoch}). Its len() must be the number of images it gives."
            )
        if not finite(self._learner.student):
            raise diverged("weights", f"the end of epoch {ledger.epoch}", rate)


def _show(meter: Meter, ledger: LossMeter, rate: float) -> None:
    ledger.show(meter, {"loss": ledger.latest, "learning_rate": rate})
