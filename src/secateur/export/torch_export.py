"""Export by `torch.export`: its own ahead-of-time format, .pt2, and ExecuTorch for phones and small devices, .pte."""

import io
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from secateur._caller_state import in_default_state
from secateur._files import atomic_file
from secateur._kinds import checked
from secateur.errors import ExportError
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
    extra,
    first_line,
    flat_tensors,
    quiet,
    write_errors,
)
from secateur.export._runtime_child import open_executorch

LARGEST_BATCH = 8
"""The runtime plans its memory when the file is made, so the batch size has a bound."""


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
        return check_parity("pt2", reference, _run_pt2(reloaded), inputs, tolerance)


def _run_pt2(program: ExportedProgram) -> Runner:
    module = program.module()

    def run(batch: InputTensors) -> list[Tensor]:
        with torch.no_grad():
            return flat_tensors(module(*batch))

    return run


@checked
def export_executorch(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    path: Path | str,
    *,
    tolerance: float = PARITY_TOLERANCE,
    largest_batch: int = LARGEST_BATCH,
) -> Parity:
    """Write a model for ExecuTorch with the XNNPACK backend (float32, any ARM or x86 CPU), run it, and compare it.

    The file takes batches of 1 to ``largest_batch`` samples; its own description of the input has that number as the
    first size. The file appears only if it agrees; an older file at ``path`` is replaced then.

    Args:
        model: Any device or mode; not changed.
        example: Real samples, at least two, (n, channels, height, width); a tuple for several inputs. If there are
            more than ``largest_batch``, the first so many are run.
        path: Where, ending in ``.pte``.
        tolerance: Largest accepted difference, relative to the largest output.
        largest_batch: At least 2. Memory is planned for so many.

    Returns:
        How closely the file follows the model, run with batch sizes 1 and n.

    Raises:
        ExportError: If ExecuTorch is not installed (``pip install secateur[executorch]``), the model cannot be
            captured or lowered, the file disagrees, or it cannot be written.
    """
    path = checked_path(path, ".pte", "Rename it, or use export_onnx for .onnx.")
    if largest_batch < 2:
        raise ExportError(f"`largest_batch` must be at least 2; got {largest_batch}. {LARGEST_BATCH} is usual.")
    extra("executorch")
    inputs = tuple(tensor[:largest_batch] for tensor in as_inputs(example))
    reference = eval_copy(model)
    content = _lowered(reference, inputs, largest_batch)
    with write_errors(path), atomic_file(path) as part:
        part.write_bytes(content)
        return check_parity("executorch", reference, _run_executorch(content), inputs, tolerance)


def _run_executorch(content: bytes) -> Runner:
    extra("executorch.runtime")
    compute = open_executorch([content], torch.get_num_threads())
    return lambda batch: [torch.from_numpy(found) for found in compute([t.contiguous().numpy() for t in batch])]


def _lowered(model: nn.Module, inputs: InputTensors, largest_batch: int) -> bytes:
    exir = extra("executorch.exir")
    partitioner = extra("executorch.backends.xnnpack.partition.xnnpack_partitioner").XnnpackPartitioner()
    program = export_program(model, inputs, largest_batch)
    try:
        with quiet(), torch.no_grad():
            lowered = exir.to_edge_transform_and_lower(program, partitioner=[partitioner])
            return lowered.to_executorch().buffer
    except Exception as error:
        raise ExportError(
            f"`model` must hold only operations that ExecuTorch has; got {first_line(error)} "
            "Use export_onnx or export_pt2, or replace the operation that is named."
        ) from error
