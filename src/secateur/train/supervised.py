"""One step of training a student on labels and a teacher: the step that `fit` hands to the trainer."""

import copy
import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur._batches import batch_length, take
from secateur.distill.objective import Objective
from secateur.distill.taps import AlignedFeatureRecorder, AlignedFeatures, TapRecorder
from secateur.errors import TrainingError
from secateur.prune.weight_pruning import Sparsify
from secateur.tasks.base import Metric, Task
from secateur.tasks.classification import TOP1, Classification, check_logits, check_targets
from secateur.tasks.imitation import Imitation
from secateur.train.callbacks import divergence_error
from secateur.train.checkpoint import Tensors, clone_tensors, tensors_of
from secateur.train.config import Batches, TrainConfig, epoch_batches
from secateur.train.device import Eager, Execution, Precision, copy_to_device, in_precision
from secateur.train.evaluate import in_channels_last, measure_score
from secateur.train.teacher import TeacherCache, TeacherRunner
from secateur.train.trainer import EpochReport, EpochSummary, Learner, Losses, Shard, TrainingStep

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class EpochRecord:
    """The numbers of one epoch. Epoch 0 is the student before training, which is only validated.

    Attributes:
        epoch: From 1; 0 is before training.
        train_loss: Mean total loss over the epoch's steps, in nats if the objective has no feature part; None at 0.
        parts: Mean of each part of the loss before weighting: "label" and "kd" in nats, "feature" dimensionless, and
            each term of the objective by its name.
        learning_rate: Learning rate of the epoch's last step; None at 0.
        validation_score: The metric of the task on the validation images, such as a fraction of right answers; None if
            not validated.
        validation_loss: Mean loss on the validation images; None if not validated, or if the task has none there.
        seconds: Wall-clock time of the epoch's training steps, without validation; 0.0 at 0.
        images_per_s: Training images per second; None at 0.
        density: Kept fraction of the weights that may be pruned, at the end of the epoch; None if none are.
        metric: What the validation score is.
    """

    epoch: int
    train_loss: float | None
    parts: Mapping[str, float]
    learning_rate: float | None
    validation_score: float | None
    validation_loss: float | None
    seconds: float
    images_per_s: float | None
    density: float | None = None
    metric: Metric = TOP1

    def to_json(self) -> dict[str, Any]:
        """Return the record as a JSON object."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "EpochRecord":
        """Inverse of `to_json`."""
        fields: dict[str, Any] = {**data, "metric": Metric(**data["metric"])}
        return cls(**fields)

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers that can be plotted or tabulated over the epochs, by name."""
        means = {f"mean_{name}": value for name, value in self.parts.items()}
        found = {
            "mean_loss": self.train_loss,
            **means,
            "last_learning_rate": self.learning_rate,
            "validation_score": self.validation_score,
            "validation_loss": self.validation_loss,
            "seconds": self.seconds if self.epoch else None,
            "images_per_s": self.images_per_s,
            "density": self.density,
        }
        return {name: value for name, value in found.items() if value is not None}

    def line(self, epochs: int) -> str:
        """Return the epoch in words: ``epoch 3/20  loss 0.4120 (kd 0.4120)  lr 0.012  validation 91.20 %``."""
        words = [f"epoch {self.epoch}/{epochs}"]
        if self.train_loss is not None:
            parts = ", ".join(f"{name} {value:.4f}" for name, value in self.parts.items())
            words.append(f"loss {self.train_loss:.4f} ({parts})")
        if self.learning_rate is not None:
            words.append(f"lr {self.learning_rate:.2g}")
        if self.validation_score is not None:
            loss = "" if self.validation_loss is None else f" (loss {self.validation_loss:.4f})"
            words.append(f"validation {self.metric.text(self.validation_score)}{loss}")
        if self.density is not None:
            words.append(f"weights {100 * self.density:.1f} %")
        if self.images_per_s is not None:
            words.append(f"{self.seconds:.1f} s  {self.images_per_s:.0f} images/s")
        return "  ".join(words)


