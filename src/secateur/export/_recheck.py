"""Run exported files where they lie, long after they were written, and compare them with the model."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import ExportError
from secateur.export._executorch import executorch_runner
from secateur.export._openvino import openvino_runner
from secateur.export._parity import TOLERANCE, Parity, Runner, flat_tensors
from secateur.export._plain_onnx import plain_onnx_runner
from secateur.export._pt2 import pt2_runner

_OPENERS: dict[str, Callable[[Path], Runner]] = {
    ".onnx": plain_onnx_runner,
    ".pt2": pt2_runner,
    ".xml": openvino_runner,
    ".pte": executorch_runner,
}


def compare_file(path: Path | str, model: nn.Module, images: Tensor, *, tolerance: float = TOLERANCE) -> Parity:
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
