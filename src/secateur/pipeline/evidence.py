"""What a report shows beside its numbers: both models on the same images, flipped images, and sensitive layers."""

import base64
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur._batches import take
from secateur.architecture import Architecture
from secateur.data.dataset import ImageData
from secateur.data.loaders import OwnData, evaluation_batch
from secateur.errors import SecateurError
from secateur.graph.graph import ChannelGraph
from secateur.pipeline.config import LoggedRun
from secateur.prune.distance import OutputDistance
from secateur.prune.slice import apply_architecture
from secateur.report.run import FlippedImage, RunReport, Step
from secateur.tasks.base import Task
from secateur.tasks.classification import Classification
from secateur.tasks.imitation import Imitation
from secateur.tasks.outcomes import Answers, NotedAnswers, PairedTest, changed_confusions, class_changes
from secateur.train.evaluate import evaluate

_MOST_FLIPS = 16
_FLIP_SIDE = 96
"""Pixels of the longer side of a picture."""
_PATIENCE_S = 10.0
"""Seconds for all layers together: sensitivity is a hint, not a result that anything depends on."""
_SENSITIVITY_IMAGES = 32


def measured_step(
    run: LoggedRun,
    name: str,
    model: nn.Module,
    *,
    data: ImageData | OwnData,
    task: Task,
    trained_with: int,
    original: nn.Module | None = None,
) -> Step:
    """Measure a network on the test images and log it; answers of classifiers are kept.

    Args:
        run: Logs, and says on which device.
        name: Of the step.
        model: Not changed.
        data: Whose test images.
        task: What is measured.
        trained_with: Images in a batch of the training, where the data has no batches of its own.
        original: What `Imitation` compares the outputs with.
    """
    noted = NotedAnswers(task) if isinstance(task, Classification) else None
    found = evaluate(
        model,
        data.test,
        task=noted or task,
        original=original if isinstance(task, Imitation) else None,
        batch_size=evaluation_batch(data, trained_with),
        device=run.fabric.device,
    )
    run.log(f"Test {found.metric.words}, {name}: {found.text} of {found.n} images.")
    return Step(name, found, None if noted is None else noted.answers)


def with_pairs(report: RunReport, data: ImageData | OwnData) -> RunReport:
    """Return a report with the paired test of its first and last step, classes and flips, if both have answers."""
    if len(report.steps) < 2:
        return report
    before, after = report.steps[0].answers, report.steps[-1].answers
    if before is None or after is None or not torch.equal(before.labels, after.labels):
        return report
    return replace(
        report,
        paired=PairedTest.of(before.right, after.right),
        classes=class_changes(before, after, data.classes),
        confusions=changed_confusions(before, after, data.classes),
        flips=_flips(before, after, data) if isinstance(data, ImageData) else (),
    )


def _flips(before: Answers, after: Answers, data: ImageData) -> tuple[FlippedImage, ...]:
    """Lost images first, then gained ones, at most half of each if there are enough of both."""
    lost = (before.right & ~after.right).nonzero().flatten().tolist()
    gained = (after.right & ~before.right).nonzero().flatten().tolist()
    half = _MOST_FLIPS // 2
    lost_shown = lost[: max(half, _MOST_FLIPS - len(gained))]
    chosen = [*lost_shown, *gained[: _MOST_FLIPS - len(lost_shown)]]

    def name(label: Tensor) -> str:
        number = int(label)
        return data.classes[number] if number < len(data.classes) else str(number)

    pictures = dict(_pictures(data, set(chosen)))
    return tuple(
        FlippedImage(name(before.labels[at]), name(before.predicted[at]), name(after.predicted[at]), pictures[at])
        for at in chosen
        if at in pictures
    )


def _pictures(data: ImageData, wanted: set[int]) -> Iterator[tuple[int, str]]:
    """Yield (position, PNG in base64) of some test images, in one pass that ends with the last of them."""
    if not wanted:
        return
    start, last = 0, max(wanted)
    for images, _ in data.test.batches(64, device=torch.device("cpu"), seed=None):
        for at in sorted(wanted & set(range(start, start + len(images)))):
            yield at, _png(images[at - start], data)
        start += len(images)
        if start > last:
            return


def _png(image: Tensor, data: ImageData) -> str:
    from PIL import Image

    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (data.mean, data.std))
    pixels = ((image * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    pixels = pixels[:, :, :3] if pixels.shape[2] >= 3 else pixels[:, :, 0]
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((_FLIP_SIDE, _FLIP_SIDE))
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()


def layer_sensitivity(
    original: nn.Module, graph: ChannelGraph, architecture: Architecture, images: Any
) -> tuple[tuple[str, float, float], ...]:
    """Return (axis, kept fraction, distance of the outputs) where one axis alone is cut as it was, without repair.

    The distance is that of `secateur.prune.OutputDistance`. Axes that stay whole, cannot be cut alone, or come after
    ten seconds are left out.

    Args:
        original: In eval mode.
        graph: Its graph.
        architecture: What was kept.
        images: A few inputs on the device of the model.
    """
    few = take(images, slice(_SENSITIVITY_IMAGES))
    kept = dict(architecture.kept)
    began, found = time.monotonic(), list[tuple[str, float, float]]()
    try:
        distance = OutputDistance(original, [few])
    except (SecateurError, RuntimeError):
        return ()
    for axis in _in_order(graph, kept):
        if time.monotonic() - began > _PATIENCE_S:
            break
        channels = kept[axis]
        try:
            alone = apply_architecture(original, graph, Architecture.of({axis: channels})).eval()
            found.append((axis, len(channels) / graph.by_name[axis].size, distance.of(alone)))
        except (SecateurError, RuntimeError):
            continue
    return tuple(found)


def _in_order(graph: ChannelGraph, kept: dict[str, Sequence[int]] | dict[str, tuple[int, ...]]) -> list[str]:
    return [axis.name for axis in graph.axes if axis.name in kept and len(kept[axis.name]) < axis.size]
