"""Tasks whose targets have the size of an image, or are real numbers: segmentation, image to image, regression."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur._kinds import settings
from secateur.errors import TrainingError
from secateur.tasks.base import Drawing, MeanMeter, Meter, Metric, Score, Task, main_output


@settings
class Segmentation(Task):
    """One class per pixel: cross-entropy, and the mean intersection over union of the classes (mIoU).

    Outputs are logits (batch, classes, height, width), or a mapping or tuple whose first tensor is that. Logits of
    another size than the targets are resized bilinearly. Targets are class indices (batch, height, width).

    Attributes:
        void: Index of pixels that do not count; None counts all.
        temperature: Logits of student and teacher are divided by it where they are compared.
    """

    void: int | None = None
    temperature: float = 1.0
    metric = Metric("mIoU")
    needs_targets = True

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """See `Task.loss`: the mean cross-entropy over the pixels that count, in nats; 0 if there are none."""
        logits = self._logits(outputs, targets)
        void = -100 if self.void is None else self.void  # -100 is no class: nothing is left out.
        total = F.cross_entropy(logits, targets.long(), ignore_index=void, reduction="sum")
        return total / (targets != void).sum().clamp_min(1)

    def imitation(self, student: Any, teacher: Any) -> Tensor:
        """See `Task.imitation`: T^2 * the mean over pixels of KL(teacher || student), in nats."""
        ours, theirs = main_output(student, "student").float(), main_output(teacher, "teacher").detach().float()
        if ours.shape != theirs.shape:
            raise TrainingError(
                f"`student` and `teacher` must return logits of the same shape; got {tuple(ours.shape)} and "
                f"{tuple(theirs.shape)}."
            )
        log_student = F.log_softmax(ours / self.temperature, dim=1)
        log_teacher = F.log_softmax(theirs / self.temperature, dim=1)
        pixelwise = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)
        return pixelwise.mean() * self.temperature**2

    def meter(self) -> Meter:
        """See `Task.meter`."""
        return _OverlapMeter(self)

    def check(self, outputs: Any, targets: Any, *, name: str = "model") -> None:
        """See `Task.check`."""
        logits = main_output(outputs, name)
        if logits.ndim != 4 or targets.ndim != 3 or len(logits) != len(targets) or targets.is_floating_point():
            raise TrainingError(
                f"`{name}` must return logits (batch, classes, height, width), and `labels` must be class indices "
                f"(batch, height, width); got {tuple(logits.shape)} and {targets.dtype} {tuple(targets.shape)}."
            )
        self.check_classes(targets, logits.shape[1])

    def check_classes(self, targets: Tensor, classes: int) -> None:
        """Refuse masks with values that are no classes of the model; waits for the device.

        Raises:
            TrainingError: If one is negative or too high.
        """
        counted = targets if self.void is None else targets[targets != self.void]
        if not counted.numel():
            return
        low, high = (int(bound) for bound in torch.stack(torch.aminmax(counted)).tolist())
        if low < 0 or high >= classes:
            raise TrainingError(
                f"`labels` must lie in 0...{classes - 1}, the model's classes; got {low}...{high}. If one value marks "
                "pixels that do not count, name it as `void`."
            )

    def drawing(self, outputs: Any, item: int) -> Drawing:
        """See `Task.drawing`: the likeliest class of every pixel."""
        return Drawing(mask=main_output(outputs)[item].argmax(0))

    def target_drawing(self, targets: Any, item: int) -> Drawing:
        """See `Task.target_drawing`."""
        return Drawing(mask=targets[item], void=self.void)

    @staticmethod
    def _logits(outputs: Any, targets: Tensor) -> Tensor:
        logits = main_output(outputs).float()
        if logits.shape[-2:] == targets.shape[-2:]:
            return logits
        return F.interpolate(logits, size=targets.shape[-2:], mode="bilinear", align_corners=False)

    def classes_of(self, outputs: Any, targets: Tensor) -> tuple[Tensor, int]:
        """Return the predicted class of every pixel, in the size of the targets, and the number of classes."""
        logits = self._logits(outputs, targets)
        return logits.argmax(1), logits.shape[1]


class _OverlapMeter(Meter):
    def __init__(self, task: Segmentation) -> None:
        self._task = task
        self._counts: Any = None
        self._loss = 0.0
        self._n = 0

    def update(self, outputs: Any, targets: Any) -> None:
        """See `Meter.update`."""
        from torchmetrics.classification import MulticlassJaccardIndex

        predicted, classes = self._task.classes_of(outputs, targets)
        self._task.check_classes(targets, classes)  # Everything here waits for the device anyway.
        if self._counts is None:
            # Processes measure everything each, so nothing is to be gathered at the end.
            settings: dict[str, Any] = {"ignore_index": self._task.void, "average": "macro", "sync_on_compute": False}
            self._counts = MulticlassJaccardIndex(classes, **settings).to(predicted.device)
        self._counts.update(predicted, targets)
        self._loss += float(self._task.loss(outputs, targets)) * len(targets)
        self._n += len(targets)

    def compute(self) -> Score:
        """See `Meter.compute`."""
        return Score(float(self._counts.compute()), self._loss / self._n, self._n, self._task.metric)


@settings
class Regression(Task):
    """Real numbers, such as landmarks: the squared error and its root, or the absolute error.

    Attributes:
        absolute: Train on and report the mean absolute error instead of the squared one.
    """

    absolute: bool = False
    needs_targets = True

    @property
    def metric(self) -> Metric:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The mean absolute error, or the root of the mean squared error."""
        return Metric("mean absolute error" if self.absolute else "root mean squared error", "", higher_is_better=False)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """See `Task.loss`: the mean error, in the targets' unit or its square."""
        found, wanted = _same_shape(outputs, targets)
        return F.l1_loss(found, wanted) if self.absolute else F.mse_loss(found, wanted)

    def meter(self) -> Meter:
        """See `Task.meter`."""
        return MeanMeter(self, self._errors, None if self.absolute else math.sqrt)

    def check(self, outputs: Any, targets: Any, *, name: str = "model") -> None:
        """See `Task.check`."""
        _same_shape(outputs, targets, name)

    def check_targets(self, inputs: Any, targets: Any) -> None:
        """See `Task.check_targets`: the numbers must be finite."""
        super().check_targets(inputs, targets)
        if isinstance(targets, Tensor) and not bool(torch.isfinite(targets).all()):
            raise TrainingError(
                "`targets` of Regression must be finite numbers; got NaN or infinity. Leave out the items without any."
            )

    def _errors(self, outputs: Any, targets: Any) -> Tensor:
        found, wanted = _same_shape(outputs, targets)
        error = (found - wanted).flatten(1) if found.ndim > 1 else (found - wanted)[:, None]
        return (error.abs() if self.absolute else error.square()).mean(1)


