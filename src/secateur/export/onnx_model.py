"""The model that an ONNX file stands for: with chosen outputs, for one image of a list, in 16-bit floats."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from secateur.errors import ExportError
from secateur.export._common import PARITY_TOLERANCE, first_line, flat_tensors, quiet
from secateur.export.onnx_config import OnnxConfig

HALF_TOLERANCE = 2e-2
"""Largest accepted difference of outputs computed in float16, relative to the largest output. A number of float16 has a
relative error of 2^-11 = 5e-4, and errors add up over some tens of layers."""


def is_half(model: nn.Module) -> bool:
    """Return whether all weights of a model are float16."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return kinds == {torch.float16}


def file_model(model: nn.Module, config: OnnxConfig, *, one_image: bool) -> nn.Module:
    """Return the model that an ONNX file stands for; the model itself if nothing is asked for.

    Args:
        model: In eval mode, on the CPU; not changed.
        config: What is asked for. The float16 of ``half`` is left to the file: this one computes as the model does.
        one_image: Whether the model takes a list of images, and the file a batch of one image.
    """
    if not config.outputs and not one_image and not is_half(model):
        return model
    return _FileModel(model, config.outputs, one_image=one_image)


def tolerance_of(model: nn.Module, config: OnnxConfig) -> float:
    """Return the difference from the model that a file may have, relative to the largest output."""
    return HALF_TOLERANCE if config.half or is_half(model) else PARITY_TOLERANCE


def computing_as_given(model: nn.Module) -> bool:
    """Return whether `file_model` gave the user's model itself."""
    return not isinstance(model, _FileModel)


def in_half(model: nn.Module) -> nn.Module:
    """Return a model that takes and returns float32, and computes in float16.

    Args:
        model: What `file_model` returned; changed in place.
    """
    outputs, one_image = (model.outputs, model.one_image) if isinstance(model, _FileModel) else ((), False)
    inner = model.model if isinstance(model, _FileModel) else model
    return _FileModel(inner.half(), outputs, one_image=one_image)


class _AllFoundError(Exception):
    """All outputs that a file returns were computed: what follows in the model is left out."""


class _FileModel(nn.Module):
    """Returns the outputs of some modules, as float32.

    What the model does after the last of these modules is not computed if the model takes a list of images: detectors
    choose boxes there in ways that no exporter can follow.
    """

    def __init__(self, model: nn.Module, outputs: tuple[str, ...], *, one_image: bool) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs
        self.one_image = one_image
        self.dtype = torch.float16 if is_half(model) else torch.float32

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        given = [tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in inputs]
        outputs = self._chosen(given) if self.outputs else self._call(given)
        tensors = flat_tensors(outputs)
        return [tensor.float() if tensor.dtype == torch.float16 else tensor for tensor in tensors]

    def _call(self, given: list[Tensor]) -> Any:
        return self.model([given[0][0]]) if self.one_image else self.model(*given)

    def _chosen(self, given: list[Tensor]) -> list[Any]:
        found: dict[str, Any] = {}

        def keep(name: str) -> Any:
            def hook(_module: nn.Module, _args: Any, out: Any) -> None:
                found[name] = out
                if self.one_image and len(found) == len(self.outputs):
                    raise _AllFoundError

            return hook

        hooks = [self.model.get_submodule(name).register_forward_hook(keep(name)) for name in self.outputs]
        try:
            self._call(given)
        except _AllFoundError:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        missing = [name for name in self.outputs if name not in found]
        if missing:
            raise ExportError(
                f"`outputs` must name modules that the model runs; it did not run {missing[0]}. Choose another one."
            )
        return [found[name] for name in self.outputs]

    def output_names(self, inputs: tuple[Tensor, ...]) -> list[str]:
        """Return the name of every output of the file: that of its module, numbered if it returns several tensors."""
        names: list[str] = []
        for name, out in zip(self.outputs, self._chosen([tensor.to(self.dtype) for tensor in inputs]), strict=True):
            count = len(flat_tensors(out))
            names += [name] if count == 1 else [f"{name}.{number}" for number in range(count)]
        return names


def names_of_outputs(model: nn.Module, inputs: tuple[Tensor, ...], count: int) -> list[str]:
    """Return the names that the outputs of a file have: those of chosen modules, else ``output``.

    Args:
        model: What `file_model` returned.
        inputs: Inputs to run it on once.
        count: The number of outputs.
    """
    if isinstance(model, _FileModel) and model.outputs:
        with torch.no_grad():
            return model.output_names(inputs)
    return ["output"] if count == 1 else [f"output_{number}" for number in range(count)]


def unrolled(model: nn.Module, image: Tensor) -> nn.Module:
    """Return the operations of a model that takes a list of images, for one image of this shape.

    torch.export follows modules and cannot leave the model in the middle, as a choice of outputs needs.

    Args:
        model: What `file_model` returned.
        image: (1, channels, height, width).

    Raises:
        ExportError: If the model cannot be followed.
    """
    try:
        with quiet(), torch.no_grad():
            return make_fx(model, tracing_mode="real", pre_dispatch=True)(torch.zeros_like(image))
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"`model` must be capturable for one image; got {first_line(error)} Choose outputs before what depends on "
            "values, such as the raw heads of a detector."
        ) from error


def compute_out_of_place_(program: ExportedProgram) -> None:
    """Replace operations that write to their input by those that return the result, where nothing else reads it.

    The exporter translates ``hardtanh`` (ReLU6), ``hardswish`` and others as they are, but takes their in-place forms
    apart, with free sizes in every step: a MobileNet took twice as long.
    """
    for node in program.graph.nodes:
        written = node.args[0] if node.op == "call_function" and node.args else None
        twin = _returning_form(node.target)
        if twin is not None and isinstance(written, torch.fx.Node) and len(written.users) == 1 and _is_new(written):
            node.target = twin
    program.graph_module.recompile()


def _returning_form(operation: Any) -> Any:
    """``aten.relu`` for ``aten.relu_``, with the same arguments; None for what is not in place."""
    if not isinstance(operation, OpOverload) or not operation.overloadpacket.__name__.endswith("_"):
        return None
    overloads: Any = getattr(torch.ops.aten, operation.overloadpacket.__name__.removesuffix("_"), None)
    twin: Any = getattr(overloads, str(operation).rsplit(".", maxsplit=1)[-1], None)
    if twin is None or operation.namespace != "aten":
        return None
    names = [[argument.name for argument in _schema_of(each).arguments] for each in (operation, twin)]
    return twin if names[0] == names[1] else None


def _is_new(node: torch.fx.Node) -> bool:
    """Whether the tensor shares no memory with any other. Dropout returns its input in evaluation mode."""
    if not isinstance(node.target, OpOverload) or "dropout" in str(node.target):
        return False
    schema = _schema_of(node.target)
    return not schema.is_mutable and all(each.alias_info is None for each in schema.returns)


def _schema_of(operation: Any) -> Any:
    return operation._schema
