"""The table of export formats, and the comparison of an exported file with the model.

To add a format, write a file that exports, runs and compares it (such as ``torch_export.py``) and add a row here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import ExportError
from secateur.export._common import PARITY_TOLERANCE, Parity, Runner, Samples, cannot_run, check_extra, flat_tensors
from secateur.export.executorch import executorch_runner, export_executorch
from secateur.export.int8 import Quantized, export_int8_samples
from secateur.export.onnx import export_onnx, plain_onnx_runner
from secateur.export.openvino import export_openvino, openvino_runner
from secateur.export.torch_export import export_pt2, pt2_runner


@dataclass(frozen=True, eq=False)
class Exporter:
    """Everything there is to know about one export format.

    Attributes:
        name: On the command line and in secateur.json.
        files: Names of its files in an artifact; the first is the one to open.
        write: Writes the files, the first at the given path, and compares them with the model.
        open: Opens a file to run it; None if the format computes with other numbers than the model, so that only
            answers can be compared (`Quantized`).
        extra: The optional library that writes and runs it; None if none is needed.
        needs_trust: Whether reading a file from someone else can do harm.
    """

    name: str
    files: tuple[str, ...]
    write: Callable[[nn.Module, Samples, Path], Parity | Quantized]
    open: Callable[[Path], Runner] | None
    extra: str | None = None
    needs_trust: bool = False

    @property
    def file(self) -> str:
        """The name of the file to open."""
        return self.files[0]

    @property
    def quantized(self) -> bool:
        """Whether the file can only be compared by its answers."""
        return self.open is None


def _from_images(export: Callable[[nn.Module, Tensor, Path], Parity]) -> Callable[[nn.Module, Samples, Path], Parity]:
    return lambda model, samples, path: export(model, samples.images, path)


class Format(Enum):
    """A file format that other runtimes read; each member has an `Exporter` row."""

    _value_: str
    exporter: Exporter

    def __new__(cls, exporter: Exporter) -> "Format":
        """Make the name of the row the value, so that ``Format("onnx")`` finds it."""
        member = object.__new__(cls)
        member._value_ = exporter.name
        member.exporter = exporter
        return member

    ONNX = Exporter("onnx", ("model.onnx",), _from_images(export_onnx), plain_onnx_runner)
    """For ONNX Runtime and most other runtimes."""
    # torch may unpickle parts of a .pt2 file.
    PT2 = Exporter("pt2", ("model.pt2",), _from_images(export_pt2), pt2_runner, needs_trust=True)
    """For `torch.export.load` and ahead-of-time compilation."""
    OPENVINO = Exporter(
        "openvino", ("model.xml", "model.bin"), _from_images(export_openvino), openvino_runner, extra="openvino"
    )
    """For OpenVINO; needs the extra of that name."""
    # The runtime trusts the sizes and offsets of a .pte file.
    EXECUTORCH = Exporter(
        "executorch",
        ("model.pte",),
        _from_images(export_executorch),
        executorch_runner,
        extra="executorch",
        needs_trust=True,
    )
    """For phones and small devices; needs the extra of that name."""
    INT8 = Exporter("int8", ("model.int8.onnx",), export_int8_samples, None)
    """An ONNX file that computes with 8-bit integers."""


def check_formats(formats: Iterable[Format]) -> None:
    """Refuse formats whose library is not installed, before any work.

    Raises:
        ExportError: With the command that installs it.
    """
    for form in formats:
        if form.exporter.extra is not None:
            check_extra(form.exporter.extra)


def compare_file(path: Path | str, model: nn.Module, images: Tensor, *, tolerance: float = PARITY_TOLERANCE) -> Parity:
    """Run one exported file on images and compare its outputs with the model's.

    Args:
        path: An ``.onnx`` or ``.xml`` file; or a ``.pt2`` or ``.pte`` file, which must be trusted, see `Exporter`.
        model: In eval mode, on the CPU.
        images: A batch.
        tolerance: Recorded with the result.

    Returns:
        How closely the file follows the model: ``max_rel`` may be above the tolerance.

    Raises:
        ExportError: If the file does not run, or gives outputs of other shapes.
    """
    path = Path(path)
    openers = {Path(form.exporter.file).suffix: form.exporter.open for form in Format if form.exporter.open is not None}
    if path.suffix not in openers:
        raise ExportError(f"`path` must end in {' or '.join(openers)}; got {path}.")
    with torch.no_grad():
        wanted = [tensor.double() for tensor in flat_tensors(model(images))]
    try:
        found = [tensor.double() for tensor in openers[path.suffix](path)((images,))]
    except Exception as error:
        raise cannot_run(error) from error
    shapes = [tuple(tensor.shape) for tensor in wanted], [tuple(tensor.shape) for tensor in found]
    if shapes[0] != shapes[1]:
        raise ExportError(f"outputs have shape {_one(shapes[1])}, not {_one(shapes[0])}")
    absolute = max(float((ours - theirs).abs().max()) for ours, theirs in zip(wanted, found, strict=True))
    relative = absolute / max(*(float(tensor.abs().max()) for tensor in wanted), 1e-30)
    return Parity(path.suffix[1:], absolute, relative, tolerance, (len(images),))


def _one(shapes: list[tuple[int, ...]]) -> object:
    return shapes[0] if len(shapes) == 1 else shapes
