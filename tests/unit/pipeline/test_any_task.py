"""`compress` takes any task and the data that people have, and its report and artifact speak of their metric."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend import Pretend
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import secateur
from secateur.data.annotated import as_lists
from secateur.errors import SecateurError
from secateur.pipeline import CutConfig, RecoveryConfig, RunConfig
from secateur.search import Knapsack
from secateur.tasks import Detection, ImageToImage, Imitation, MultiLabel, Regression, Segmentation, Task
from secateur.train import AdamW, Precision, Silent, TrainConfig

RUN: dict[str, Any] = {
    "cut": CutConfig(calibration_images=32),
    "recovery": RecoveryConfig(
        TrainConfig(1, batch_size=16, learning_rate=1e-3, optimizer=AdamW(), precision=Precision.FLOAT32)
    ),
    "run": RunConfig(callbacks=Silent()),
}


class Squares(Dataset):
    """Noise with a bright square, and a target of one kind for it."""

    def __init__(self, kind: str, n: int = 64) -> None:
        self.kind, self.n = kind, n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        x, y = torch.randint(0, 10, (2,), generator=generator).tolist()
        clean = torch.zeros(3, 16, 16)
        clean[:, y : y + 6, x : x + 6] = 1
        image = clean + 0.1 * torch.randn(3, 16, 16, generator=generator)
        box = {"boxes": torch.tensor([[x, y, x + 6.0, y + 6.0]]), "labels": torch.tensor([1])}
        targets: dict[str, Any] = {
            "masks": clean[0].long(),
            "several": torch.tensor([x > 4, y > 4]).float(),
            "numbers": torch.tensor([x / 10, y / 10]),
            "images": clean,
            "boxes": box,
            "classes": int(x > 4),
        }
        return image if self.kind == "nothing" else (image, targets[self.kind])


def body(width: int = 16) -> list[nn.Module]:
    return [
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]


def seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def dense_net(outputs: int) -> nn.Module:
    return seeded(lambda: nn.Sequential(*body(), nn.Conv2d(16, outputs, 1)))


def pooled_net(outputs: int) -> nn.Module:
    return seeded(lambda: nn.Sequential(*body(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, outputs)))


class NamedOutputs(nn.Module):
    """As torchvision's segmentation models return them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = dense_net(2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.net(x)}


class SquareDetector(nn.Module):
    """One box per image, by the interface of torchvision's detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(*seeded(body), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.head = seeded(lambda: nn.Linear(256, 2))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        corners = 10 * self.head(self.body(torch.stack(images))).sigmoid()
        boxes = torch.cat([corners, corners + 6], 1)
        if self.training:
            assert targets is not None
            wanted = torch.stack([target["boxes"][0] for target in targets])
            return {"box": nn.functional.l1_loss(boxes, wanted) / 16}
        one = {"labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
        return [{"boxes": box[None], **one} for box in boxes]


KINDS: dict[str, tuple[Task, Any, str, str]] = {
    "segmentation": (Segmentation(), NamedOutputs, "masks", "mIoU"),
    "several labels": (MultiLabel(), lambda: pooled_net(2), "several", "mean average precision"),
    "regression": (Regression(), lambda: pooled_net(2), "numbers", "root mean squared error"),
    "one number": (Regression(absolute=True), lambda: pooled_net(2), "numbers", "mean absolute error"),
    "image to image": (ImageToImage(), lambda: dense_net(3), "images", "PSNR"),
    "imitation": (Imitation(), lambda: dense_net(3), "nothing", "distance from the original's outputs"),
    "detection": (Detection(), SquareDetector, "boxes", "mAP@0.5"),
}


def data_of(kind: str) -> Any:
    if kind == "boxes":
        return tuple(DataLoader(Squares(kind, n), batch_size=16, collate_fn=as_lists) for n in (64, 24, 24))
    return Squares(kind), Squares(kind, 24)


@pytest.mark.parametrize("name", KINDS)
def test_every_task_goes_the_whole_way(name: str, tmp_path: Path) -> None:
    task, make, kind, metric = KINDS[name]
    model = make()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    # The default exports and times a dozen candidates, which two tasks are enough for.
    one = {} if name in {"segmentation", "detection"} else {"strategy": Knapsack(), "target": Pretend()}
    settings = {"task": task, "out": tmp_path / "out", "export": (), **one, **RUN}
    found = secateur.compress(model, data_of(kind), "macs=60%", **settings)
    assert all(check.passed for check in found.report.checks), [c for c in found.report.checks if not c.passed]
    assert found.search.cost.macs <= 0.6 * found.search.original.macs
    assert found.report.metric.name == metric
    assert [step.score.n for step in found.report.steps] == [24] * len(found.report.steps)
    # Nothing of the way in which detectors are searched is left on the models.
    assert "forward" not in vars(found.model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    scores = json.loads((tmp_path / "out" / "secateur.json").read_text())["metrics"]["test_scores"]
    assert scores["metric"]["name"] == metric
    assert scores["steps"][0]["value"] == found.report.steps[0].score.value
    page = (tmp_path / "out" / "report.html").read_text()
    assert metric.replace("'", "&#39;") in page
    assert "top-1" not in page
    loaded = secateur.load(tmp_path / "out", factory=make).model
    again = secateur.evaluate(loaded, secateur.data.own_data(data_of(kind)).test, task=task, original=model)
    assert again.value == pytest.approx(found.report.steps[-1].score.value, rel=1e-4)


def test_imitation_ends_no_farther_than_the_repairs_left_it() -> None:
    found = secateur.compress(
        dense_net(3), Squares("nothing"), "macs=40%", task=Imitation(), strategy=Knapsack(), **RUN
    )
    steps = [step.score.value for step in found.report.steps]
    assert found.trained is not None
    assert found.trained.best_score <= found.trained.history[0].validation_score
    assert steps[0] == 0


def test_a_loader_of_ones_own_classifies_and_keeps_its_batch_size() -> None:
    loader = DataLoader(Squares("classes"), batch_size=8, shuffle=True)
    data = (loader, Squares("classes", 24))
    found = secateur.compress(pooled_net(2), data, "macs=60%", strategy=Knapsack(), target=Pretend(), **RUN)
    assert found.report.metric.is_share
    assert found.trained is not None
    assert any("No test split was given" in note for note in found.report.notes)


@pytest.mark.parametrize(
    ("data", "task", "match"),
    [
        (iter([]), Regression(), "an iterator, which can be read only once|an iterator"),
        (Squares("numbers"), Segmentation(), "logits"),
        (Squares("masks"), Regression(), "must return what the targets are"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_searched(data: Any, task: Task, match: str) -> None:
    with pytest.raises(SecateurError, match=match):
        secateur.compress(pooled_net(2), data, "macs=60%", task=task, **RUN)
