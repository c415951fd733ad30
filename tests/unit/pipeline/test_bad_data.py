"""Data and tasks that cannot be are refused with one message each, before anything is lost."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pretend import Pretend
from squares import RUN, NamedOutputs, SquareDetector, Squares, pooled_net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

import secateur
from secateur.data.annotated import as_lists
from secateur.errors import SecateurError
from secateur.search import Knapsack
from secateur.tasks import Classification, Detection, MeanMeter, Metric, Regression, Segmentation, Task

Change = Callable[[int, Any, Any], Any]


class Changed(Dataset[Any]):
    """`Squares` of which some items are changed."""

    def __init__(self, kind: str, n: int, change: Change) -> None:
        self.items, self.change = Squares(kind, n), change

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.change(index, *self.items[index])


def run(model: nn.Module, data: Any, task: Task, **more: Any) -> Any:
    return secateur.compress(
        model, data, "macs=60%", task=task, **{**RUN, "strategy": Knapsack(), "target": Pretend(), **more}
    )


def masks(change: Change, *, n: int = 32, test: Change | None = None) -> Any:
    splits = (Changed("masks", n, change), Squares("masks", 16))
    return splits if test is None else (*splits, Changed("masks", 40, test))


def boxes(change: Change, n: int = 32) -> Any:
    loaders = (Changed("boxes", n, change), Squares("boxes", 16))
    return tuple(DataLoader(each, batch_size=8, collate_fn=as_lists) for each in loaders)


def other_boxes(change: Callable[[Tensor], Tensor], *, at: int = 0, n: int = 32) -> Any:
    return boxes(lambda i, x, y: (x, {**y, "boxes": change(y["boxes"])} if i >= at else y), n)


class Without(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (Squares("masks")[i] for i in itertools.count())


class Early(IterableDataset[Any]):
    def __len__(self) -> int:
        return 64

    def __iter__(self) -> Iterator[Any]:
        return (Squares("masks")[i] for i in range(24))


class Pairless(list[Any]):
    """Batches of inputs alone, by name."""


META = [(torch.zeros(8, 3, 16, 16, device="meta"), torch.zeros(8, 16, 16, dtype=torch.int64)) for _ in range(6)]
FLIPPED = [2, 3, 0, 1]

SEGMENTED: dict[str, tuple[Any, str]] = {
    "targets of another task": (lambda: Squares("classes", 32), "must be class indices .batch, height, width."),
    "values beyond the classes": (lambda: masks(lambda i, x, y: (x, y * 7)), r"lie in 0\.\.\.1, .* got 0\.\.\.7"),
    "one late value in training": (
        lambda: masks(lambda i, x, y: (x, y * (7 if i == 60 else 1)), n=64), r"lie in 0\.\.\.1, .* got 0\.\.\.7",
    ),
    "one late value in the test split": (
        lambda: masks(lambda i, x, y: (x, y), test=lambda i, x, y: (x, y * (7 if i == 33 else 1))),
        r"lie in 0\.\.\.1, .* got 0\.\.\.7",
    ),
    "no targets": (lambda: Squares("nothing", 32), "must give targets for Segmentation"),
    "no targets in a mapping": (
        lambda: Pairless([{"x": torch.randn(8, 3, 16, 16)} for _ in range(4)]), "must give targets for Segmentation",
    ),
    "mixed sizes": (
        lambda: masks(lambda i, x, y: (x, y) if i % 2 else (x[:, :12], y[:12])), "could not be read as batches",
    ),
    "nothing but void": (
        lambda: masks(lambda i, x, y: (x, y), test=lambda i, x, y: (x, y * 0 + 255)), "mIoU of the original .* is NaN",
    ),
    "no length": (lambda: (DataLoader(Without(), batch_size=8), Squares("masks", 16)), "must say its length"),
    "an iterator": (lambda: (iter(META), Squares("masks", 16)), "an iterator, which can be read only once"),
    "an early end": (lambda: (DataLoader(Early(), batch_size=8), Squares("masks", 16)), "got 3 of 8"),
    "batches without values": (lambda: (META, Squares("masks", 16)), "on the meta device"),
    "NaN in images": (lambda: masks(lambda i, x, y: (x * float("nan"), y)), "got NaN or infinity"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEGMENTED)
def test_data_of_a_segmenter(name: str) -> None:
    make, said = SEGMENTED[name]
    with pytest.raises(SecateurError, match=said):
        run(NamedOutputs(), make(), Segmentation(void=255))


DETECTED: dict[str, tuple[Any, str]] = {
    "no mapping": (
        lambda: tuple(DataLoader(Squares("masks", n), batch_size=8, collate_fn=as_lists) for n in (32, 16)),
        "A target must be a mapping with `boxes` and `labels`",
    ),
    "no labels": (lambda: boxes(lambda i, x, y: (x, {"boxes": y["boxes"]})), "mapping with `boxes` and `labels`"),
    "flipped corners": (lambda: other_boxes(lambda b: b[:, FLIPPED]), "x1 < x2 and y1 < y2"),
    "flipped corners late in training": (
        lambda: other_boxes(lambda b: b[:, FLIPPED], at=60, n=64), "x1 < x2 and y1 < y2",
    ),
    "no area": (lambda: other_boxes(lambda b: b[:, [0, 1, 0, 1]]), "x1 < x2 and y1 < y2"),
    "outside": (lambda: other_boxes(lambda b: b + 50), r"must lie in their image; image 0 of a batch, 16 x 16"),
    "outside late in training": (lambda: other_boxes(lambda b: b - 50, at=60, n=64), "must lie in their image"),
    "NaN": (lambda: other_boxes(lambda b: b * float("nan")), "x1 < x2 and y1 < y2"),
    "another shape": (lambda: other_boxes(lambda b: torch.zeros(1, 5)), r"must have the shape \(n, 4\)"),
    "two labels of one box": (
        lambda: boxes(lambda i, x, y: (x, {**y, "labels": torch.tensor([1, 1])})), "with one label each",
    ),
    "labels that are no integers": (
        lambda: boxes(lambda i, x, y: (x, {**y, "labels": torch.tensor([0.5])})), "must be integers from 0 on",
    ),
    "negative labels": (
        lambda: boxes(lambda i, x, y: (x, {**y, "labels": torch.tensor([-1])})), "must be integers from 0 on",
    ),
    "no list": (
        lambda: [(torch.randn(8, 3, 16, 16), torch.zeros(8)) for _ in range(4)], "must be a list with a mapping",
    ),
    "no targets": (lambda: [list(torch.randn(8, 3, 16, 16)) for _ in range(4)], "must give targets for Detection"),
}  # fmt: skip


@pytest.mark.parametrize("name", DETECTED)
def test_data_of_a_detector(name: str) -> None:
    make, said = DETECTED[name]
    with pytest.raises(SecateurError, match=said):
        run(SquareDetector(), make(), Detection())


def test_images_without_objects_are_no_fault() -> None:
    class Patient(SquareDetector):
        def forward(self, images: list[Tensor], targets: Any = None) -> Any:
            filled = (
                None if targets is None else [t if len(t["boxes"]) else {"boxes": torch.ones(1, 4)} for t in targets]
            )
            return super().forward(images, filled)

    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    found = run(Patient(), boxes(lambda i, x, y: (x, y if i % 3 else none)), Detection())
    assert found.report.steps[-1].score.n == 16


@dataclass(frozen=True)
class Odd(Task):
    """Cross-entropy of segmenters, and a number that is one for every item."""

    metric = Metric("odd score")

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return F.cross_entropy(outputs["out"], targets)

    def meter(self) -> MeanMeter:
        return MeanMeter(self, self.values)

    def values(self, outputs: Any, targets: Any) -> Tensor:
        return torch.ones(len(targets))


class Undefined(Odd):
    def values(self, outputs: Any, targets: Any) -> Tensor:
        return torch.full((len(targets),), float("nan"))


class UndefinedWhereFew(Odd):
    def values(self, outputs: Any, targets: Any) -> Tensor:
        return torch.full((len(targets),), float("nan") if len(targets) < 16 else 1.0)


class LossOfPixels(Odd):
    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return F.cross_entropy(outputs["out"], targets, reduction="none")


class NumbersOfPixels(Odd):
    def values(self, outputs: Any, targets: Any) -> Tensor:
        return torch.ones(targets.shape)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Undefined(), "the odd score of the original on the 16 test images is NaN. Correct Undefined"),
        (LossOfPixels(), r"a loss of shape \(16, 16, 16\)"),
        (NumbersOfPixels(), r"gave numbers of shape \(16, 16, 16\)"),
    ],
)
def test_tasks_of_ones_own(task: Task, said: str) -> None:
    with pytest.raises(SecateurError, match=said):
        run(NamedOutputs(), (Squares("masks", 32), Squares("masks", 16)), task)


def test_no_epoch_can_be_chosen_by_nan() -> None:
    splits = (Squares("masks", 32), Squares("masks", 8), Squares("masks", 16))
    found = run(NamedOutputs(), splits, UndefinedWhereFew())
    assert found.trained.best_epoch == 0
    assert any("the odd score (nan) must stay finite" in note for note in found.report.warnings)


@pytest.mark.parametrize(
    ("model", "data", "task", "said"),
    [
        (lambda: NamedOutputs().to("meta"), lambda: Squares("masks", 32), Segmentation(), "on the meta device"),
        (
            lambda: pooled_net(2),
            lambda: (Changed("numbers", 32, lambda i, x, y: (x, y * float("nan"))), Squares("numbers", 16)),
            Regression(),
            "must be finite numbers",
        ),
        (lambda: pooled_net(2), lambda: Squares("nothing", 32), Classification(), "must give targets for Classif"),
        (
            lambda: pooled_net(2),
            lambda: tuple(DataLoader(Squares("boxes", n), batch_size=8, collate_fn=as_lists) for n in (32, 16)),
            Regression(),
            "`model` must run the images",
        ),
    ],
)
def test_others(model: Any, data: Any, task: Task, said: str) -> None:
    with pytest.raises(SecateurError, match=said):
        run(model(), data(), task)


def test_a_loop_that_returns_another_architecture() -> None:
    with pytest.raises(SecateurError, match="must return the architecture that it was given"):
        run(NamedOutputs(), Squares("masks", 32), Segmentation(), recovery=lambda s, t, d, c: NamedOutputs())