@dataclass(frozen=True)
class SupervisedRun:
    """What a student is trained on. Nothing of it changes during a run; see `fit` for the fields."""

    source: Batches
    validation: Batches | None
    augment: Any
    objective: Objective
    train: TrainConfig
    alignment: AlignedFeatures | None
    fabric: "Fabric"
    sparsify: Sparsify | None = None
    execution: Execution = Eager()  # noqa: RUF009 - frozen
    task: Task = Classification()  # noqa: RUF009 - frozen

    @property
    def steps(self) -> int:
        """Optimizer steps of one epoch."""
        return self.train.steps_per_epoch(len(self.source))

    def density_after(self, epoch: int) -> float | None:
        """Kept fraction of the weights after this many epochs; None if none are pruned."""
        steps = self.train.epochs * self.steps
        return None if self.sparsify is None else self.sparsify.density_before(max(epoch * self.steps - 1, 0), steps)

    def has_final_density(self, epoch: int) -> bool:
        """Whether as few weights are left after this many epochs as at the end of the run."""
        return self.density_after(epoch) == self.density_after(self.train.epochs)


@dataclass(frozen=True, eq=False)
class BestEpoch:
    """The best epoch so far: best validation score, then lowest validation loss, then earliest."""

    epoch: int
    score: float
    loss: float
    tensors: Tensors


