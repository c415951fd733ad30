"""Where the time of an ONNX file goes, module by module, from ONNX Runtime's profile of its operations.

The runtime fuses operations, renames them, and moves weights into layouts of its own. It says what it made of a file
by writing the file as it runs it: an operation there belongs to the module whose weight it reads.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur._files import temporary_folder
from secateur.cost.timing import KERNELS, WARMUP_RUNS, typical
from secateur.export._common import InputTensors
from secateur.export.onnx import feed, open_session

_RUNS = WARMUP_RUNS + 20
_PROFILE_ROOM = 2**24
"""Bytes among the temporary files for the profile of one file."""
_LARGEST_FILE = 500_000_000
"""Bytes; a larger file would take longer to write and to read again than the few seconds that this may take."""
_LAID_OUT = "_nchwc"
"""How ONNX Runtime ends the name of a convolution or pooling in its own layout; before it stands a value's name."""


@dataclass(frozen=True)
class ModuleSeconds:
    """The time of one pass, module by module.

    Attributes:
        modules: Seconds by qualified name; "" is the model itself.
        other: Seconds of what reads no weights: activations, sums, products of activations, changes of layout.
    """

    modules: Mapping[str, float] = field(default_factory=dict[str, float])
    other: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all, in seconds."""
        return math.fsum((*self.modules.values(), self.other))


def module_seconds(
    files: Sequence[tuple[nn.Module, bytes]], inputs: InputTensors, *, threads: int, patience_s: float = 3.0
) -> list[ModuleSeconds] | None:
    """Profile ONNX files that take turns, on the CPU.

    A profile measures every operation by itself, in elapsed time, which costs time of its own: the sum is somewhat
    above the time of a pass. The time of an operation is the mean of its lower half of runs, see `typical`.

    Args:
        files: Each model with the content of its ONNX file. Names of the file's weights are those of the model.
        inputs: One batch.
        threads: Of the sessions.
        patience_s: Seconds after which no further run begins, once there were two of each file.

    Returns:
        One for each file, or None if one is above 500 MB.

    Raises:
        ArtifactError: If there is no room for temporary files.
        Exception: Whatever ONNX Runtime raises for a file that it cannot run.
    """
    if max(len(content) for _, content in files) > _LARGEST_FILE:
        return None
    room = sum(len(content) + _PROFILE_ROOM for _, content in files)
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder("secateur-profile-", room=room))
        opened: list[tuple[Any, Path]] = []
        for number, (_, content) in enumerate(files):
            written = folder / f"{number}.onnx"
            profile = folder / f"profile{number}"
            opened.append((open_session(content, threads=threads, profile=profile, optimized=written), written))
        fed = [feed(session, inputs) for session, _ in opened]
        began = time.monotonic()
        for run in range(_RUNS):
            for (session, _), given in zip(opened, fed, strict=True):
                session.run(None, given)
            if run and time.monotonic() - began > patience_s:
                break
        found: list[ModuleSeconds] = []
        for (session, written), (model, content) in zip(opened, files, strict=True):
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
            found.append(_by_module(_seconds_of_nodes(events), owners_of_nodes(model, content, written)))
    return found


def _seconds_of_nodes(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    runs: dict[str, list[float]] = {}
    for event in events:
        name = str(event.get("name", ""))
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            runs.setdefault(name.removesuffix("_kernel_time"), []).append(1e-6 * float(event["dur"]))
    return {name: typical(seconds[WARMUP_RUNS:] or seconds) for name, seconds in runs.items()}


def _by_module(seconds: Mapping[str, float], owners: Mapping[str, str]) -> ModuleSeconds:
    modules, other = dict[str, float](), 0.0
    for node, spent in seconds.items():
        if node in owners:
            modules[owners[node]] = modules.get(owners[node], 0.0) + spent
        else:
            other += spent
    return ModuleSeconds(modules, other)


def owners_of_nodes(model: nn.Module, content: bytes, optimized: Path) -> dict[str, str]:
    """Return the module of each operation that reads weights, by the names in the optimized file.

    Args:
        model: Whose weights are in the file.
        content: The file as it was exported.
        optimized: The file as the runtime wrote it.
    """
    import onnx

    given, made = onnx.load_from_string(content).graph, onnx.load(optimized).graph
    weights = _owners_of_weights(model, given)
    owners = {node.name: owner for node in given.node if (owner := _owner(node, weights)) is not None}
    producers = {value: node for node in given.node for value in node.output}
    found: dict[str, str] = {}
    for node in made.node:
        owner = _owner(node, weights)
        if owner is None:
            owner = owners.get(node.name)
        if owner is None and node.name.endswith(_LAID_OUT) and node.op_type in KERNELS:
            kernel = _kernel_before(producers, node.name.removesuffix(_LAID_OUT), node.op_type)
            owner = None if kernel is None else owners.get(kernel.name)
        if owner is not None:
            found[node.name] = owner
    return found


def _owner(node: Any, weights: Mapping[str, str]) -> str | None:
    return next((weights[name] for name in node.input if name in weights), None)


def _kernel_before(producers: Mapping[str, Any], value: str, kind: str) -> Any:
    """The last operation of a kind on the way to a value: what follows it was fused into it."""
    wanted = kind.removeprefix("Fused")
    while (node := producers.get(value)) is not None and node.op_type != wanted:
        # A sum is fused into the convolution that it comes after, which either side may be.
        inputs = [name for name in node.input if name in producers]
        value = next((name for name in inputs if producers[name].op_type == wanted), inputs[0] if inputs else "")
    return node


def _owners_of_weights(model: nn.Module, graph: Any) -> dict[str, str]:
    """The module of each initializer that says one, and of each value that is computed from initializers alone.

    The exporter writes equal tensors, such as biases of zeros, once for all: a vector that several operations read
    says nothing. A matrix that it transposed has lost its name, and is found by its values.
    """
    from onnx import numpy_helper

    known = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    readers: dict[str, int] = {}
    for name in (name for node in graph.node for name in node.input):
        readers[name] = readers.get(name, 0) + 1
    owners: dict[str, str] = {}
    for tensor in graph.initializer:
        if len(tensor.dims) < 2 and readers.get(tensor.name, 0) > 1:
            continue
        name = tensor.name if tensor.name in known else None
        if name is None and len(tensor.dims) == 2:
            name = next(_equal_to(numpy_helper.to_array(tensor), known), None)
        if name is not None:
            owners[tensor.name] = name.rpartition(".")[0]
    constant = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.input and all(name in constant or not name for name in node.input):
            constant.update(node.output)
            if (owner := _owner(node, owners)) is not None:
                owners.update(dict.fromkeys(node.output, owner))
    return owners


def _equal_to(array: "np.ndarray[Any, Any]", known: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the names of matrices with these values, as they are or transposed."""
    for name, tensor in known.items():
        if tensor.ndim != 2 or sorted(tensor.shape) != sorted(array.shape):
            continue
        for each in (tensor.T, tensor):
            if each.shape != array.shape:
                continue
            # One row first: nearly all candidates are other layers of the same shape.
            if np.array_equal(each[0].cpu().numpy(), array[0]) and np.array_equal(each.cpu().numpy(), array):
                yield name