@settings
class ImageToImage(Task):
    """An image from an image, such as denoising or super-resolution: an error per pixel, and PSNR or SSIM.

    Attributes:
        absolute: Train on the mean absolute error instead of the squared one.
        data_range: The highest minus the lowest value that a pixel can have.
        structural: Report the structural similarity (SSIM) instead of the peak signal-to-noise ratio (PSNR).
    """

    absolute: bool = False
    data_range: float = 1.0
    structural: bool = False
    needs_targets = True

    @property
    def metric(self) -> Metric:  # pyright: ignore[reportIncompatibleVariableOverride]
        """SSIM, or PSNR in dB."""
        return Metric("SSIM", "") if self.structural else Metric("PSNR", "dB")

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """See `Task.loss`: the mean error per pixel."""
        found, wanted = _same_shape(outputs, targets)
        return F.l1_loss(found, wanted) if self.absolute else F.mse_loss(found, wanted)

    def meter(self) -> Meter:
        """See `Task.meter`: the mean over the images of each one's PSNR or SSIM."""
        return MeanMeter(self, self._quality)

    def check(self, outputs: Any, targets: Any, *, name: str = "model") -> None:
        """See `Task.check`."""
        found, _ = _same_shape(outputs, targets, name)
        if found.ndim != 4:
            raise TrainingError(
                f"`{name}` must return images (batch, channels, height, width); got {tuple(found.shape)}."
            )

    def drawing(self, outputs: Any, item: int) -> Drawing:
        """See `Task.drawing`."""
        return Drawing(image=main_output(outputs)[item] / self.data_range)

    def target_drawing(self, targets: Any, item: int) -> Drawing:
        """See `Task.target_drawing`."""
        return Drawing(image=targets[item] / self.data_range)

    def _quality(self, outputs: Any, targets: Any) -> Tensor:
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

        found, wanted = _same_shape(outputs, targets)
        if self.structural:
            settings: dict[str, Any] = {"data_range": self.data_range, "reduction": "none"}
            return torch.atleast_1d(structural_similarity_index_measure(found, wanted, **settings))
        settings = {"data_range": self.data_range, "reduction": "none", "dim": (1, 2, 3)}
        return peak_signal_noise_ratio(found, wanted, **settings)


def _same_shape(outputs: Any, targets: Tensor, name: str = "model") -> tuple[Tensor, Tensor]:
    """Return outputs and targets in float32; a target (batch,) fits an output (batch, 1)."""
    found = main_output(outputs, name).float()
    wanted = targets.float()
    if wanted.ndim == 1 and found.shape == (len(wanted), 1):
        wanted = wanted[:, None]
    if found.shape != wanted.shape:
        raise TrainingError(
            f"`{name}` must return what the targets are, of the shape {tuple(wanted.shape)}; got {tuple(found.shape)}. "
            "Wrap the model, or change the targets."
        )
    return found, wanted