class SupervisedStep(TrainingStep):
    """A step of a student that learns from labels, from a teacher's logits and features, or from both.

    Args:
        job: What to train on.
        student: Copied.
        teacher: Copied; None if there is none.
        cache: The teacher's logits on disk; None computes all.

    Attributes:
        student: The copy, on the device.
        best: The best epoch so far; None without a validation split.
    """

    def __init__(
        self, job: SupervisedRun, student: nn.Module, teacher: nn.Module | None, cache: TeacherCache | None = None
    ) -> None:
        device = job.fabric.device
        self.loop, self.train, self.fabric, self.steps = "train", job.train, job.fabric, job.steps
        self.student = self.averaged = copy_to_device(student, device).train()
        self.best: BestEpoch | None = None
        # A copy, because losses may learn too: adaptors, variances, embeddings.
        self._objective = copy.deepcopy(job.objective)
        losses = self._objective.learned.to(device).train()
        self._learner = Learner.of(nn.ModuleList([self.student, losses]), job.train, job.fabric)
        self.learners = {"student": self._learner}
        self._job = job
        self._task = job.task.with_settings(
            label_smoothing=job.objective.label_smoothing, temperature=job.objective.temperature
        )
        # Only the forward is compiled: checkpoints, averages, masks and hooks see an ordinary module.
        self._forward = in_precision(job.fabric, job.execution.prepared(self.student))
        self._teacher: nn.Module | None = None
        self._runner: TeacherRunner | None = None
        if teacher is not None:
            frozen = copy_to_device(teacher, device).eval().requires_grad_(requires_grad=False)
            call = in_precision(job.fabric, job.execution.prepared(frozen))
            self._teacher = frozen
            self._runner = TeacherRunner(lambda inputs: self._task.train_forward(frozen, call, inputs, None), cache)
        self._features: AlignedFeatureRecorder | None = None
        self._taps: TapRecorder | None = None
        self._checked = False

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Any, ...]]:
        """See `TrainingStep.batches`: inputs and targets."""
        job, device = self._job, self.fabric.device
        return epoch_batches(job.source, self.train, device=device, epoch=epoch, augment=job.augment, start=start)

    @contextmanager
    def running(self, epoch: int) -> Generator[None]:
        """See `TrainingStep.running`: records the features that the losses compare, and the teacher's logits."""
        self.student.train()
        alignment, teacher, objective = self._job.alignment, self._teacher, self._objective
        with self._teacher_epoch(epoch), ExitStack() as stack:
            if alignment is not None and teacher is not None and objective.feature_weight:
                self._features = stack.enter_context(alignment.record(self.student, teacher))
            if teacher is not None and objective.terms:
                self._taps = stack.enter_context(objective.record(self.student, teacher))
            stack.enter_context(self._job.execution.running())
            yield
        self._features = self._taps = None

    @contextmanager
    def _teacher_epoch(self, epoch: int) -> Generator[None]:
        if self._runner is None:
            yield
            return
        self._runner.begin(epoch)
        try:
            yield
        except TrainingError:
            # The losses may be NaN because the teacher's logits are; then the error says that.
            self._runner.check()
            raise
        self._runner.end()
        if epoch == 0 and self.fabric.is_global_zero and isinstance(self._task, Classification):
            self._runner.warn_of_guessing()

    def learn(self, shard: Shard) -> Losses:
        """See `TrainingStep.learn`: the gradient is that of the mean loss over the whole batch."""
        job, fabric = self._job, self.fabric
        # Masks change before the step, so that the gradients are those of the weights that are left.
        if job.sparsify is not None:
            job.sparsify.update_(self.student, shard.step, self.train.epochs * self.steps)
        self._learner.zero_grad()
        names: list[str] = []
        sums: Tensor | None = None
        inputs, targets = in_channels_last(shard.tensors[0]), shard.tensors[1]
        # The optimizer moves once for all parts: gradients of the parts add up in the parameters.
        for part in _parts(batch_length(inputs), self.train.accumulate):
            own = take(inputs, part), take(targets, part)
            total, parts = self._loss(*own, progress=(shard.step + 1) / (self.train.epochs * self.steps))
            # Parts of different sizes count by their images. The weight of a single part is exactly 1.
            weight = batch_length(own[0]) * fabric.world_size / shard.sizes[0]
            fabric.backward(total * weight)
            names = list(parts)
            losses = torch.stack([total.detach(), *parts.values()]) * weight
            sums = losses if sums is None else sums + losses
        self._learner.update()
        assert sums is not None
        return Losses(dict(zip(names, sums[1:], strict=True)), sums[0])

    def _loss(self, inputs: Any, targets: Any, *, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        taught = None if self._runner is None else self._runner.logits(inputs, targets)
        outputs = self._task.train_forward(self.student, self._forward, inputs, targets)
        # Looking at labels waits for an accelerator: there only those of the first batch are looked at.
        if not self._checked or (isinstance(targets, Tensor) and targets.device.type == "cpu"):
            self._check(outputs, taught, targets)
        if isinstance(targets, Tensor) and not (targets.is_floating_point() or targets.is_complex()):
            targets = targets.long()
        total, parts = self._objective(
            outputs,
            teacher_logits=taught,
            labels=targets,
            feature=None if self._features is None else self._features.loss(),
            recorder=self._taps,
            task=self._task,
            progress=progress,
        )
        return total, dict(parts)

    def _check(self, outputs: object, taught: object, targets: Any) -> None:
        """Refuse outputs and targets that the losses are not for.

        Terms of the user's own, without the other losses, may be given any outputs and targets.

        Raises:
            TrainingError: If so.
        """
        objective, self._checked = self._objective, True
        if not isinstance(self._task, Classification):
            if objective.label_weight:
                self._task.check(outputs, targets)
            return
        built_in = bool(objective.label_weight or objective.kd_weight)
        if not built_in and not (isinstance(outputs, Tensor) and outputs.ndim == 2):
            return
        check_logits(outputs, len(targets))
        assert isinstance(outputs, Tensor)
        if objective.kd_weight:
            check_logits(taught, len(targets), "teacher")
        classes = outputs.shape[1]
        indices = targets.ndim == 1 and not targets.is_floating_point()
        # Where only the teacher is learned from, any number may stand for a label that is not known.
        used = objective.label_weight or (objective.terms and classes > 1)
        if used if indices else built_in:
            check_targets(targets, classes)

    def begin_again(self, beginning: Mapping[str, Tensors]) -> None:
        """See `TrainingStep.begin_again`."""
        super().begin_again(beginning)
        self.best = None

    def measure_start(self) -> EpochReport | None:
        """See `TrainingStep.measure_start`: the student before training, if there is a validation split."""
        record = EpochRecord(0, None, {}, None, None, None, 0.0, None)
        # The moving average still equals the student.
        return None if self._job.validation is None else self._measured(record, self.student)

    def measure(self, summary: EpochSummary) -> EpochReport:
        """See `TrainingStep.measure`: the moving average, or the student, is validated; the best epoch is kept."""
        parts = {name: value for name, value in summary.losses.items() if name != "total"}
        speed = summary.images / summary.seconds
        total, rate = summary.losses["total"], summary.learning_rate
        record = EpochRecord(summary.epoch, total, parts, rate, None, None, summary.seconds, speed)
        return self._measured(record, self.student if summary.average is None else summary.average)

    def _measured(self, record: EpochRecord, model: nn.Module) -> EpochReport:
        job = self._job
        if job.validation is not None:
            # In float32 whatever the training used: epochs must be comparable, also with a model measured later.
            found = measure_score(
                model.eval(),
                job.validation,
                task=job.task,
                original=self._teacher if isinstance(job.task, Imitation) else None,
                batch_size=self.train.batch_size,
                precision=Precision.FLOAT32,
                device=self.fabric.device,
                fabric=self.fabric,
            )
            loss = 0.0 if found.loss is None else found.loss
            # A NaN would only lose the comparison below, and the run would continue in vain.
            for name, value in (("validation loss", loss), (found.metric.name, found.value)):
                if not math.isfinite(value):
                    where = f"epoch {record.epoch}"
                    raise divergence_error(f"{name} ({value:g})", where, self.train.learning_rate)
            record = replace(record, validation_score=found.value, validation_loss=found.loss, metric=found.metric)
            key = found.metric.key
            best = self.best
            better = best is None or (key(found.value), -loss) > (key(best.score), -best.loss)
            # While weights are still being pruned, an epoch with more of them must not win.
            if better and job.has_final_density(record.epoch):
                self.best = BestEpoch(record.epoch, found.value, loss, clone_tensors(tensors_of(model)))
        record = replace(record, density=job.density_after(record.epoch))
        return EpochReport(record.to_json(), record.numbers, record.line(self.train.epochs))

    def state(self, *, within_epoch: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `TrainingStep.state`: the best epoch, and within an epoch what the teacher has said."""
        numbers: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        # The best epoch may be long gone when a run is resumed, so its weights travel in every checkpoint.
        if self.best is not None:
            numbers["best"] = {"epoch": self.best.epoch, "score": self.best.score, "loss": self.best.loss}
            tensors |= {f"best/{name}": tensor for name, tensor in self.best.tensors.items()}
        if within_epoch and self._runner is not None:
            numbers["teacher"] = self._runner.numbers()
            tensors |= {f"teacher/{name}": tensor for name, tensor in self._runner.tensors().items()}
        return numbers, tensors

    def restore(self, numbers: Mapping[str, Any], tensors: Tensors) -> None:
        """Inverse of `state`."""
        best, teacher = (
            {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
            for kind in ("best/", "teacher/")
        )
        if "best" in numbers:
            self.best = BestEpoch(**numbers["best"], tensors=best)
        if "teacher" in numbers and self._runner is not None:
            self._runner.resume_with(numbers["teacher"], teacher)

    def result(self, average: nn.Module | None) -> Tensors:
        """The tensors to return: those of the best epoch, or the latest without a validation split."""
        if self.best is not None:
            return self.best.tensors
        return tensors_of(self.student if average is None else average)


def _parts(items: int, count: int) -> list[slice]:
    """Return slices of a batch in parts whose sizes differ by at most one, as those of `torch.tensor_split`."""
    base, more = divmod(items, count)
    ends = [0, *accumulate(base + (part < more) for part in range(count))]
    return [slice(begin, end) for begin, end in pairwise(ends)]
