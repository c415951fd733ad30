"""ONNX content of many cuts of one model without exporting each: an exporter takes seconds, and a search makes dozens.

Cuts of a model that lack the same blocks have the same operations and differ in the shapes of their weights. One of
them is exported; for the others its weights are exchanged. Their values are drawn anew, as time does not depend on
them: real ones that belong to other normalizations could make activations overflow or denormal, which is slow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur._runtime import copy_model
from secateur.export._common import InputTensors, flat_tensors
from secateur.export.onnx import onnx_bytes, open_session, session_runner

_TOLERANCE = 1e-2
"""Largest difference of outputs, relative to the largest one: a wrong constant changes far more."""
_FOLDED = "_bias"
"""What the exporter adds to the name of a weight for the bias of a batch norm that it folds into it."""
_MOST_BYTES = 2**28
"""Larger models are exported each: copies of their weights would fill the memory."""

_RECENT = 4
"""Files that are kept as they are."""
_TEMPLATES = 4
"""Templates of one structure: trying one takes milliseconds, an export takes seconds."""

Structure = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class _Template:
    """An exported model whose weights can be exchanged.

    Attributes:
        content: The exported file.
        transposed: Names of parameters by the names of the initializers that hold them transposed.
    """

    content: bytes
    transposed: Mapping[str, str]


@dataclass(eq=False)
class OnnxTemplates:
    """The exported files of one search, by the structure of the models."""

    _known: dict[Structure, list[_Template]] = field(default_factory=dict[Structure, list[_Template]])
    _recent: dict[Structure, bytes] = field(default_factory=dict[Structure, bytes])

    def content(self, model: nn.Module, inputs: InputTensors) -> bytes:
        """Return the content of an ONNX file that takes the time of a model.

        Its weights are random. Its outputs are compared with those of the model with the same random weights; where
        they differ from those of every template, the model itself is exported and becomes one more template: constants
        that are no weights can be the same in the next cut.

        Args:
            model: In eval mode, on the CPU; not changed.
            inputs: One batch.

        Raises:
            ExportError: If the model cannot be exported.
        """
        if sum(tensor.numel() * tensor.element_size() for tensor in model.parameters()) > _MOST_BYTES:
            return onnx_bytes(model, inputs)
        structure = _structure(model, inputs)
        same = (structure, tuple(tensor.shape for tensor in model.parameters()))
        # The original is measured again with every cut.
        content = self._recent.pop(same, None)
        if content is None:
            content = self._made(structure, drawn_copy(model), inputs)
        self._recent[same] = content
        while len(self._recent) > _RECENT:
            self._recent.pop(next(iter(self._recent)))
        return content

    def _made(self, structure: Structure, drawn: nn.Module, inputs: InputTensors) -> bytes:
        templates = self._known.setdefault(structure, [])
        paddings = _paddings(drawn, inputs) if templates else []
        for template in templates:
            content = _exchanged(template, drawn, len(inputs[0]), paddings)
            if _agrees(content, drawn, inputs):
                return content
        content = onnx_bytes(drawn, inputs)
        if len(templates) < _TEMPLATES:
            templates.append(_Template(content, _transposed(content, drawn)))
        return content


def drawn_copy(model: nn.Module) -> nn.Module:
    """Return a copy with random weights that keep activations near 1, and with batch norms that change nothing.

    Weights of two dimensions or more have the deviation sqrt(2 / inputs) (He et al., arXiv:1502.01852); biases are
    0, all other vectors 1. A batch norm's variance is 1 - eps: the exporter folds it into the weights before it, which
    are exchanged, so that its factor must be exactly 1.
    """
    drawn, generator = copy_model(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in drawn.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim >= 2:
                deviation = (2 * len(parameter) / max(parameter.numel(), 1)) ** 0.5
                parameter.copy_(deviation * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        for module in drawn.modules():
            mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if isinstance(mean, Tensor) and isinstance(variance, Tensor):
                mean.zero_()
                variance.fill_(1.0 - float(getattr(module, "eps", 0.0)))
    return drawn


def _structure(model: nn.Module, inputs: InputTensors) -> Structure:
    modules = tuple((name, type(module)) for name, module in model.named_modules())
    tensors = tuple((name, tensor.ndim) for name, tensor in model.named_parameters())
    return modules, tensors, tuple((tuple(each.shape), each.dtype) for each in inputs)


def _transposed(content: bytes, model: nn.Module) -> dict[str, str]:
    """Find the initializers that hold a parameter of two dimensions transposed, as those of linear layers do."""
    from onnx import numpy_helper

    tensors = _tensors(model)
    known = {_digest(array.T): name for name, array in tensors.items() if array.ndim == 2}
    held = [each for each in _parsed(content).graph.initializer if each.name not in tensors and len(each.dims) == 2]
    found = {each.name: known.get(_digest(numpy_helper.to_array(each))) for each in held}
    return {name: source for name, source in found.items() if source is not None}


class _Paddings(TorchDispatchMode):
    """Writes down how tensors are padded with a constant: shortcuts may add as many channels as a cut lacks.

    Attributes:
        found: Numbers of elements before and after every axis, the first axis first, as ONNX has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.constant_pad_nd.default:
            tensor, sides = args[:2]
            # Torch lists the last axis first, and leaves out the axes before those that are padded.
            axes = [(0, 0)] * (tensor.ndim - len(sides) // 2) + list(zip(sides[::2], sides[1::2], strict=True))[::-1]
            self.found.append((*(before for before, _ in axes), *(after for _, after in axes)))
        return func(*args, **(kwargs or {}))


def _paddings(model: nn.Module, inputs: InputTensors) -> list[tuple[int, ...]]:
    with torch.no_grad(), _Paddings() as seen:
        model(*inputs)
    return seen.found


def _exchanged(template: _Template, model: nn.Module, batch: int, paddings: Sequence[tuple[int, ...]]) -> bytes:
    """Return the content of a template with the weights and paddings of another model of its structure."""
    from onnx import numpy_helper

    proto, tensors = _parsed(template.content), _tensors(model)
    flattening = {node.input[1] for node in proto.graph.node if node.op_type == "Reshape"}
    for held in proto.graph.initializer:
        weight = held.name.removesuffix(_FOLDED)
        if held.name in tensors:
            array = tensors[held.name]
        elif held.name in template.transposed:
            array = tensors[template.transposed[held.name]].T
        elif weight != held.name and weight in tensors:
            array = np.zeros(len(tensors[weight]), dtype=tensors[weight].dtype)
        elif held.name in flattening and numpy_helper.to_array(held).tolist()[:1] == [-1] and list(held.dims) == [2]:
            array = np.array([batch, -1])  # As many features as there are.
        else:
            continue  # Another constant.
        held.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), held.name))
    modules = dict(model.named_modules())
    for node in proto.graph.node:
        layer = modules.get(node.input[1].rpartition(".")[0]) if len(node.input) > 1 else None
        groups = getattr(layer, "groups", None)
        for attribute in node.attribute if isinstance(groups, int) else ():
            if attribute.name == "group":
                attribute.i = groups  # Depthwise convolutions have one for each channel.
    padded = [node for node in proto.graph.node if node.op_type == "Pad"]
    if len(padded) == len(paddings):
        # Equal ones share a constant in the template, and may differ here.
        for place, (node, sides) in enumerate(zip(padded, paddings, strict=True)):
            node.input[1] = f"padding_{place}"
            proto.graph.initializer.append(numpy_helper.from_array(np.array(sides, dtype=np.int64), node.input[1]))
    del proto.graph.value_info[:]  # Shapes of the model that was exported.
    return proto.SerializeToString()


def _agrees(content: bytes, model: nn.Module, inputs: InputTensors) -> bool:
    """Whether a file computes what a model computes: then all of its constants are those of the model."""
    try:
        found = session_runner(open_session(content, threads=1))(inputs)
    except Exception:  # Shapes that do not fit raise errors of many kinds.
        return False
    with torch.no_grad():
        wanted = flat_tensors(model(*inputs))
    if [each.shape for each in found] != [each.shape for each in wanted]:
        return False
    return all(
        bool(((one - other).abs().amax() <= _TOLERANCE * other.abs().amax()).item())
        for one, other in zip(found, wanted, strict=True)
        if other.is_floating_point() and other.numel()
    )


def _parsed(content: bytes) -> Any:
    import onnx

    return onnx.load_from_string(content)


def _tensors(model: nn.Module) -> dict[str, "np.ndarray[Any, Any]"]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().numpy() for name, tensor in tensors if tensor.is_floating_point()}


def _digest(array: "np.ndarray[Any, Any]") -> tuple[tuple[int, ...], bytes]:
    return array.shape, np.ascontiguousarray(array).tobytes()
