"""Export to ONNX, which ONNX Runtime runs on any machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from secateur._caller_state import in_default_state
from secateur._files import atomic_file
from secateur._text import is_text
from secateur.errors import ExportError
from secateur.export._common import (
    BATCH_DIM,
    PARITY_TOLERANCE,
    InputTensors,
    Parity,
    Runner,
    as_inputs,
    check_parity,
    checked_path,
    eval_copy,
    export_program,
    first_line,
    model_bytes,
    quiet,
    write_errors,
)
from secateur.export._runtime_child import without_telemetry

_MAX_WEIGHT_BYTES = 1_900_000_000
"""One ONNX file is one protobuf message of at most 2 GiB; the rest is for the graph."""


@in_default_state
def export_onnx(
    model: nn.Module, example: Tensor | tuple[Tensor, ...], path: Path | str, *, tolerance: float = PARITY_TOLERANCE
) -> Parity:
    """Write a model as one ONNX file, run it with ONNX Runtime on the CPU, and compare it with the model.

    The batch size is free; inputs are called ``input`` (or ``input_0``, ``input_1``...), outputs ``output``. Batch
    normalization is left in the file: runtimes fold it into the convolutions themselves. The file appears only if it
    agrees; an older file at ``path`` is replaced then.

    Args:
        model: Any device or mode; not changed. Below 1.9 GB of weights.
        example: Real samples, at least two, (n, channels, height, width); a tuple for several inputs.
        path: Where, ending in ``.onnx``.
        tolerance: Largest accepted difference, relative to the largest output.

    Returns:
        How closely the file follows the model, run with batch sizes 1 and n.

    Raises:
        ExportError: If the model cannot be captured or translated, the file disagrees, or it cannot be written.
    """
    path = checked_path(path, ".onnx", "Rename it, or use export_pt2 for .pt2.")
    inputs = as_inputs(example)
    reference = eval_copy(model)
    content = onnx_bytes(reference, inputs)
    with write_errors(path), atomic_file(path) as part:
        part.write_bytes(content)
        session = open_session(content, threads=1)
        return check_parity("onnx", reference, session_runner(session), inputs, tolerance)


def onnx_bytes(model: nn.Module, inputs: InputTensors) -> bytes:
    """Translate a model (in eval mode, on the CPU) to the content of an ONNX file.

    Raises:
        ExportError: If it cannot be captured or translated, or is too large for one file.
    """
    size = model_bytes(model)
    if size > _MAX_WEIGHT_BYTES:
        raise ExportError(
            f"`model` must have at most {_MAX_WEIGHT_BYTES / 1e9:g} GB of weights for one ONNX file; got "
            f"{size / 1e9:.3g} GB. Use export_pt2."
        )
    program = export_program(model, inputs)
    try:
        with quiet():
            translated = torch.onnx.export(
                program,
                dynamo=True,
                dynamic_shapes=tuple({0: BATCH_DIM} for _ in inputs),
                input_names=_names("input", len(inputs)),
                output_names=_names("output", len(program.graph_signature.user_outputs)),
                verbose=False,
            )
            assert translated is not None
            _strip(translated.model.graph)
            return translated.model_proto.SerializeToString()
    except Exception as error:
        raise ExportError(
            f"`model` must hold only operations that ONNX has; got {first_line(error)} "
            "Use export_pt2, or replace the operation that is named."
        ) from error


def open_session(
    model: Path | bytes, *, threads: int, profile: Path | None = None, optimized: Path | None = None
) -> Any:
    """Open an ONNX Runtime session on the CPU with a fixed number of threads.

    Args:
        model: A file, or its content.
        threads: Within an operator; operators run one after the other.
        profile: Beginning of the name of the file for the time of every operator; None measures nothing.
        optimized: Where to write the model with constants and batch norms folded, without optimizations for this
            machine; such a session is slower.
    """
    with without_telemetry():
        import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3  # errors only
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if optimized is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(optimized)
    by_path = isinstance(model, Path) and is_text(model)
    content = str(model) if by_path else model.read_bytes() if isinstance(model, Path) else model
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def feed(session: Any, batch: InputTensors) -> dict[str, np.ndarray]:
    """Return the inputs of a session by name."""
    return {slot.name: tensor.numpy() for slot, tensor in zip(session.get_inputs(), batch, strict=True)}


def session_runner(session: Any) -> Runner:
    """Return a function that runs a session on inputs in their order."""

    def run(batch: InputTensors) -> list[Tensor]:
        outputs = cast(Sequence[np.ndarray], session.run(None, feed(session, batch)))
        return [torch.from_numpy(output) for output in outputs]

    return run


def _strip(graph: Any) -> None:
    """Remove the exporter's metadata, which holds paths and source lines of this machine."""
    for node in graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()


def _names(stem: str, count: int) -> list[str]:
    return [stem] if count == 1 else [f"{stem}_{n}" for n in range(count)]
