"""Export to OpenVINO's own format: a description (.xml) and its weights (.bin)."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur._files import atomic_file, temporary_folder
from secateur._kinds import checked
from secateur._text import is_text
from secateur.errors import ExportError
from secateur.export._common import (
    PARITY_TOLERANCE,
    Parity,
    Runner,
    as_inputs,
    check_parity,
    checked_path,
    eval_copy,
    extra,
    first_line,
    write_errors,
)
from secateur.export._runtime_child import open_openvino
from secateur.export.onnx import onnx_bytes


@checked
def export_openvino(
    model: nn.Module, example: Tensor | tuple[Tensor, ...], path: Path | str, *, tolerance: float = PARITY_TOLERANCE
) -> Parity:
    """Write a model for OpenVINO, run it on the CPU in float32, and compare it with the model.

    Made from the ONNX translation, so that a model has one translation whose names, free batch size and limits both
    formats share. Weights stay float32. The two files appear only if they agree; older ones are replaced then, in an
    order in which no description ever lies beside the weights of another.

    Args:
        model: Any device or mode; not changed. Below 1.9 GB of weights.
        example: Real samples, at least two, (n, channels, height, width); a tuple for several inputs.
        path: Where the description goes, ending in ``.xml``; the weights lie beside it and end in ``.bin``.
        tolerance: Largest accepted difference, relative to the largest output.

    Returns:
        How closely the files follow the model, run with batch sizes 1 and n.

    Raises:
        ExportError: If OpenVINO is not installed (``pip install secateur[openvino]``), the model cannot be captured or
            translated, the files disagree, or they cannot be written.
    """
    path = checked_path(path, ".xml", "Rename it; the weights go beside it, into a .bin file.")
    openvino = extra("openvino")
    inputs = as_inputs(example)
    reference = eval_copy(model)
    translated = _translated(openvino, onnx_bytes(reference, inputs))
    # The inner file is put in its place first.
    with write_errors(path), atomic_file(path) as description, atomic_file(path.with_suffix(".bin")) as weights:
        _serialize(openvino, translated, description, weights)
        found = check_parity("openvino", reference, _runner(description, weights), inputs, tolerance)
        path.unlink(missing_ok=True)
    return found


def _serialize(openvino: Any, translated: Any, description: Path, weights: Path) -> None:
    if is_text(description):
        openvino.serialize(translated, description, weights)
        return
    with temporary_folder("secateur-openvino-") as folder:  # OpenVINO takes no other paths.
        found = folder / "model.xml", folder / "model.bin"
        openvino.serialize(translated, found[0], found[1])
        for written, wanted in zip(found, (description, weights), strict=True):
            shutil.copyfile(written, wanted)


def _translated(openvino: Any, content: bytes) -> Any:
    try:
        return openvino.Core().read_model(content)
    except Exception as error:
        raise ExportError(
            f"`model` must hold only operations that OpenVINO has; got {first_line(error)} "
            "Use export_onnx, or replace the operation that is named."
        ) from error


def _runner(description: Path, weights: Path) -> Runner:
    compute = open_openvino([description.read_bytes(), weights.read_bytes()], torch.get_num_threads())
    return lambda batch: [torch.from_numpy(found) for found in compute([tensor.numpy() for tensor in batch])]
