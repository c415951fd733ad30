"""The model as a torch.export program with a free batch size: what every format is made from."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Generator

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from secateur.errors import ExportError
from secateur.export._parity import Inputs, first_line

BATCH = Dim("batch")
"""The free dimension of every input."""

_NOISY = ("torch.onnx", "torch.export", "torch.fx", "torch._export", "torch.utils", "onnxscript", "onnx_ir", "torchao")


def eval_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode on the CPU; the caller's model keeps its mode and device."""
    return copy.deepcopy(model).cpu().eval()


def export_program(model: nn.Module, inputs: Inputs, largest_batch: int | None = None) -> ExportedProgram:
    """Capture a model for any batch size, or any up to a bound.

    The model is captured on blank samples, so that the caller's images never travel inside an exported file.

    Args:
        model: In eval mode, on the CPU.
        inputs: Samples whose shapes and dtypes are used.
        largest_batch: The bound; None means there is none.

    Raises:
        ExportError: If torch.export cannot capture the model, or only for one batch size.
    """
    batch = BATCH if largest_batch is None else Dim("batch", max=largest_batch)
    blank = tuple(torch.zeros(2, *tensor.shape[1:], dtype=tensor.dtype) for tensor in inputs)
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(model, blank, dynamic_shapes=[{0: batch} for _ in inputs])
    except Exception as error:
        raise ExportError(
            f"`model` must be capturable by torch.export for any batch size; got {first_line(error)} "
            "Remove what depends on values or on a fixed batch size from its forward."
        ) from error
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths and source lines of this machine
    return program


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Silence the exporters' progress notes and warnings about themselves; errors still raise."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
