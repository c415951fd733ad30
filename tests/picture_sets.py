"""Folders of pictures with a bright square, in the layouts that people have, and small models for each task."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

SIDE = 16
SPLITS = {"train": 12, "val": 4, "test": 6}


def square(number: int, size: tuple[int, int] = (SIDE, SIDE)) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A picture with a bright square, and its box x1, y1, x2, y2."""
    random = np.random.default_rng(number)
    height, width = size
    x, y = int(random.integers(0, width - 6)), int(random.integers(0, height - 6))
    pixels = random.integers(0, 90, (height, width, 3)).astype(np.uint8)
    pixels[y : y + 6, x : x + 6] = 230
    return pixels, (x, y, x + 6, y + 6)


def pictures(size: tuple[int, int] = (SIDE, SIDE)) -> list[tuple[str, str, np.ndarray, tuple[int, int, int, int]]]:
    """Split, name, pixels and box of every picture."""
    found: list[tuple[str, str, np.ndarray, tuple[int, int, int, int]]] = []
    for split, count in SPLITS.items():
        for place in range(count):
            found.append((split, f"{split}{place:02d}", *square(len(found), size)))
    return found


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_coco(folder: Path) -> Path:
    for split in SPLITS:
        images, notes = [], []
        for place, (_, name, pixels, (x, y, right, down)) in enumerate(p for p in pictures() if p[0] == split):
            _save(folder / "images" / f"{name}.png", pixels)
            images.append({"id": place, "file_name": f"{name}.png"})
            notes.append({"image_id": place, "category_id": 1, "bbox": [x, y, right - x, down - y]})
        (folder / "annotations").mkdir(exist_ok=True)
        data = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "square"}]}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(data))
    return folder


def write_yolo(folder: Path) -> Path:
    for split, name, pixels, (x, y, right, down) in pictures():
        _save(folder / split / "images" / f"{name}.png", pixels)
        (folder / split / "labels").mkdir(exist_ok=True)
        box = f"0 {(x + right) / 2 / SIDE} {(y + down) / 2 / SIDE} {(right - x) / SIDE} {(down - y) / SIDE}\n"
        (folder / split / "labels" / f"{name}.txt").write_text(box)
    return folder


def write_voc(folder: Path) -> Path:
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "Annotations").mkdir()
    for split, name, pixels, sides in pictures():
        _save(folder / "JPEGImages" / f"{name}.png", pixels)
        tags = "".join(f"<{tag}>{v}</{tag}>" for tag, v in zip(("xmin", "ymin", "xmax", "ymax"), sides, strict=True))
        item = f"<object><name>square</name><bndbox>{tags}</bndbox></object>"
        text = f"<annotation><filename>{name}.png</filename>{item}</annotation>"
        (folder / "Annotations" / f"{name}.xml").write_text(text)
        with (folder / "ImageSets" / "Main" / f"{split}.txt").open("a") as file:
            file.write(f"{name}\n")
    return folder


def write_masks(folder: Path, size: tuple[int, int] = (SIDE, SIDE), void: int | None = None) -> Path:
    for split, name, pixels, (x, y, right, down) in pictures(size):
        _save(folder / split / "images" / f"{name}.png", pixels)
        mask = np.zeros(pixels.shape[:2], dtype=np.uint8)
        mask[y:down, x:right] = 1
        if void is not None:
            mask[0] = void
        _save(folder / split / "labels" / f"{name}.png", mask)
    return folder


def write_pairs(folder: Path) -> Path:
    for split, name, pixels, _ in pictures():
        noise = np.random.default_rng(1).integers(0, 25, pixels.shape).astype(np.uint8)
        _save(folder / split / "images" / f"{name}.png", pixels + noise)
        _save(folder / split / "targets" / f"{name}.png", pixels)
    return folder


def write_table(folder: Path, *, several_classes: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        with (folder / f"{split}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "left", "top"])
            for _, name, pixels, (x, y, *_) in (p for p in pictures() if p[0] == split):
                _save(folder / "images" / f"{name}.png", pixels)
                rows.writerow([f"{name}.png", *([x > 4, y > 4] if several_classes else [x / 10, y / 10])])
    text = {True: "1", False: "0"}
    for path in folder.glob("*.csv"):
        path.write_text(path.read_text().replace("True", text[True]).replace("False", text[False]))
    return folder


def write_unlabeled(folder: Path) -> Path:
    for _, name, pixels, _ in pictures():
        _save(folder / "some" / f"{name}.png", pixels)
    return folder


def _seeded(*layers: Any) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(layer() for layer in layers))


def _body(width: int, channels: int = 3) -> tuple[Any, ...]:
    return (
        lambda: nn.Conv2d(channels, width, 3, padding=1),
        lambda: nn.BatchNorm2d(width),
        nn.ReLU,
        lambda: nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU,
    )


def segmenter() -> nn.Module:
    """Two classes per pixel."""
    return _seeded(*_body(8), lambda: nn.Conv2d(8, 2, 1))


def restorer() -> nn.Module:
    """Three channels from three."""
    return _seeded(*_body(8), lambda: nn.Conv2d(8, 3, 1))


def transparent_numbers() -> nn.Module:
    """Two numbers from images of four channels."""
    return _seeded(*_body(8, 4), lambda: nn.AdaptiveAvgPool2d(2), nn.Flatten, lambda: nn.Linear(32, 2))


def classifier() -> nn.Module:
    """Two classes; which one depends on where things are."""
    return _seeded(*_body(8), lambda: nn.AdaptiveAvgPool2d(4), nn.Flatten, lambda: nn.Linear(128, 2))


def numbers() -> nn.Module:
    """Two numbers per picture, for regression, several classes and imitation."""
    return _seeded(*_body(8), lambda: nn.AdaptiveAvgPool2d(2), nn.Flatten, lambda: nn.Linear(32, 2))


class SmallDetector(nn.Module):
    """One box per picture, by the interface of torchvision's detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _seeded(*_body(8), lambda: nn.AdaptiveAvgPool2d(4), nn.Flatten)
        self.head = _seeded(lambda: nn.Linear(128, 2))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses in train mode, boxes in eval mode."""
        corners = 10 * self.head(self.body(torch.stack(list(images)))).sigmoid()
        boxes = torch.cat([corners, corners + 6], 1)
        if self.training:
            assert targets is not None
            wanted = [target["boxes"][0] if len(target["boxes"]) else torch.zeros(4) for target in targets]
            return {"box": nn.functional.l1_loss(boxes, torch.stack(wanted)) / 16}
        one = {"labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
        return [{"boxes": box[None], **one} for box in boxes]
