"""Images with a bright square, with targets for every task, and small nets for each."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from secateur.pipeline import CutConfig, RecoveryConfig, RunConfig
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
