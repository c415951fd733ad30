"""What every export format shares: the samples it is compared on, the comparison with the model, the captured program.

Libraries that only some formats need are installed as extras and imported when they are first used, see `extra`.
"""

import contextlib
import importlib
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from secateur._runtime import copy_model
from secateur.data.dataset import ImageData
from secateur.errors import ExportError
from secateur.export._runtime_child import without_telemetry
from secateur.export.onnx_config import OnnxConfig

PARITY_TOLERANCE = 1e-4
"""Largest accepted difference of float32 outputs, relative to the largest output. Runtimes fold batch normalization
into convolutions and sum in another order; a few hundred layers deep that stays near 1e-5."""

BATCH_DIM = Dim("batch")
"""The free dimension of every input."""

ADVICE = "Try another format, and please report the model."
"""What to do if a file computes something else than the model."""

InputTensors = tuple[Tensor, ...]
Runner = Callable[[InputTensors], list[Tensor]]
"""Runs an exported file on inputs in their order; returns its outputs in their order."""


@dataclass(frozen=True, eq=False)
class Samples:
    """The data that exported files are compared on.

    Attributes:
        images: A few real images, at least two, as the model takes them.
        data: Training images for the value ranges of int8 and test images for its accuracy; None if there are none.
        one_image: Whether the model takes a list of images, so that a file can only take one at a time.
        onnx: How ONNX files are written.
    """

    images: Tensor
    data: ImageData | None = None
    one_image: bool = False
    onnx: OnnxConfig = OnnxConfig()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Parity:
    """How closely an exported file follows the model in PyTorch.

    Attributes:
        format: ``onnx``, ``pt2``, ``openvino`` or ``executorch``.
        max_abs: Largest absolute difference of any output.
        max_rel: Largest absolute difference divided by the largest absolute value of that output.
        tolerance: Bound that ``max_rel`` had to meet.
        batch_sizes: Batch sizes that were run.
    """

    format: str
    max_abs: float
    max_rel: float
    tolerance: float
    batch_sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"It agrees with the model within {self.max_rel:.1e} (at most {self.tolerance:.0e})."

    def to_json(self) -> dict[str, object]:
        """Return a JSON object."""
        return {**asdict(self), "batch_sizes": list(self.batch_sizes)}


def eval_copy(model: nn.Module) -> nn.Module:
    """Copy a model in eval mode to the CPU; the caller's model keeps its mode and device."""
    return copy_model(model).cpu().eval()


def model_bytes(model: nn.Module) -> int:
    """Return the size of all parameters and buffers of a model, in bytes."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def as_inputs(example: Tensor | tuple[Tensor, ...]) -> InputTensors:
    """Return the example as a tuple of CPU tensors that share their first (batch) dimension.

    Raises:
        ExportError: If there are fewer than two samples: a file that was only run on one may not take two.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in inputs}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ExportError(
            f"`example` must hold at least two samples along dimension 0, to check that the batch size is free; got "
            f"shapes {[tuple(tensor.shape) for tensor in inputs]}. Pass a batch of real images."
        )
    return tuple(tensor.detach().cpu() for tensor in inputs)


def checked_path(path: Path | str, suffix: str, advice: str) -> Path:
    """Return the path of an exported file; refuse another suffix.

    Raises:
        ExportError: If it does not end in the suffix, with the advice as the last sentence.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ExportError(f"`path` must end in {suffix}; got {path}. {advice}")
    return path


@contextlib.contextmanager
def write_errors(path: Path) -> Generator[None]:
    """Report an OSError of the block as an `ExportError` about the file."""
    try:
        yield
    except OSError as error:
        raise ExportError(
            f"{path} could not be written: {first_line(error)} Free some space or choose another path."
        ) from error


def export_program(
    model: nn.Module, inputs: InputTensors, largest_batch: int | None = None, *, free_size: bool = False
) -> ExportedProgram:
    """Capture a model for any batch size, or any up to a bound.

    The model is captured on blank samples, so that the caller's images never travel inside an exported file.

    Args:
        model: In eval mode, on the CPU.
        inputs: Samples whose shapes and dtypes are used.
        largest_batch: The bound; None means there is none.
        free_size: Capture it for any height and width, too, of inputs with four dimensions.

    Raises:
        ExportError: If torch.export cannot capture the model, or only for one batch size.
    """
    batch = BATCH_DIM if largest_batch is None else Dim("batch", max=largest_batch)
    blank = tuple(torch.zeros(2, *tensor.shape[1:], dtype=tensor.dtype) for tensor in inputs)
    any_size = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    shapes: list[dict[int, Any]] = [any_size if free_size and tensor.dim() == 4 else {0: batch} for tensor in inputs]
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(model, blank, dynamic_shapes=_as_arguments(model, shapes))
    except Exception as error:
        raise ExportError(
            f"`model` must be capturable by torch.export for any batch size{' and image size' * free_size}; got "
            f"{first_line(error)} "
            "Remove what depends on values or on a fixed batch size from its forward."
        ) from error
    program.example_inputs = None
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths and source lines of this machine
    return program


def _as_arguments(model: nn.Module, shapes: list[dict[int, Any]]) -> list[Any]:
    """Return the free dimensions as torch.export wants them: those of ``*inputs`` in one tuple."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return list(shapes)
    place = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return [*shapes[:place], tuple(shapes[place:])]


