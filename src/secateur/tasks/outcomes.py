"""What a classifier answers image by image, and the comparison of two models on the same images.

Two models that are measured on the same images share the luck of the draw. So their difference is known more exactly
than their accuracies are: only the images on which just one of them is right count.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.tasks.base import Meter, Metric, Score, Task, main_output

_Z95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of one classifier on a split, in the stored order of its images.

    Attributes:
        predicted: (n,) class indices.
        labels: (n,) the true ones.
    """

    predicted: Tensor
    labels: Tensor

    @property
    def right(self) -> Tensor:
        """(n,) whether each answer is right."""
        return self.predicted == self.labels


@dataclass(frozen=True)
class PairedTest:
    """Two classifiers on the same images.

    Attributes:
        n: Number of images.
        lost: Images on which only the first model is right.
        gained: Images on which only the second model is right.
        change: (gained - lost) / n, the difference of the accuracies.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p_value: Of the exact test that losses and gains are equally likely.
    """

    n: int
    lost: int
    gained: int
    change: float
    low: float
    high: float
    p_value: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> "PairedTest":
        """Compare two models.

        The interval is d -+ 1.96 * sqrt(b' + c' - (b' - c')^2 / n') / n' around d = (c' - b') / n', where b' and c' are
        the lost and the gained images, each plus one, and n' is the number of images plus two.

        Args:
            first: (n,) whether the first model is right, image by image.
            second: The same of the second model, on the same images.

        Raises:
            ValueError: If the shapes differ, or there is no image.

        References:
            Bonett & Price, Journal of Educational and Behavioral Statistics 37 (2012) 479, for the interval; McNemar,
            Psychometrika 12 (1947) 153, for the test.
        """
        if first.shape != second.shape or first.ndim != 1 or len(first) == 0:
            raise ValueError(
                f"`second` must be of the same images as `first`; got {tuple(second.shape)} and {tuple(first.shape)}."
            )
        from scipy.stats import binomtest

        n, lost, gained = len(first), int((first & ~second).sum()), int((second & ~first).sum())
        more, b, c = n + 2, lost + 1, gained + 1
        middle, half = (c - b) / more, _Z95 * math.sqrt(b + c - (c - b) ** 2 / more) / more
        p_value = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
        return cls(n, lost, gained, (gained - lost) / n, max(middle - half, -1.0), min(middle + half, 1.0), p_value)


@dataclass(frozen=True)
class ClassChange:
    """One class: how many images it has, and how many of them each model gets right."""

    name: str
    n: int
    before: int
    after: int


def class_changes(before: Answers, after: Answers, names: Sequence[str]) -> tuple[ClassChange, ...]:
    """Return the classes that have images, in the order of their labels."""
    rows: list[ClassChange] = []
    labels: list[int] = before.labels.unique().tolist()
    for label in labels:
        mine = before.labels == label
        name = names[label] if label < len(names) else str(label)
        rights = int(before.right[mine].sum()), int(after.right[mine].sum())
        rows.append(ClassChange(name, int(mine.sum()), *rights))
    return tuple(rows)


def changed_confusions(
    before: Answers, after: Answers, names: Sequence[str], most: int = 10
) -> tuple[tuple[str, str, int, int], ...]:
    """Return (class, taken for, images before, images after) of the confusions that changed most, the worst first."""

    def counts(answers: Answers) -> dict[tuple[int, int], int]:
        wrong = ~answers.right
        found: dict[tuple[int, int], int] = {}
        for pair in zip(answers.labels[wrong].tolist(), answers.predicted[wrong].tolist(), strict=True):
            found[pair] = found.get(pair, 0) + 1
        return found

    old, new = counts(before), counts(after)
    pairs = sorted((p for p in old.keys() | new.keys()), key=lambda p: (-abs(new.get(p, 0) - old.get(p, 0)), p))

    def name(label: int) -> str:
        return names[label] if label < len(names) else str(label)

    changed = [p for p in pairs if new.get(p, 0) != old.get(p, 0)][:most]
    changed.sort(key=lambda p: (old.get(p, 0) - new.get(p, 0), p))
    return tuple((name(a), name(b), old.get((a, b), 0), new.get((a, b), 0)) for a, b in changed)


class NotedAnswers(Task):
    """A task of classifiers that also keeps the answers of one pass over a split.

    Args:
        inner: The task whose metric is measured.
    """

    def __init__(self, inner: Task) -> None:
        self._inner = inner
        self._notes: list[tuple[Tensor, Tensor]] = []

    @property
    def metric(self) -> Metric:  # pyright: ignore[reportIncompatibleVariableOverride] - that of the inner task
        """See `Task`."""
        return self._inner.metric

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """See `Task.loss`."""
        return self._inner.loss(outputs, targets)

    def check(self, outputs: Any, targets: Any, *, name: str = "model") -> None:
        """See `Task.check`."""
        self._inner.check(outputs, targets, name=name)

    def meter(self) -> Meter:
        """See `Task.meter`; the answers of an earlier pass are forgotten."""
        self._notes.clear()
        return _NotingMeter(self._inner.meter(), self._notes)

    @property
    def answers(self) -> Answers | None:
        """The answers of the last pass; None if there was none."""
        if not self._notes:
            return None
        predicted, labels = (torch.cat([note[at] for note in self._notes]) for at in (0, 1))
        return Answers(predicted, labels)


class _NotingMeter(Meter):
    def __init__(self, inner: Meter, notes: list[tuple[Tensor, Tensor]]) -> None:
        self._inner, self._notes = inner, notes

    def update(self, outputs: Any, targets: Any) -> None:
        """See `Meter.update`."""
        self._inner.update(outputs, targets)
        self._notes.append((main_output(outputs).argmax(1).cpu(), targets.long().cpu()))

    def compute(self) -> Score:
        """See `Meter.compute`."""
        return self._inner.compute()
