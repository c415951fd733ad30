"""Detection of objects by models that compute their own losses, as torchvision's detectors do."""

import importlib.util
from collections.abc import Callable, Generator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur._batches import call_model
from secateur._kinds import settings
from secateur.errors import TrainingError
from secateur.tasks.base import Drawing, Meter, Metric, Score, Task, normalized_difference

HEADS = ("head", "rpn.head")
"""Modules whose outputs are compared where the task names none: the first one that the model has."""
_SHOWN_SCORE = 0.5


@dataclass(frozen=True)
class DetectorOutputs:
    """What one pass of a detector gives.

    Attributes:
        result: The model's own result: a mapping of losses in train mode with targets, otherwise one mapping with
            ``boxes``, ``labels`` and ``scores`` for every image.
        heads: What the compared modules returned.
    """

    result: Any
    heads: tuple[Any, ...]


@settings
class Detection(Task):
    """Boxes with classes and scores: the model's own losses, and mean average precision.

    A model takes a list of images and, in train mode, a list of targets, and returns a mapping of losses then;
    in eval mode it returns for every image a mapping with ``boxes`` (n, 4) as x1, y1, x2, y2, ``labels`` and
    ``scores``. A target is a mapping with ``boxes`` and ``labels``. A student is compared with a teacher by the outputs
    of its heads, before boxes are chosen: the choice has no useful gradient.

    Attributes:
        iou: Overlap from which a box counts as found; None takes the mean over 0.50, 0.55, ..., 0.95 as COCO does.
        heads: Modules whose outputs are compared, by name; empty takes the first of `HEADS` that the model has.
    """

    iou: float | None = 0.5
    heads: tuple[str, ...] = ()
    needs_targets = True

    @property
    def metric(self) -> Metric:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Mean average precision at the overlap."""
        return Metric("mAP" if self.iou is None else f"mAP@{self.iou:g}")

    def train_forward(self, model: nn.Module, call: Callable[..., Any], inputs: Any, targets: Any) -> DetectorOutputs:
        """See `Task.train_forward`: a model in train mode gets the targets too."""
        if model.training:
            self.check_targets(inputs, targets)
        with self._recorded(model) as heads:
            result = call(inputs, targets) if model.training else call_model(call, inputs)
        return DetectorOutputs(result, tuple(heads))

    def drawing(self, outputs: Any, item: int) -> Drawing:
        """See `Task.drawing`: boxes with a score of at least a half."""
        found = outputs[item]
        shown = found["scores"] >= _SHOWN_SCORE
        return Drawing(boxes=found["boxes"][shown], labels=found["labels"][shown], scores=found["scores"][shown])

    def target_drawing(self, targets: Any, item: int) -> Drawing:
        """See `Task.target_drawing`."""
        return Drawing(boxes=targets[item]["boxes"], labels=targets[item]["labels"])

    def blank_targets(self, inputs: Any) -> Any:
        """See `Task.blank_targets`: no object in any image."""
        return [
            {
                "boxes": torch.zeros(0, 4, device=image.device),
                "labels": torch.zeros(0, dtype=torch.int64, device=image.device),
            }
            for image in inputs
        ]

    def observe_(self, model: nn.Module) -> None:
        """See `Task.observe_`: the model returns the outputs of its heads, before boxes are chosen."""
        # An attribute of the instance, so that copies and cuts of the model have it too.
        model.forward = MethodType(_HeadsAlone(self.head_names(model)), model)

    def unobserve_(self, model: nn.Module) -> None:
        """See `Task.unobserve_`."""
        model.__dict__.pop("forward", None)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """See `Task.loss`: the sum of the losses that the model computed.

        Raises:
            TrainingError: If the model gave no losses.
        """
        del targets
        result = outputs.result if isinstance(outputs, DetectorOutputs) else outputs
        if not isinstance(result, Mapping) or not result:
            raise TrainingError(
                f"`model` must return a mapping of losses in train mode; got {type(result).__name__}. Detection is for "
                "models that take (images, targets), as torchvision's detectors do."
            )
        return torch.stack([loss.float() for loss in cast(Mapping[str, Tensor], result).values()]).sum()

    def imitation(self, student: Any, teacher: Any) -> Tensor:
        """See `Task.imitation`: `normalized_difference` of the outputs of the heads."""
        return normalized_difference(student.heads, teacher.heads)

    def meter(self) -> Meter:
        """See `Task.meter`."""
        return _PrecisionMeter(self)

    def check(self, outputs: Any, targets: Any, *, name: str = "model") -> None:
        """See `Task.check`."""
        result = outputs.result if isinstance(outputs, DetectorOutputs) else outputs
        listed = isinstance(result, list) and all("boxes" in each for each in cast(list[Any], result))
        if not isinstance(result, Mapping) and not listed:
            raise TrainingError(
                f"`{name}` must return a mapping with `boxes` for every image; got {type(result).__name__}."
            )
        self.check_targets([None] * len(targets), targets)

    def check_targets(self, inputs: Any, targets: Any) -> None:
        """See `Task.check_targets`: boxes with labels for every image, each at least partly inside of it."""
        super().check_targets(inputs, targets)
        if not isinstance(targets, list | tuple) or len(cast("list[Any]", targets)) != len(inputs):
            count = f"{len(cast('Sized', targets))} of them" if isinstance(targets, list | tuple) else "one object"
            raise TrainingError(
                f"`targets` of detection must be a list with a mapping for every image; got {type(targets).__name__}, "
                f"{count} for {len(inputs)} images. An image without objects has boxes of the shape (0, 4)."
            )
        for number, (image, target) in enumerate(zip(inputs, cast("list[Any]", targets), strict=True)):
            _check_target(target, number)
            _check_inside(image, target["boxes"], number)

    def head_names(self, model: nn.Module) -> tuple[str, ...]:
        """Return the names of the modules that are compared.

        Raises:
            TrainingError: If the model has none of them.
        """
        modules = dict(model.named_modules())
        found = self.heads or next(((name,) for name in HEADS if name in modules), ())
        missing = [name for name in found if name not in modules]
        if missing or not found:
            raise TrainingError(
                f"`heads` must name modules of the model; got {', '.join(missing) or 'none, and no module is named '}"
                f"{'' if missing else ' or '.join(HEADS)}. Name those that return class scores and boxes."
            )
        return found

    @contextmanager
    def _recorded(self, model: nn.Module) -> Generator[list[Any]]:
        heads: list[Any] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            heads.append(output)

        hooks = [model.get_submodule(name).register_forward_hook(keep) for name in self.head_names(model)]
        try:
            yield heads
        finally:
            for hook in hooks:
                hook.remove()


@dataclass(frozen=True)
class _HeadsAlone:
    """A forward that returns what some modules return in it."""

    names: tuple[str, ...]

    def __call__(self, model: nn.Module, *inputs: Any, **by_name: Any) -> tuple[Any, ...]:
        heads: list[Any] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            heads.append(output)

        hooks = [model.get_submodule(name).register_forward_hook(keep) for name in self.names]
        try:
            type(model).forward(model, *inputs, **by_name)
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(heads)


def _check_target(target: Any, number: int) -> None:
    if not isinstance(target, Mapping) or not {"boxes", "labels"} <= set(cast(Mapping[str, Any], target)):
        raise TrainingError(
            f"A target must be a mapping with `boxes` and `labels`; got {type(target).__name__} for image {number}."
        )
    boxes, labels = cast(Tensor, target["boxes"]), cast(Tensor, target["labels"])
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(labels) != len(boxes):
        raise TrainingError(
            f"`boxes` must have the shape (n, 4), with one label each; got {tuple(boxes.shape)} and "
            f"{tuple(labels.shape)} for image {number}. An image without objects has boxes of the shape (0, 4)."
        )
    if len(boxes) and not bool((boxes[:, 2:] > boxes[:, :2]).all()):
        raise TrainingError(f"`boxes` must be x1, y1, x2, y2 with x1 < x2 and y1 < y2; image {number} has another one.")
    if labels.is_floating_point() or (len(labels) and int(labels.min()) < 0):
        raise TrainingError(
            f"`labels` of boxes must be integers from 0 on; image {number} has {labels.dtype} {labels.tolist()[:5]}."
        )


def _check_inside(image: Any, boxes: Tensor, number: int) -> None:
    if not isinstance(image, Tensor) or image.ndim != 3 or not len(boxes):
        return
    height, width = image.shape[-2:]
    outside = (boxes[:, 0] >= width) | (boxes[:, 1] >= height) | (boxes[:, 2] <= 0) | (boxes[:, 3] <= 0)
    if bool(outside.any()):
        box = [round(side, 3) for side in boxes[outside][0].tolist()]
        raise TrainingError(
            f"`boxes` must lie in their image; image {number} of a batch, {width} x {height}, has the box {box} (x1, "
            "y1, x2, y2) outside of it. Correct it, or the units of the boxes, which are pixels."
        )


class _PrecisionMeter(Meter):
    def __init__(self, task: Detection) -> None:
        if importlib.util.find_spec("faster_coco_eval") is None:
            raise TrainingError(
                "`task` must be measured with faster-coco-eval, which is not installed. "
                "Run: pip install 'secateur[detection]'"
            )
        from torchmetrics.detection import MeanAveragePrecision

        self._task = task
        thresholds = None if task.iou is None else [task.iou]
        # Processes measure everything each, so nothing is to be gathered at the end.
        settings: dict[str, Any] = {
            "iou_thresholds": thresholds,
            "backend": "faster_coco_eval",
            "sync_on_compute": False,
        }
        self._precision: Any = MeanAveragePrecision(**settings)
        # COCO counts the hundred best boxes of an image, and so does this: no reason to warn.
        self._precision.warn_on_many_detections = False
        self._n = 0

    def update(self, outputs: Any, targets: Any) -> None:
        """See `Meter.update`."""
        result = outputs.result if isinstance(outputs, DetectorOutputs) else outputs
        found = [{name: each[name].detach().cpu() for name in ("boxes", "scores", "labels")} for each in result]
        wanted = [{name: each[name].cpu() for name in ("boxes", "labels")} for each in targets]
        self._precision.update(found, wanted)
        self._n += len(found)

    def compute(self) -> Score:
        """See `Meter.compute`; 0 if no image has an object."""
        return Score(max(float(self._precision.compute()["map"]), 0.0), None, self._n, self._task.metric)