def check_parity(
    name: str,
    model: nn.Module,
    exported: Runner,
    inputs: InputTensors,
    tolerance: float,
    *,
    batch_sizes: tuple[int, ...] = (),
    advice: str = ADVICE,
) -> Parity:
    """Compare an exported file with the model on the first sample alone and on the whole batch.

    Args:
        name: The format, for the record.
        model: In eval mode, on the CPU.
        exported: Runs the file; outputs in order.
        inputs: Real samples.
        tolerance: See `Parity`.
        batch_sizes: The numbers of samples to compare on; empty means one and all.
        advice: What to do if values disagree.

    Raises:
        ExportError: If the outputs disagree in number, shape or value, or are not finite.
    """
    batch_sizes = batch_sizes or (1, inputs[0].shape[0])
    max_abs = max_rel = 0.0
    for size in batch_sizes:
        batch = tuple(tensor[:size] for tensor in inputs)
        with torch.no_grad():
            wanted = flat_tensors(model(*batch))
        try:
            found = exported(batch)
        except Exception as error:
            raise ExportError(
                f"The {name} file must run on {size} sample(s); got: {first_line(error)} "
                "The model may use its batch size as a fixed number: write -1 or x.shape[0] instead."
            ) from error
        absolute, relative = _difference(name, wanted, found)
        max_abs, max_rel = max(max_abs, absolute), max(max_rel, relative)
    if not max_rel <= tolerance:
        raise ExportError(
            f"The {name} file must compute what the model computes to within {tolerance:g} of the largest output; got "
            f"a difference of {max_rel:.3g} ({max_abs:.3g} absolute). The file was removed. {advice}"
        )
    return Parity(name, max_abs, max_rel, tolerance, batch_sizes)


def _difference(name: str, wanted: Sequence[Tensor], found: Sequence[Tensor]) -> tuple[float, float]:
    shapes = [tuple(t.shape) for t in wanted], [tuple(t.shape) for t in found]
    if shapes[0] != shapes[1]:
        raise ExportError(
            f"The {name} file must give outputs of shapes {shapes[0]}; got {shapes[1]}. The file was removed. "
            "Try another format, and please report the model."
        )
    max_abs = max_rel = 0.0
    for ours, theirs in ((a.double(), b.double()) for a, b in zip(wanted, found, strict=True) if a.numel()):
        absolute, largest = float((ours - theirs).abs().max()), float(ours.abs().max())
        if not torch.isfinite(ours).all() or not torch.isfinite(theirs).all():
            raise ExportError(
                f"The model's and the {name} file's outputs must be finite; got NaN or infinity. The file was removed. "
                "Check the example images and the weights."
            )
        max_abs = max(max_abs, absolute)
        max_rel = max(max_rel, absolute / largest if largest else absolute)
    return max_abs, max_rel


def flat_tensors(outputs: object) -> list[Tensor]:
    """Return the tensors of a model's output (a tensor, or nested tuples, lists and mappings of them), in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    if isinstance(outputs, Mapping):
        return flat_tensors(tuple(cast(Mapping[object, object], outputs).values()))
    if isinstance(outputs, (tuple, list)):
        return [tensor for part in cast(Sequence[object], outputs) for tensor in flat_tensors(part)]
    return []


def first_line(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message, as the end of a sentence."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if text.endswith(".") else text + "."


def cannot_run(error: Exception) -> ExportError:
    """Return the error for a file from outside that cannot be run, whatever is wrong with it."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ExportError(f"it does not run ({reason}): export it again")


def check_extra(library: str) -> None:
    """Refuse to continue without an optional library; nothing is imported.

    Args:
        library: Its name, which is also that of the extra.

    Raises:
        ExportError: If it is not installed, with the command that installs it.
    """
    if importlib.util.find_spec(library) is None:
        raise ExportError(
            f"This format must have {library}, which is not installed. Run: pip install 'secateur[{library}]'"
        )


def extra(module: str) -> Any:
    """Import a module of an optional library.

    Args:
        module: Such as ``executorch.exir``; its first part names the library and the extra.

    Raises:
        ExportError: If the library is not installed, or does not work with the other installed packages.
    """
    library = module.split(".", maxsplit=1)[0]
    check_extra(library)
    try:
        with quiet(), without_telemetry():
            return importlib.import_module(module)
    except (ImportError, OSError, AttributeError) as error:
        raise ExportError(
            f"{library} must fit the other packages; {module} cannot be imported ({first_line(error)}) "
            f"Run: pip install --upgrade 'secateur[{library}]'"
        ) from error


_NOISY = ("torch.onnx", "torch.export", "torch.fx", "torch._export", "torch.utils", "onnxscript", "onnx_ir", "torchao")


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
