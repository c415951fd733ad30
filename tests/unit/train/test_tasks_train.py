"""Every task is trained, validated and resumed by the one trainer, on data of one's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import fit_small, same, small_config, small_net, state
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from secateur.data.annotated import as_lists
from secateur.data.loaders import own_split
from secateur.distill import Objective
from secateur.errors import TrainingError
from secateur.tasks import (
    Classification,
    Detection,
    ImageToImage,
    Imitation,
    MeanMeter,
    Metric,
    MultiLabel,
    Regression,
    Segmentation,
    Task,
)
from secateur.train import AdamW, CheckpointPolicy, Stopped, Trained, evaluate, stoppable

BOTH = Objective(kd_weight=0.5, label_weight=0.5)
TEACHER_ONLY = Objective(kd_weight=1, label_weight=0)


class Spots(Dataset):
    """Images with a bright square, and a target of one kind for it."""

    def __init__(self, kind: str, n: int = 48) -> None:
        self.kind, self.n = kind, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        image = 0.1 * torch.randn(3, 16, 16, generator=generator)
        x, y = torch.randint(0, 10, (2,), generator=generator).tolist()
        clean = torch.zeros(3, 16, 16)
        clean[:, y : y + 6, x : x + 6] = 1
        # The global generator too: augmentation that a resumed run must repeat.
        image = image + clean + 0.01 * torch.rand(1)
        targets: dict[str, Any] = {
            "masks": clean[0].long(),
            "several": torch.tensor([x > 4, y > 4]).float(),
            "numbers": torch.tensor([x / 10, y / 10]),
            "images": clean,
            "boxes": {"boxes": torch.tensor([[x, y, x + 6.0, y + 6.0]]), "labels": torch.tensor([1])},
            "classes": int(x > 4),
        }
        return image if self.kind == "nothing" else (image, targets[self.kind])


def dense_net(outputs: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, outputs, 3, padding=1)
        )


class TinyDetector(nn.Module):
    """One box per image, by the interface of torchvision's detectors."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
            )
            self.head = nn.Linear(128, 4)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        middle = 16 * self.head(self.body(torch.stack(images))).sigmoid()
        boxes = torch.cat([middle[:, :2], middle[:, :2] + 6], 1)
        if self.training:
            assert targets is not None
            wanted = torch.stack([target["boxes"][0] for target in targets])
            return {"box": nn.functional.l1_loss(boxes, wanted) / 16}
        one = {"labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
        return [{"boxes": box[None], **one} for box in boxes]


KINDS: dict[str, tuple[Task, Any, str]] = {
    "classification": (Classification(), lambda: small_net(classes=2), "classes"),
    "several labels": (MultiLabel(), lambda: small_net(classes=2), "several"),
    "segmentation": (Segmentation(), lambda: dense_net(2), "masks"),
    "regression": (Regression(), lambda: small_net(classes=2), "numbers"),
    "image to image": (ImageToImage(), lambda: dense_net(3), "images"),
    "detection": (Detection(), TinyDetector, "boxes"),
    "imitation": (Imitation(), lambda: dense_net(3), "nothing"),
}


def split_of(kind: str, n: int = 48) -> Any:
    if kind != "boxes":
        return own_split(Spots(kind, n))
    return own_split(DataLoader(Spots(kind, n), batch_size=16, collate_fn=as_lists, shuffle=True))


def trained(name: str, **changes: Any) -> Trained:
    task, model, kind = KINDS[name]
    settings: dict[str, Any] = {
        "train": small_config(3, learning_rate=0.01, optimizer=AdamW()),
        "objective": TEACHER_ONLY if isinstance(task, Imitation) else BOTH,
        "teacher": model(),
        "task": task,
        "validation": split_of(kind, 20),
    }
    student = model()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(0.9)
    return fit_small(student, split_of(kind), **(settings | changes))


@pytest.mark.parametrize("name", KINDS)
def test_every_task_learns_and_the_best_epoch_is_returned(name: str) -> None:
    task, model, kind = KINDS[name]
    found = trained(name)
    scores = [record.validation_score for record in found.history]
    key = task.metric.key
    assert found.best_score == max(scores, key=key)
    assert key(found.best_score) >= key(scores[0])
    assert found.history[-1].train_loss < found.history[1].train_loss
    original = model() if isinstance(task, Imitation) else None
    again = evaluate(found.model, split_of(kind, 20), task=task, original=original, batch_size=16)
    assert again.value == pytest.approx(found.best_score, rel=1e-4)
    assert f"validation {task.metric.text(scores[1])}" in found.history[1].line(3)


@pytest.mark.parametrize("name", ["segmentation", "detection", "imitation"])
def test_a_stopped_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole = trained(name)
    owner = Detection if name == "detection" else Task
    original, steps = owner.train_forward, 0
    with stoppable() as request, pytest.MonkeyPatch.context() as patch:

        def counted(self, model, call, inputs, targets):
            nonlocal steps
            steps += model.training
            if steps == 4:  # In the middle of the second epoch.
                request.ask()
            return original(self, model, call, inputs, targets)

        patch.setattr(owner, "train_forward", counted)
        with pytest.raises(Stopped):
            trained(name, folder=tmp_path, checkpoints=CheckpointPolicy())
    resumed = trained(name, folder=tmp_path)
    assert same(state(whole.model), state(resumed.model))
    assert [r.validation_score for r in whole.history] == [r.validation_score for r in resumed.history]


@pytest.mark.parametrize("name", ["regression", "detection", "image to image"])
def test_parts_of_a_batch_add_up(name: str) -> None:
    """Without a norm over the batch a batch in three parts is the same step."""
    task, model, kind = KINDS[name]

    def without_norm() -> nn.Module:
        net = model()
        for module in net.modules():
            for child, inner in list(module.named_children()):
                if isinstance(inner, nn.BatchNorm2d):
                    setattr(module, child, nn.Identity())
        return net

    one, three = (
        fit_small(
            without_norm(),
            split_of(kind),
            train=small_config(1, accumulate=parts),
            objective=Objective.of_labels(),
            task=task,
        )
        for parts in (1, 3)
    )
    for name_, tensor in state(one.model).items():
        assert torch.allclose(tensor, state(three.model)[name_], atol=2e-6), name_


def test_imitation_never_ends_farther_than_it_began() -> None:
    for seed in range(5):
        found = trained("imitation", train=small_config(1, learning_rate=3.0, seed=seed, restarts=2))
        assert found.best_score <= found.history[0].validation_score


def test_imitation_needs_the_teacher_alone() -> None:
    with pytest.raises(TrainingError, match="from the teacher alone for Imitation"):
        trained("imitation", objective=BOTH)


def test_targets_of_another_task_are_refused() -> None:
    with pytest.raises(TrainingError, match="must be class indices"):
        fit_small(small_net(classes=2), split_of("several"), train=small_config(1), objective=Objective.of_labels())
    with pytest.raises(TrainingError, match=r"`labels` must be class indices \(batch, height, width\)"):
        fit_small(
            dense_net(2),
            split_of("classes"),
            train=small_config(1),
            objective=Objective.of_labels(),
            task=Segmentation(),
        )


def test_a_metric_that_is_nan_ends_the_run_with_its_name() -> None:
    @dataclass(frozen=True)
    class Odd(Regression):
        metric = Metric("oddness", "")

        def meter(self):
            return MeanMeter(self, lambda outputs, targets: outputs[:, 0] * float("nan"))

    with pytest.raises(TrainingError, match=r"oddness \(nan\)"):
        trained("regression", task=Odd())


def test_inputs_may_be_mappings() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net(classes=2)

        def forward(self, pixel_values: Tensor, scale: Tensor) -> Tensor:
            return self.net(pixel_values) * scale[:, None]

    batches = [
        {"pixel_values": torch.randn(8, 3, 8, 8), "scale": torch.ones(8), "labels": torch.arange(8) % 2}
        for _ in range(3)
    ]
    found = fit_small(
        Named(),
        own_split(batches),
        train=small_config(2, batch_size=8),
        objective=Objective.of_labels(),
        validation=own_split(batches),
    )
    assert found.history[-1].validation_score is not None
