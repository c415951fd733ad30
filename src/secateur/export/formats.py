"""Run exported files where they lie, long after they were written, and compare them with the model.

The files that other runtimes read, by format."""

from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import ExportError
from secateur.export._common import PARITY_TOLERANCE, Parity, Runner, check_extra, flat_tensors
from secateur.export.executorch import executorch_runner
from secateur.export.onnx import plain_onnx_runner
from secateur.export.openvino import openvino_runner
from secateur.export.torch_export import pt2_runner

_OPENERS: dict[str, Callable[[Path], Runner]] = {
    ".onnx": plain_onnx_runner,
    ".pt2": pt2_runner,
    ".xml": openvino_runner,
    ".pte": executorch_runner,
}


def compare_file(path: Path | str, model: nn.Module, images: Tensor, *, tolerance: float = PARITY_TOLERANCE) -> Parity:
    """Run one exported file on images and compare its outputs with the model's.

    Args:
        path: An ``.onnx`` or ``.xml`` file; or a ``.pt2`` or ``.pte`` file, which must be trusted: torch may unpickle
            parts of the one, and the runtime of the other believes what it says about itself.
        model: In eval mode, on the CPU.
        images: A batch.
        tolerance: Recorded with the result.

    Returns:
        How closely the file follows the model: ``max_rel`` may be above the tolerance.

    Raises:
        ExportError: If the file does not run, or gives outputs of other shapes.
    """
    path = Path(path)
    if path.suffix not in _OPENERS:
        raise ExportError(f"`path` must end in {' or '.join(_OPENERS)}; got {path}.")
    with torch.no_grad():
        wanted = [tensor.double() for tensor in flat_tensors(model(images))]
    try:
        found = [tensor.double() for tensor in _OPENERS[path.suffix](path)((images,))]
    except Exception as error:
        # Whatever is wrong with a file from outside is said in words.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ExportError(f"it does not run ({reason}): export it again") from error
    shapes = [tuple(tensor.shape) for tensor in wanted], [tuple(tensor.shape) for tensor in found]
    if shapes[0] != shapes[1]:
        raise ExportError(f"outputs have shape {_one(shapes[1])}, not {_one(shapes[0])}")
    absolute = max(float((ours - theirs).abs().max()) for ours, theirs in zip(wanted, found, strict=True))
    relative = absolute / max(*(float(tensor.abs().max()) for tensor in wanted), 1e-30)
    return Parity(path.suffix[1:], absolute, relative, tolerance, (len(images),))


def _one(shapes: list[tuple[int, ...]]) -> object:
    return shapes[0] if len(shapes) == 1 else shapes


class Format(Enum):
    """Files that other runtimes read."""

    ONNX = "onnx"
    """For ONNX Runtime and most others."""
    PT2 = "pt2"
    """For `torch.export.load` and ahead-of-time compilation."""
    OPENVINO = "openvino"
    """For OpenVINO; needs the extra of that name."""
    EXECUTORCH = "executorch"
    """For phones and small devices; needs the extra of that name."""
    INT8 = "int8"
    """An ONNX file that computes with 8-bit integers."""

    @property
    def files(self) -> tuple[str, ...]:
        """Their names in an artifact; the first is the one to open."""
        return _FILES[self]

    @property
    def file(self) -> str:
        """The name of the one to open."""
        return self.files[0]

    @property
    def extra(self) -> str | None:
        """The optional library that makes and runs it."""
        return _EXTRAS.get(self)

    @property
    def trusting(self) -> bool:
        """Whether reading such a file trusts whoever made it."""
        return self in _TRUSTING


_FILES = {
    Format.ONNX: ("model.onnx",),
    Format.PT2: ("model.pt2",),
    Format.OPENVINO: ("model.xml", "model.bin"),
    Format.EXECUTORCH: ("model.pte",),
    Format.INT8: ("model.int8.onnx",),
}
_EXTRAS = {Format.OPENVINO: "openvino", Format.EXECUTORCH: "executorch"}
_TRUSTING = (Format.PT2, Format.EXECUTORCH)
"""torch may unpickle parts of a .pt2 file; ExecuTorch's runtime does not doubt sizes and offsets of a .pte file."""


def check_formats(formats: Iterable[Format]) -> None:
    """Refuse formats whose library is not installed, before any work.

    Raises:
        ExportError: With the command that installs it.
    """
    for form in formats:
        if form.extra is not None:
            check_extra(form.extra)
