"""int8: the ONNX model with weights and activations of eight bits, by ONNX Runtime's static quantisation."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from secateur.artifact import atomic_file
from secateur.errors import ExportError
from secateur.export._onnx import feed, onnx_bytes, open_session
from secateur.export._parity import first_line, not_written
from secateur.export._program import eval_copy
from secateur.export._quantised import LEAST_KEPT, Quantised, compare_answers

Labelled = Iterable[tuple[Tensor, Tensor]]
"""(images, labels) batches."""


def export_int8(
    model: nn.Module,
    calibration: Sequence[Tensor],
    labelled: Labelled,
    path: Path | str,
    *,
    least_kept: float = LEAST_KEPT,
) -> Quantised:
    """Write a classifier as an ONNX file that computes with 8-bit integers, and compare its answers with the float's.

    Batch norms are folded into the convolutions first. Weights then become signed integers with a scale for each
    output channel, w = s_c q; activations unsigned ones with one scale and offset for each tensor, from the least and
    the greatest value that the calibration images give. The file says so in pairs of QuantizeLinear and
    DequantizeLinear (QDQ), which runtimes fuse into integer kernels. Weights take 7 of the 8 bits: processors without
    VNNI add two products of 8 bits in 16, which overflows silently with all 8.

    Eight bits do not follow a float model to 1e-4, so what is compared are answers: see `Quantised`. The file appears
    only if enough accuracy is kept; an older file at ``path`` is replaced then.

    Args:
        model: Gives logits (batch, classes). Any device or mode; not changed.
        calibration: Batches of real training images, as the model takes them; the first with at least two.
        labelled: Batches on which accuracy is measured, images of which none was in ``calibration``.
        path: Where, ending in ``.onnx``.
        least_kept: Smallest accepted accuracy, as a fraction of the float model's.

    Returns:
        Accuracies of both and how often they agree, both run with ONNX Runtime.

    Raises:
        ExportError: If the model cannot be translated or quantised, too much accuracy is lost, or the file cannot be
            written.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise ExportError(f"`path` must end in .onnx; got {path}. An int8 model is an ONNX file: rename it.")
    if not calibration or len(calibration[0]) < 2:
        raise ExportError("`calibration` must hold batches of at least two images; got none. Pass training images.")
    threads = torch.get_num_threads()
    content = onnx_bytes(eval_copy(model), (calibration[0].detach().cpu(),))
    try:
        quantised = quantise(content, calibration)
        with atomic_file(path) as part:
            part.write_bytes(quantised)
            sessions = open_session(content, threads=threads), open_session(part, threads=threads)
            return compare_answers(*sessions, labelled, least_kept)
    except OSError as error:
        raise not_written(path, error) from error


def quantise(content: bytes, calibration: Sequence[Tensor]) -> bytes:
    """The content of an int8 ONNX file from that of a float one.

    Args:
        content: One input, free batch size.
        calibration: Batches of real images.

    Raises:
        ExportError: If ONNX Runtime cannot quantise it.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory(prefix="secateur-int8-") as folder:
        folded, quantised = Path(folder) / "folded.onnx", Path(folder) / "int8.onnx"
        session = open_session(content, threads=1, optimised=folded)
        try:
            _say_prepared(folded)
            with _silence():
                quantize_static(
                    folded,
                    quantised,
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
            raise ExportError(
                f"`model` must be one that ONNX Runtime can quantise; got {first_line(error)} "
                "Leave int8 out, and please report the model."
            ) from error
        return quantised.read_bytes()


class _Reader:
    """Hands out calibration batches one by one, as ONNX Runtime asks for them."""

    def __init__(self, batches: Sequence[dict[str, np.ndarray]]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None after the last."""
        return next(self._batches, None)


def _say_prepared(path: Path) -> None:
    """Note in the file what has been done, or the quantiser warns that batch norms may not be folded."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"onnx.quant.pre_process": "onnxruntime.quant"})
    onnx.save(model, path)


@contextlib.contextmanager
def _silence() -> Generator[None]:
    """The quantiser speaks through the root logger and standard output."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
