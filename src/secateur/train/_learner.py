"""A student and what learns beside it: one step of the optimiser."""

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from secateur.distill import FeatureWatch, TapWatch
from secateur.train._checkpoint import Saved
from secateur.train._evaluate import check_logits, check_targets
from secateur.train._machine import channels_last, in_precision, placed
from secateur.train._norms import synchronised_norms
from secateur.train._parallel import average_gradients_, averaged, own_part
from secateur.train._state import (
    MovingAverage,
    optimiser_tensors,
    tensors_of,
    write_optimiser_,
    write_tensors_,
)
from secateur.train._task import Task

Teach = Callable[[Tensor, Tensor], Tensor]
"""Gives the teacher's logits for images and their labels."""


class Learner:
    """A copy of a student in training, with its losses, optimiser and moving average.

    Args:
        task: What to learn.
        student: Copied.
        teacher: As it lies on the device; None if there is none. For features only.

    Attributes:
        student: In training mode, on the device.
    """

    def __init__(self, task: Task, student: nn.Module, teacher: nn.Module | None) -> None:
        self.student = placed(student, task.fabric.device).train()
        self._task, self._teacher = task, teacher
        schedule = task.schedule
        self._average = None if schedule.ema_decay is None else MovingAverage(self.student, schedule.ema_decay)
        # A copy, because losses may learn too: adaptors, variances, embeddings.
        self._objective = copy.deepcopy(task.objective)
        self._losses = self._objective.learned.to(task.fabric.device).train()
        learners = nn.ModuleList([self.student, self._losses])
        self._learning = [p for p in learners.parameters() if p.requires_grad]
        self._optimiser = schedule.optimiser.build(learners, schedule.learning_rate)
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
        """One step of the optimiser; of several processes each takes its part of the batch, and all move alike.

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
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.zero_grad()
        names: list[str] = []
        sums: Tensor | None = None
        own = channels_last(own_part(fabric, images)), own_part(fabric, labels)
        with synchronised_norms(fabric):
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
        self._optimiser.step()
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
        for model, here, optimiser in self._learners:
            tensors |= {f"{here}{name}": t for name, t in tensors_of(model).items()}
            tensors |= {f"{optimiser}{name}": t for name, t in optimiser_tensors(self._optimiser, model).items()}
        if self._average is not None:
            tensors |= {f"average/{name}": t for name, t in tensors_of(self._average.model).items()}
        return tensors

    @property
    def updates(self) -> int:
        """Of the moving average."""
        return 0 if self._average is None else self._average.updates

    def restore(self, saved: Saved) -> None:
        """Inverse of `tensors` and `updates`."""
        for model, here, optimiser in self._learners:
            write_tensors_(model, saved.under(here))
            write_optimiser_(self._optimiser, model, saved.under(optimiser))
        if self._average is not None:
            write_tensors_(self._average.model, saved.under("average/"))
            self._average.updates = int(saved.numbers["updates"])

    @property
    def _learners(self) -> Iterator[tuple[nn.Module, str, str]]:
        """What the optimiser changes, and where a checkpoint holds it and its running means."""
        yield self.student, "student/", "optimiser/"
        yield self._losses, "losses/", "losses-optimiser/"
