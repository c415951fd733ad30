"""Four tasks at half of the MACs: detection, segmentation, denoising and landmarks.

For each task and seed there are four rows: the base, trained here; the base cut and recovered with labels, and without
labels by `Imitation`; and Torch-Pruning's L1 pruning to the same MACs with the same recovery. Rows are recorded one by
one and are not run again.

    OMP_NUM_THREADS=1 python benchmarks/tasks.py [--task NAME] [--seeds N] [--work FOLDER] [--smoke]
"""

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _record import RESULTS, SHARED, surroundings, table, write_record
from torch import Tensor, nn
from torch.utils.data import Dataset

from secateur import compress
from secateur.cost import OnnxRuntime, count_macs, measure_pairs
from secateur.data import own_data
from secateur.data.annotated import as_lists, read_coco, read_masks, read_unlabeled
from secateur.data.loaders import ItemSplit, OwnData
from secateur.data.preprocessing import Preprocessing, ResizeMode
from secateur.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from secateur.distill import Objective
from secateur.pipeline import CutConfig, RecoveryConfig, RunConfig
from secateur.tasks import Detection, ImageToImage, Imitation, Regression, Segmentation, Task
from secateur.train import AdamW, Precision, Silent, TrainConfig, evaluate, fit, train_with_teacher

BUDGET = "macs=50%"
METHODS = ("base", "labels", "imitation", "torch-pruning")
BCCD, CAMVID = SHARED / "data" / "bccd", SHARED / "data" / "camvid"


@dataclass(frozen=True)
class Problem:
    """A task with its data and model.

    Attributes:
        task: What is trained and measured.
        like: Which task imitation compares outputs as; None compares tensors.
        build: Returns the model with random weights.
        data: Returns the splits; the argument is the number of images of each, or None for all.
        epochs: Of the base; the recovery has a third of them.
        batch_size: Of both.
        learning_rate: Of the base; that of the recovery is a quarter.
        plain: Returns the part of a model that maps one tensor to tensors, for times and Torch-Pruning.
        size: Of one input of that part.
    """

    task: Task
    like: Task | None
    build: Callable[[], nn.Module]
    data: Callable[[int | None], OwnData]
    epochs: int
    batch_size: int
    learning_rate: float
    plain: Callable[[nn.Module], nn.Module]
    size: tuple[int, int, int]


class Heads(nn.Module):
    """The learned part of a detector, before anchors and suppression."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map (n, 3, h, w) to boxes and scores of all anchors."""
        return list(self.head(list(self.backbone(images).values())).values())


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Crops of photographs with noise of a standard deviation of 25 / 255, the same one every time for a test image."""

    def __init__(self, images: Any, side: int = 96) -> None:
        self.images, self.side = images, side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        height, width = image.shape[-2:]
        top, left = (int(torch.randint(0, most - self.side + 1, ())) for most in (height, width))
        clean = image[:, top : top + self.side, left : left + self.side]
        return clean + 25 / 255 * torch.randn_like(clean), clean


class Denoiser(nn.Module):
    """Eight 3 x 3 convolutions that estimate the noise (DnCNN, Zhang et al., arXiv:1608.03981, with fewer layers)."""

    def __init__(self, width: int = 48, depth: int = 8) -> None:
        super().__init__()
        inner = [
            layer
            for _ in range(depth - 2)
            for layer in (nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        ]
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), *inner, nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map noisy images to clean ones."""
        return images - self.net(images)


class Triangles(Dataset[tuple[Tensor, Tensor]]):
    """Triangles on noise; the targets are the corners, in fractions of the side, from the highest on."""

    def __init__(self, count: int, first: int, side: int = 64) -> None:
        self.count, self.first, self.side = count, first, side

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.first + index)
        corners = 0.1 + 0.8 * torch.rand(3, 2, generator=generator)
        corners = corners[corners[:, 1].argsort()]
        grid = (torch.arange(self.side) + 0.5) / self.side
        y, x = torch.meshgrid(grid, grid, indexing="ij")
        signs = [
            (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]) > 0
            for a, b in ((corners[i], corners[(i + 1) % 3]) for i in range(3))
        ]
        inside = (signs[0] == signs[1]) & (signs[1] == signs[2])
        image = inside.float() + 0.3 * torch.randn(3, self.side, self.side, generator=generator)
        return image, corners.flatten()


def _landmarks_net() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=6)


def _ssdlite() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4)


class Scenes(nn.Module):
    """LR-ASPP that returns its logits alone."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models.segmentation import lraspp_mobilenet_v3_large

        self.net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=11)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to the logits of all pixels."""
        return self.net(images)["out"]


