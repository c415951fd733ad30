"""The table of export formats, and the comparison of an exported file with the model.

To add a format, write a file that exports, runs and compares it (such as ``torch_export.py``), add a row here, and a
function that opens it for `verify` to ``_runtime_child.py``.
"""

import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import ArtifactError, ExportError
from secateur.export._common import PARITY_TOLERANCE, Parity, Samples, check_extra, flat_tensors, model_bytes
from secateur.export.int8 import Quantized, export_int8_samples
from secateur.export.isolation import IsolatedRuntimes, isolated_runtimes
from secateur.export.onnx import export_onnx
from secateur.export.openvino import export_openvino
from secateur.export.torch_export import export_executorch, export_pt2


@dataclass(frozen=True, eq=False)
class Exporter:
    """Everything there is to know about one export format.

    Attributes:
        name: On the command line and in secateur.json.
        files: Names of its files in an artifact; the first is the one to open.
        write: Writes the files, the first at the given path, and compares them with the model.
        quantized: Whether the format computes with other numbers than the model, so that only answers can be compared
            (`Quantized`).
        extra: The optional library that writes and runs it; None if none is needed.
        needs_trust: Whether reading a file from someone else can do harm.
    """

    name: str
    files: tuple[str, ...]
    write: Callable[[nn.Module, Samples, Path], Parity | Quantized]
    quantized: bool = False
    extra: str | None = None
    needs_trust: bool = False

    @property
    def file(self) -> str:
        """The name of the file to open."""
        return self.files[0]


def _from_images(export: Callable[[nn.Module, Tensor, Path], Parity]) -> Callable[[nn.Module, Samples, Path], Parity]:
    return lambda model, samples, path: export(model, samples.images, path)


def _write_onnx(model: nn.Module, samples: Samples, path: Path) -> Parity:
    images = list(samples.images) if samples.one_image else samples.images
    return export_onnx(model, images, path, config=samples.onnx)


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

    ONNX = Exporter("onnx", ("model.onnx",), _write_onnx)
    """For ONNX Runtime and most other runtimes."""
    # torch may unpickle parts of a .pt2 file.
    PT2 = Exporter("pt2", ("model.pt2",), _from_images(export_pt2), needs_trust=True)
    """For `torch.export.load` and ahead-of-time compilation."""
    OPENVINO = Exporter("openvino", ("model.xml", "model.bin"), _from_images(export_openvino), extra="openvino")
    """For OpenVINO; needs the extra of that name."""
    # The runtime trusts the sizes and offsets of a .pte file.
    EXECUTORCH = Exporter(
        "executorch",
        ("model.pte",),
        _from_images(export_executorch),
        extra="executorch",
        needs_trust=True,
    )
    """For phones and small devices; needs the extra of that name."""
    INT8 = Exporter("int8", ("model.int8.onnx",), export_int8_samples, quantized=True)
    """An ONNX file that computes with 8-bit integers."""


def parse_formats(formats: "str | Iterable[Format | str]") -> tuple[Format, ...]:
    """Return formats, each once, that are given as such or by their names, also as one text: "onnx,pt2".

    Raises:
        ExportError: If a name is unknown.
    """
    given = formats.split(",") if isinstance(formats, str) else formats
    known = {form.value: form for form in Format}
    found: dict[Format, None] = {}
    for each in given:
        name = each.value if isinstance(each, Format) else str(each).strip().lower()
        if name and name not in known:
            raise ExportError(f"`export` must name {' or '.join(known)}; got {str(each)!r}.")
        if name:
            found[known[name]] = None
    return tuple(found)


def check_formats(formats: Iterable[Format]) -> None:
    """Refuse formats whose library is not installed, before any work.

    Raises:
        ExportError: With the command that installs it.
    """
    for form in formats:
        if form.exporter.extra is not None:
            check_extra(form.exporter.extra)


def compare_file(
    path: Path | str,
    model: nn.Module,
    images: Tensor,
    *,
    tolerance: float = PARITY_TOLERANCE,
    runtimes: IsolatedRuntimes | None = None,
) -> Parity:
    """Run one exported file on images, in a process with limits, and compare its outputs with the model's.

    Args:
        path: An ``.onnx`` or ``.xml`` file; or a ``.pt2`` or ``.pte`` file, which must be trusted, see `Exporter`.
        model: In eval mode, on the CPU.
        images: A batch.
        tolerance: Recorded with the result.
        runtimes: The process; None starts one for this file, see `secateur.export.isolation.isolated_runtimes`.

    Returns:
        How closely the file follows the model: ``max_rel`` may be above the tolerance.

    Raises:
        ExportError: If the file is refused, does not run within the limits, or gives outputs of other shapes.
    """
    path = Path(path)
    rows = {Path(form.exporter.file).suffix: form.exporter for form in Format if not form.exporter.quantized}
    if path.suffix not in rows:
        raise ExportError(f"`path` must end in {' or '.join(rows)}; got {path}.")
    row = rows[path.suffix]
    files = [path, *(path.with_suffix(Path(name).suffix) for name in row.files[1:])]
    started = time.perf_counter()
    with torch.no_grad():
        wanted = [tensor.double() for tensor in flat_tensors(model(images))]
    seconds = time.perf_counter() - started
    with contextlib.ExitStack() as stack:
        isolated = runtimes or stack.enter_context(isolated_runtimes([row.name]))
        try:
            run = isolated.open(row.name, files, model_bytes=model_bytes(model), model_seconds=seconds)
            found = [tensor.double() for tensor in run((images,))]
        except ArtifactError as error:
            raise ExportError(f"it does not run ({error}): export it again") from error
    shapes = [tuple(tensor.shape) for tensor in wanted], [tuple(tensor.shape) for tensor in found]
    if shapes[0] != shapes[1]:
        raise ExportError(f"outputs have shape {_one(shapes[1])}, not {_one(shapes[0])}")
    absolute = max(float((ours - theirs).abs().max()) for ours, theirs in zip(wanted, found, strict=True))
    relative = absolute / max(*(float(tensor.abs().max()) for tensor in wanted), 1e-30)
    return Parity(path.suffix[1:], absolute, relative, tolerance, (len(images),))


def _one(shapes: list[tuple[int, ...]]) -> object:
    return shapes[0] if len(shapes) == 1 else shapes
