"""Export to int8: an ONNX model with 8-bit weights and activations, by ONNX Runtime's static quantization.

Eight bits do not follow a float model closely, so the file is judged by its answers on labeled images.
"""

import contextlib
import io
import logging
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from secateur._files import atomic_file, check_temporary_room, temporary_folder
from secateur._kinds import checked
from secateur._runtime import Batch
from secateur.data.dataset import draw_calibration
from secateur.errors import ArtifactError, ExportError
from secateur.export._common import Runner, Samples, cannot_run, checked_path, eval_copy, first_line, write_errors
from secateur.export._runtime_child import without_telemetry
from secateur.export.isolation import IsolatedRuntimes, isolated_runtimes
from secateur.export.onnx import feed, onnx_bytes, open_session, session_runner

MIN_KEPT_ACCURACY = 0.95
"""Smallest accuracy of an int8 file, as a fraction of the float model's: below, quantization has failed."""
USUAL_KEPT_ACCURACY = 0.99
"""What a quantized classifier must keep in MLPerf Inference (Reddi et al., ISCA 2020, Table I)."""

RANGE_IMAGES = 512
"""Training images that tell the range of every activation. More widen ranges by ever rarer values."""
INT8_BATCH_SIZE = 128
"""Images per pass."""
_TIMES_THE_FILE, _ROOM = 4, 2**18
"""Room among the temporary files: ONNX Runtime writes three copies of the model there, one with more outputs."""
_SECONDS_PER_BATCH = 5.0
"""How long the float model may take for one pass; the int8 file from a stranger may take a multiple."""


@dataclass(frozen=True)
class Quantized:
    """Accuracy of an int8 classifier and of the float one on the same images.

    Attributes:
        top1: Fraction of images that the int8 file classifies right.
        float_top1: The fraction that the float model classifies right.
        agreement: Fraction of images for which both say the same class, right or wrong. Accuracies alone would not
            show mistakes that cancel.
        n: Number of images.
    """

    top1: float
    float_top1: float
    agreement: float
    n: int

    @property
    def kept(self) -> float:
        """Accuracy of the int8 file / accuracy of the float model."""
        return self.top1 / self.float_top1 if self.float_top1 else 1.0

    @property
    def usual(self) -> bool:
        """Whether the accuracy is what is usual, see `USUAL_KEPT_ACCURACY`."""
        return self.kept >= USUAL_KEPT_ACCURACY

    def __str__(self) -> str:
        return (
            f"{100 * self.top1:.2f} % of {self.n} images right, in float {100 * self.float_top1:.2f} %; "
            f"the same answer for {100 * self.agreement:.2f} %"
        )

    def to_json(self) -> dict[str, object]:
        """Return a JSON object."""
        return asdict(self)


def compare_answers(in_float: Runner, in_int8: Runner, labeled: Iterable[Batch], least_kept: float) -> Quantized:
    """Run the float model and the quantized one on labeled images.

    Args:
        in_float: Runs the float model.
        in_int8: Runs the quantized one.
        labeled: (images, labels) batches.
        least_kept: See `MIN_KEPT_ACCURACY`.

    Raises:
        ExportError: If there are no images, one gives no logits of them, or too much accuracy is lost.
    """
    right = float_right = same = n = 0
    for images, labels in labeled:
        ours, theirs = _answers(in_float, images), _answers(in_int8, images)
        if not n:
            _answers(in_int8, images[:1])
        wanted = labels.cpu()
        right += int((theirs == wanted).sum())
        float_right += int((ours == wanted).sum())
        same += int((ours == theirs).sum())
        n += len(wanted)
    if not n:
        raise ExportError("`labeled` must hold at least one image; got none. Pass test images with their labels.")
    found = Quantized(right / n, float_right / n, same / n, n)
    if found.kept < least_kept:
        raise ExportError(
            f"The int8 file must keep {100 * least_kept:g} % of the float model's accuracy; got {found}. The file was "
            "removed: use the float one, or train with more weight decay, which keeps ranges narrow."
        )
    return found


def compare_int8_file(
    path: Path | str, in_float: bytes, labeled: Iterable[Batch], *, runtimes: IsolatedRuntimes | None = None
) -> Quantized:
    """Run an int8 file, in a process with limits, beside the float model as ONNX content; see `compare_answers`.

    Args:
        path: The int8 file.
        in_float: The float model.
        labeled: (images, labels) batches.
        runtimes: The process; None starts one for this file, see `secateur.export.isolation.isolated_runtimes`.

    Raises:
        ArtifactError: If the file is a link, a pipe or a device.
        ExportError: If one of them does not run, could run without end, or gives no logits.
    """
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        isolated = runtimes or stack.enter_context(isolated_runtimes(["onnx"]))
        theirs = isolated.open("onnx", [Path(path)], model_bytes=len(in_float), model_seconds=_SECONDS_PER_BATCH)
        try:
            ours = session_runner(open_session(in_float, threads=threads))
            return compare_answers(ours, theirs, labeled, 0.0)
        except (ArtifactError, ExportError):
            raise
        except Exception as error:
            raise cannot_run(error) from error