def _cut_short(splits: dict[str, Any], count: int | None, **settings: Any) -> OwnData:
    parts = [ItemSplit(splits[name], **settings) for name in ("train", "val", "test")]
    if count is not None:
        parts = [part.subset(range(min(count, len(part)))) for part in parts]
    return own_data(tuple(parts))


def _bccd(count: int | None) -> OwnData:
    from torchvision.transforms import v2

    splits: dict[str, Any] = dict(read_coco(BCCD, Preprocessing((320, 320), ResizeMode.SQUASH)))
    splits["train"] = splits["train"].varied_by(v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]))
    return _cut_short(splits, count, batch_size=8, collate=as_lists)


def _camvid(count: int | None) -> OwnData:
    from torchvision.transforms import v2

    rule = Preprocessing((240, 320), ResizeMode.SQUASH, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    splits: dict[str, Any] = dict(read_masks(CAMVID, rule))
    splits["train"] = splits["train"].varied_by(v2.RandomHorizontalFlip())
    return _cut_short(splits, count, batch_size=8)


def _noisy(count: int | None) -> OwnData:
    splits = {
        name: Noisy(read_unlabeled(CAMVID / name / "images", Preprocessing())["train"])
        for name in ("train", "val", "test")
    }
    return _cut_short(dict(splits), count, batch_size=8)


def _triangles(count: int | None) -> OwnData:
    sizes = {"train": (4000, 0), "val": (500, 10_000), "test": (1000, 20_000)}
    return _cut_short({name: Triangles(*size) for name, size in sizes.items()}, count, batch_size=32)


def _itself(model: nn.Module) -> nn.Module:
    return model


PROBLEMS = {
    "detection": Problem(Detection(), Detection(), _ssdlite, _bccd, 120, 8, 1e-3, Heads, (3, 320, 320)),
    "segmentation": Problem(
        Segmentation(void=11), Segmentation(void=11), Scenes, _camvid, 90, 8, 2e-3, _itself, (3, 240, 320)
    ),
    "denoising": Problem(ImageToImage(), None, Denoiser, _noisy, 12, 8, 1e-3, _itself, (3, 96, 96)),
    "landmarks": Problem(Regression(), None, _landmarks_net, _triangles, 12, 32, 1e-3, _itself, (3, 64, 64)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=PROBLEMS, action="append", help="Repeatable; all by default.")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("/tmp/secateur-tasks"), help="Folder of the trained bases.")
    parser.add_argument("--smoke", action="store_true", help="Few images and one epoch, to see that everything runs.")
    given = parser.parse_args()
    torch.set_num_threads(1)
    name = "tasks_smoke" if given.smoke else "tasks"
    for task in given.task or PROBLEMS:
        for seed in range(given.seeds if not given.smoke else 1):
            for method in METHODS:
                rows = known_rows(name)
                if not any((row["task"], row["seed"], row["method"]) == (task, seed, method) for row in rows):
                    rows.append({"task": task, "seed": seed, "method": method} | row_of(task, seed, method, given))
                    write_record(name, {**surroundings(), "rows": rows})
                    print(rows[-1], flush=True)
    (RESULTS / f"{name}.md").write_text(as_text(known_rows(name)))


def known_rows(name: str) -> list[dict[str, Any]]:
    """Those of the record: a run that was interrupted goes on."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def row_of(name: str, seed: int, method: str, given: Any) -> dict[str, Any]:
    """Run one row, and measure it on the test split."""
    problem, began = PROBLEMS[name], time.perf_counter()
    data = problem.data(8 if given.smoke else None)
    path = given.work / f"{name}-{seed}{'-smoke' if given.smoke else ''}.pt"
    base = base_of(problem, data, seed, path, smoke=given.smoke)
    train = training(problem, seed, smoke=given.smoke, recovery=True)
    if method == "base":
        small = base
    elif method == "torch-pruning":
        small = recovered(pruned(problem, base), base, problem, data, train)
    else:
        small = ours(problem, base, data, train, labeled=method == "labels")
    score = evaluate(small, data.test, task=problem.task, batch_size=problem.batch_size)
    example = torch.rand(1, *problem.size)
    plain = [problem.plain(copy.deepcopy(model)).eval() for model in (base, small)]
    record = measure_pairs(plain[0], plain[1], OnnxRuntime(), example, rounds=5 if given.smoke else 50)
    macs = [count_macs(model, example) for model in plain]
    return {
        "metric": score.metric.name,
        "score": score.value,
        "n": score.n,
        "macs_percent": 100 * macs[1] / macs[0],
        "speedup": record.speedup.median,
        "seconds": time.perf_counter() - began,
        "training_images": len(data.train),
        "epochs": training(problem, seed, smoke=given.smoke, recovery=method != "base").epochs,
    }


def training(problem: Problem, seed: int, *, smoke: bool, recovery: bool) -> TrainConfig:
    """The settings of the base, or of a recovery of a third of its length."""
    epochs = 1 if smoke else problem.epochs // (3 if recovery else 1)
    rate = problem.learning_rate / (4 if recovery else 1)
    return TrainConfig(
        epochs, problem.batch_size, rate, optimizer=AdamW(), precision=Precision.FLOAT32, seed=seed, clip_norm=5.0
    )


def base_of(problem: Problem, data: OwnData, seed: int, path: Path, *, smoke: bool) -> nn.Module:
    """The trained base: from its file, or trained now."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = problem.build()
    if path.is_file():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    found = fit(
        model,
        data.train,
        validation=data.validation,
        objective=Objective(kd_weight=0.0, label_weight=1.0, feature_weight=0.0),
        train=training(problem, seed, smoke=smoke, recovery=False),
        task=problem.task,
    ).model
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found.state_dict(), path)
    return found.eval()


