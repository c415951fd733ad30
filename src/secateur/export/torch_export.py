"""Export to PyTorch's own ahead-of-time format, .pt2."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from secateur._caller_state import in_default_state
from secateur._files import atomic_file
from secateur.export._common import (
    PARITY_TOLERANCE,
    InputTensors,
    Parity,
    Runner,
    as_inputs,
    check_parity,
    checked_path,
    eval_copy,
    export_program,
    flat_tensors,
    quiet,
    write_errors,
)


@in_default_state
def export_pt2(
    model: nn.Module, example: Tensor | tuple[Tensor, ...], path: Path | str, *, tolerance: float = PARITY_TOLERANCE
) -> Parity:
    """Write a model as .pt2 (`torch.export.save`), read it back, and compare it with the model.

    The batch size is free. The file appears only if it agrees; an older file at ``path`` is replaced then.

    Safety: what is written holds raw tensors and JSON, no pickle, and none of the example images. But
    `torch.export.load` unpickles archives that ask for it (PyTorch 2.15 and before), so load only .pt2 files that you
    made or trust; artifacts (`secateur.load`) and .onnx files do not have this weakness.

    Args:
        model: Any device or mode; not changed.
        example: Real samples, at least two, (n, channels, height, width); a tuple for several inputs.
        path: Where, ending in ``.pt2``.
        tolerance: Largest accepted difference, relative to the largest output.

    Returns:
        How closely the file follows the model, run with batch sizes 1 and n.

    Raises:
        ExportError: If the model cannot be captured, the file disagrees, or it cannot be written.
    """
    path = checked_path(path, ".pt2", "Rename it, or use export_onnx for .onnx.")
    inputs = as_inputs(example)
    reference = eval_copy(model)
    program = export_program(reference, inputs)
    with write_errors(path), atomic_file(path) as part:
        content = io.BytesIO()  # given a path, torch writes the temporary name into the archive
        with quiet():
            torch.export.save(program, content)
            part.write_bytes(content.getvalue())
            content.seek(0)
            reloaded = torch.export.load(content)
        return check_parity("pt2", reference, _runner(reloaded), inputs, tolerance)


def _runner(program: ExportedProgram) -> Runner:
    module = program.module()

    def run(batch: InputTensors) -> list[Tensor]:
        with torch.no_grad():
            return flat_tensors(module(*batch))

    return run