def _answers(run: Runner, images: Tensor) -> Tensor:
    """Return the class of every image."""
    outputs = run((images.detach().cpu().contiguous(),))
    logits = outputs[0]
    if len(outputs) != 1 or logits.dim() != 2 or len(logits) != len(images):
        raise ExportError(
            f"`model` must give logits (batch, classes), for answers to be compared; got {len(outputs)} output(s), "
            f"the first of shape {tuple(logits.shape)}. int8 is for classifiers."
        )
    if not torch.isfinite(logits).all():
        raise ExportError("The model's and the int8 file's outputs must be finite; got NaN or infinity.")
    return logits.argmax(1)


@checked
def export_int8(
    model: nn.Module,
    calibration: Sequence[Tensor],
    labeled: Iterable[Batch],
    path: Path | str,
    *,
    least_kept: float = MIN_KEPT_ACCURACY,
) -> Quantized:
    """Write a classifier as an ONNX file that computes with 8-bit integers, and compare its answers with the float's.

    Batch norms are folded into the convolutions first. Weights then become signed integers with a scale for each
    output channel, w = s_c q; activations unsigned ones with one scale and offset for each tensor, from the least and
    the greatest value that the calibration images give. The file says so in pairs of QuantizeLinear and
    DequantizeLinear (QDQ), which runtimes fuse into integer kernels. Weights take 7 of the 8 bits: processors without
    VNNI add two products of 8 bits in 16, which overflows silently with all 8.

    Eight bits do not follow a float model to 1e-4, so what is compared are answers: see `Quantized`. The file appears
    only if enough accuracy is kept; an older file at ``path`` is replaced then.

    Args:
        model: Gives logits (batch, classes). Any device or mode; not changed.
        calibration: Batches of real training images, as the model takes them; the first with at least two.
        labeled: Batches on which accuracy is measured, images of which none was in ``calibration``.
        path: Where, ending in ``.onnx``.
        least_kept: Smallest accepted accuracy, as a fraction of the float model's.

    Returns:
        Accuracies of both and how often they agree, both run with ONNX Runtime.

    Raises:
        ExportError: If the model cannot be translated or quantized, too much accuracy is lost, or the file cannot be
            written.
    """
    path = checked_path(path, ".onnx", "An int8 model is an ONNX file: rename it.")
    if not calibration or len(calibration[0]) < 2:
        raise ExportError("`calibration` must hold batches of at least two images; got none. Pass training images.")
    threads = torch.get_num_threads()
    content = onnx_bytes(eval_copy(model), (calibration[0].detach().cpu(),))
    with write_errors(path):
        quantized = quantize(content, calibration)
        with atomic_file(path) as part:
            part.write_bytes(quantized)
            sessions = open_session(content, threads=threads), open_session(quantized, threads=threads)
            in_float, in_int8 = map(session_runner, sessions)
            return compare_answers(in_float, in_int8, labeled, least_kept)


def export_int8_samples(model: nn.Module, samples: Samples, path: Path) -> Quantized:
    """Write an int8 file with ranges from training images and its accuracy on test images; see `export_int8`.

    Raises:
        ExportError: If the samples have no data, and as `export_int8` does.
    """
    data = samples.data
    if data is None:
        raise ExportError("`--export int8` must have images to take ranges and accuracy from; got none. Say --data.")
    ranges = draw_calibration(data.train, min(RANGE_IMAGES, len(data.train)), batch_size=INT8_BATCH_SIZE)
    return export_int8(model, [images for images, _ in ranges], data.test.batches(INT8_BATCH_SIZE), path)


def quantize(content: bytes, calibration: Sequence[Tensor]) -> bytes:
    """Return the content of an int8 ONNX file from that of a float one.

    Args:
        content: One input, free batch size.
        calibration: Batches of real images.

    Raises:
        ExportError: If ONNX Runtime cannot quantize it.
    """
    with without_telemetry():
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    room = _TIMES_THE_FILE * len(content) + _ROOM
    with temporary_folder("secateur-int8-", room=room) as folder:
        folded, quantized = folder / "folded.onnx", folder / "int8.onnx"
        try:
            session = open_session(content, threads=1, optimized=folded)
            _mark_prepared(folded)
            with _quiet_quantizer():
                quantize_static(
                    folded,
                    quantized,
                    cast(Any, _Reader([feed(session, (each.detach().cpu().contiguous(),)) for each in calibration])),
                    quant_format=QuantFormat.QDQ,
                    calibrate_method=CalibrationMethod.MinMax,
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    activation_type=QuantType.QUInt8,
                    reduce_range=True,
                )
        except OSError:
            raise
        except Exception as error:
            check_temporary_room(folder, len(content))  # Others may have filled it meanwhile.
            raise ExportError(
                f"`model` must be one that ONNX Runtime can quantize; got {first_line(error)} "
                "Leave int8 out, and please report the model."
            ) from error
        return quantized.read_bytes()


class _Reader:
    """Hand out calibration batches one by one, as ONNX Runtime asks for them."""

    def __init__(self, batches: Sequence[dict[str, np.ndarray]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, or None after the last."""
        return next(self._batches, None)


def _mark_prepared(path: Path) -> None:
    """Mark the file as prepared; otherwise the quantizer warns that batch norms may not be folded."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    onnx.save(model, path)


@contextlib.contextmanager
def _quiet_quantizer() -> Generator[None]:
    """Silence the quantizer, which writes to the root logger and to standard output."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
