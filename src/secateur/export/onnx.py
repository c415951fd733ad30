"""Export to ONNX, which ONNX Runtime runs on any machine."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from secateur._caller_state import in_default_state
from secateur._files import atomic_file
from secateur._runtime import copy_model
from secateur._text import is_text
from secateur.errors import ExportError
from secateur.export._common import (
    ADVICE,
    BATCH_DIM,
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
from secateur.export.onnx_config import OnnxConfig
from secateur.export.onnx_model import (
    compute_out_of_place_,
    computing_as_given,
    file_model,
    in_half,
    names_of_outputs,
    tolerance_of,
    unrolled,
)

_MAX_WEIGHT_BYTES = 1_900_000_000
"""One ONNX file is one protobuf message of at most 2 GiB; the rest is for the graph."""


@in_default_state
def export_onnx(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...] | list[Tensor],
    path: Path | str,
    *,
    tolerance: float | None = None,
    config: OnnxConfig = OnnxConfig(),  # noqa: B008 - frozen
) -> Parity:
    """Write a model as one ONNX file, run it with ONNX Runtime on the CPU, and compare it with the model.

    The batch size is free; inputs are called ``input`` (or ``input_0``, ``input_1``...), outputs ``output``, or by the
    modules that ``config`` names. Batch normalization is left in the file: runtimes fold it into the convolutions
    themselves. The file appears only if it agrees; an older file at ``path`` is replaced then.

    Args:
        model: Any device or mode; not changed. Below 1.9 GB of weights.
        example: Real samples, at least two, (n, channels, height, width); a tuple for several inputs. A list of images
            of one size for a model that takes a list, as detectors do: then the file takes one image, of shape
            (1, channels, height, width), and ``config`` must choose outputs before boxes are selected.
        path: Where, ending in ``.onnx``.
        tolerance: Largest accepted difference, relative to the largest output; None means 1e-4, or 2e-2 in float16.
        config: The opset, free image sizes, float16, chosen outputs.

    Returns:
        How closely the file follows the model, run with batch sizes 1 and n. With free sizes it was also run on larger
        images.

    Raises:
        ExportError: If the model cannot be captured or translated, the file disagrees, or it cannot be written.
    """
    path = checked_path(path, ".onnx", "Rename it, or use export_pt2 for .pt2.")
    config.check(model)
    one_image = isinstance(example, list)
    inputs = _stacked(example) if isinstance(example, list) else as_inputs(example)
    if one_image and not config.outputs:
        raise ExportError(
            "`outputs` must name modules of a model that takes a list of images; got none. Which boxes it returns "
            "depends on values, in ways that no exporter follows: choose what comes before, such as its raw heads."
        )
    reference = file_model(eval_copy(model), config, one_image=one_image)
    limit = tolerance_of(model, config) if tolerance is None else tolerance
    others = _larger(reference, inputs, one_image=one_image) if config.free_size else None
    content = onnx_bytes(reference, inputs, config, one_image=one_image)
    with write_errors(path), atomic_file(path) as part:
        part.write_bytes(content)
        runner = session_runner(_opened(content, config))
        sizes, advice = (1,) if one_image else (), _TOO_COARSE if config.half else ADVICE
        given = [(image.unsqueeze(0),) for image in inputs[0]] if one_image else [inputs]
        given += [] if others is None else [others]
        found = [check_parity("onnx", reference, runner, x, limit, batch_sizes=sizes, advice=advice) for x in given]
    return max(found, key=lambda parity: parity.max_rel)


def _stacked(images: list[Tensor]) -> InputTensors:
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise ExportError(
            f"`example` must hold images of one size, each (channels, height, width); got {sorted(shapes)}. Pass some "
            "of one size: the file takes images of that size."
        )
    return (torch.stack([image.detach().cpu() for image in images]),)


def _larger(reference: nn.Module, inputs: InputTensors, *, one_image: bool) -> InputTensors:
    """Return larger images, after checking that the model takes them."""
    if one_image or not any(tensor.dim() == 4 for tensor in inputs):
        raise ExportError(
            "`free_size` needs a model that takes a batch of images; this one takes "
            f"{'a list of images' if one_image else 'no tensor with four dimensions'}. Leave it out."
        )
    larger = tuple(
        F.interpolate(tensor.float(), (tensor.shape[2] + _TALLER, tensor.shape[3] + _WIDER)).to(tensor.dtype)
        if tensor.dim() == 4
        else tensor
        for tensor in inputs
    )
    try:
        with torch.no_grad():
            reference(*larger)
    except Exception as error:
        sizes = " and ".join("x".join(map(str, tensor.shape[2:])) for tensor in larger if tensor.dim() == 4)
        raise ExportError(
            f"`free_size` needs a model that takes images of other sizes; at {sizes} this one stopped with "
            f"{first_line(error)} Leave it out: height and width of the file are then those of the model."
        ) from error
    return larger


_TOO_COARSE = "float16 has too few digits, or too small a range, for this model: leave it in float32 (half=False)."
_TALLER, _WIDER = 64, 32
"""Pixels that the second size has more; multiples of all usual strides."""


def _opened(content: bytes, config: OnnxConfig) -> Any:
    try:
        return open_session(content, threads=1)
    except Exception as error:
        if config.opset is None:
            raise
        raise ExportError(
            f"`opset` must be one that the installed ONNX Runtime knows; with {config.opset} it stopped with "
            f"{first_line(error)} Choose an older one."
        ) from error


def onnx_bytes(
    model: nn.Module,
    inputs: InputTensors,
    config: OnnxConfig = OnnxConfig(),  # noqa: B008 - frozen
    *,
    one_image: bool = False,
) -> bytes:
    """Translate a model (in eval mode, on the CPU) to the content of an ONNX file.

    Args:
        model: What `file_model` made of the user's model.
        inputs: Samples whose shapes and dtypes are used.
        config: How the file is written.
        one_image: Whether the file takes one image only.

    Raises:
        ExportError: If it cannot be captured or translated, or is too large for one file.
    """
    size = model_bytes(model)
    if size > _MAX_WEIGHT_BYTES:
        raise ExportError(
            f"`model` must have at most {_MAX_WEIGHT_BYTES / 1e9:g} GB of weights for one ONNX file; got "
            f"{size / 1e9:.3g} GB. Use export_pt2."
        )
    names = _names("input", len(inputs))
    computing = in_half(copy_model(model)) if config.half else model
    program, shapes = _captured(computing, inputs, config, one_image=one_image)
    compute_out_of_place_(program)
    outputs = len(program.graph_signature.user_outputs)
    first = tuple(tensor[:1] for tensor in inputs) if one_image else inputs
    try:
        with quiet():
            translated = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=config.opset,
                dynamic_shapes=shapes,
                input_names=names,
                output_names=names_of_outputs(computing, first, outputs),
                verbose=False,
            )
            assert translated is not None
            _strip(translated.model.graph)
            proto = translated.model_proto
    except Exception as error:
        raise ExportError(
            f"`model` must hold only operations that ONNX has; got {first_line(error)} "
            "Use export_pt2, or replace the operation that is named."
        ) from error
    if shapes is None and not one_image:
        _name_sizes(proto)
    written = max(each.version for each in proto.opset_import if not each.domain)
    if config.opset not in {None, written}:
        raise ExportError(
            f"`opset` must be one that torch's exporter can write this model in; asked for {config.opset}, it wrote "
            f"{written}. Choose {written}."
        )
    return proto.SerializeToString()


def _captured(
    model: nn.Module, inputs: InputTensors, config: OnnxConfig, *, one_image: bool
) -> tuple[ExportedProgram, Any]:
    """Return the program, and the free dimensions of its inputs."""
    if not one_image:
        program = export_program(model, inputs, free_size=config.free_size)
        # With free sizes, torch names the dimensions; `_name_sizes` renames them.
        named = not config.free_size and computing_as_given(model)
        return program, tuple({0: BATCH_DIM} for _ in inputs) if named else None
    image = inputs[0][:1]
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(unrolled(model, image), (torch.zeros_like(image),))
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"`model` must be capturable by torch.export for one image; got {first_line(error)} Choose other outputs."
        ) from error
    program.example_inputs = None
    return program, None


def _name_sizes(proto: Any) -> None:
    """Call the free dimensions of the inputs batch, height and width, wherever they appear."""
    names: dict[str, str] = {}
    for slot in proto.graph.input:
        dims = slot.type.tensor_type.shape.dim
        for dim, name in zip(dims, ("batch", "", "height", "width"), strict=False):
            if dim.dim_param and name:
                names.setdefault(dim.dim_param, name)
    word = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names) or r"(?!)")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = word.sub(lambda found: names[found[0]], dim.dim_param)


def open_session(
    model: Path | bytes, *, threads: int, profile: Path | None = None, optimized: Path | None = None
) -> Any:
    """Open an ONNX Runtime session on the CPU with a fixed number of threads.

    Args:
        model: A file, or its content.
        threads: Within an operator; operators run one after the other.
        profile: Beginning of the name of the file for the time of every operator; None measures nothing.
        optimized: Where to write the model with constants and batch norms folded, without optimizations for this
            machine; such a session is slower. With ``profile`` it is written as it runs, with all optimizations.
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
        if profile is None:
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