def ours(problem: Problem, base: nn.Module, data: OwnData, train: TrainConfig, *, labeled: bool) -> nn.Module:
    """Cut by default, repaired and recovered."""
    task = problem.task if labeled else Imitation(problem.like)
    given = data if labeled else without_labels(problem, data)
    return compress(
        base,
        given,
        BUDGET,
        task=task,
        cut=CutConfig(calibration_images=min(128, len(data.train))),
        recovery=RecoveryConfig(train),
        run=RunConfig(seed=train.seed, callbacks=Silent()),
    ).model


class Unlabeled(Dataset[Any]):
    """The inputs of a dataset of pairs."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index][0]


def _alone(batch: Any) -> tuple[Any, None]:
    return batch, None


def without_labels(problem: Problem, data: OwnData) -> OwnData:
    """The same splits without targets."""
    lists = isinstance(problem.task, Detection)
    parts = [
        ItemSplit(Unlabeled(part.items), problem.batch_size, list if lists else None, split=_alone)
        for part in (data.train, data.validation, data.test)
        if isinstance(part, ItemSplit)
    ]
    return own_data(tuple(parts))


def recovered(small: nn.Module, base: nn.Module, problem: Problem, data: OwnData, train: TrainConfig) -> nn.Module:
    """The recovery of ours, without aligned features, which need a cut of ours."""
    objective = replace(RecoveryConfig().objective, feature_weight=0.0)
    return train_with_teacher(small, teacher=base, data=data, train=train, objective=objective, task=problem.task).model


def pruned(problem: Problem, base: nn.Module) -> nn.Module:
    """Torch-Pruning's L1 with one ratio for all layers, the smallest that meets the budget (by halving)."""
    import torch_pruning as tp  # type: ignore[import-not-found]

    example = torch.rand(1, *problem.size)
    whole = count_macs(problem.plain(copy.deepcopy(base)).eval(), example)
    low, high, best = 0.0, 0.9, None
    for _ in range(8):
        ratio = (low + high) / 2
        small = copy.deepcopy(base).eval()
        for parameter in small.parameters():
            parameter.requires_grad_(True)
        part = problem.plain(small)
        last = [m for m in part.modules() if isinstance(m, nn.Conv2d | nn.Linear) and _is_last(m, part, example)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tp.pruner.BasePruner(
                part,
                example,
                importance=tp.importance.MagnitudeImportance(p=1),
                pruning_ratio=ratio,
                ignored_layers=last,
            ).step()
        if count_macs(part.eval(), example) <= 0.5 * whole:
            high, best = ratio, small
        else:
            low = ratio
    if best is None:
        raise RuntimeError("Torch-Pruning does not reach half of the MACs.")
    return best


def _is_last(layer: nn.Module, model: nn.Module, example: Tensor) -> bool:
    """Whether the channels of a layer must stay, because they reach the outputs of the model."""
    from secateur.graph import trace

    name = next(name for name, module in model.named_modules() if module is layer)
    graph = trace(model, example)
    axes = [
        axis for axis in graph.axes if any(site.tensor == f"{name}.weight" and site.dim == 0 for site in axis.sites)
    ]
    return any(axis.frozen_because for axis in axes)


def as_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    header = ["task", "seed", "method", "metric", "score", "MACs", "ONNX Runtime", "epochs", "seconds"]
    cells = [
        [
            *(row["task"], str(row["seed"]), row["method"], row["metric"], f"{row['score']:.4f}"),
            *(f"{row['macs_percent']:.1f} %", f"{row['speedup']:.2f} x", str(row["epochs"]), f"{row['seconds']:.0f}"),
        ]
        for row in rows
    ]
    return table(header, cells)


if __name__ == "__main__":
    main()
