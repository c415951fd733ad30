"""One layer alone on a target."""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from secateur.latency._clock import Clock
from secateur.latency._layers import ConvolutionShape, LayerShape

_RUNS = 13
_WARM = 3
_LEAST_S = 1e-3
_KERNELS = ("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul")
"""Names that ONNX Runtime gives to the kernel of a layer; other nodes convert layouts around it."""


def typical(seconds: Sequence[float]) -> float:
    """The mean of the lower half without its lowest value, in seconds.

    Whatever else the machine does can only add time, so the upper half says more of that than of the layer; the mean
    of several is finer than the clock of a profile, which counts microseconds.
    """
    ordered = sorted(seconds)
    return statistics.fmean(ordered[1 : max(2, (len(ordered) + 1) // 2)] if len(ordered) > 1 else ordered)


def call_seconds(run: Callable[[], object], clock: Clock) -> float:
    """Seconds of a pass, called often enough in a row for the clock."""
    run()
    began = clock.read()
    run()
    calls = max(1, round(_LEAST_S / max(clock.read() - began, 1e-7)))
    found: list[float] = []
    for _ in range(_RUNS):
        began = clock.read()
        for _ in range(calls):
            run()
        found.append((clock.read() - began) / calls)
    return typical(found)


def kernel_seconds(session: Any, shape: LayerShape, batch: int) -> float:
    """Seconds of the kernel of a one-layer session that was opened with a profile."""
    fed = {session.get_inputs()[0].name: shape.example(batch).numpy()}
    for _ in range(_WARM + _RUNS):
        session.run(None, fed)
    return profiled(json.loads(Path(session.end_profiling()).read_text()))


def profiled(events: object) -> float:
    """Seconds of the layer's kernels in a profile of ONNX Runtime with one layer; the first runs are left out."""
    by_node: dict[str, list[float]] = {}
    for event in cast(list[dict[str, Any]], events):
        name, operator = str(event.get("name", "")), event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and operator in _KERNELS:
            by_node.setdefault(name, []).append(1e-6 * float(event["dur"]))
    return sum(typical(seconds[_WARM:] or seconds) for seconds in by_node.values())


def onnx_of(shape: LayerShape, batch: int) -> bytes:
    """One layer as the content of an ONNX file, written without an exporter, which would take seconds for each."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    module, example = shape.module(), shape.example(batch).numpy()
    weight, bias = (_array(module, name) for name in ("weight", "bias"))
    if isinstance(shape, ConvolutionShape):
        nodes = [
            helper.make_node(
                "Conv",
                ["x", "weight", "bias"],
                ["y"],
                kernel_shape=shape.kernel,
                strides=shape.stride,
                pads=(*shape.padding, *shape.padding),
                dilations=shape.dilation,
                group=shape.groups,
            )
        ]
    elif example.ndim == 2:
        nodes = [helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], transB=1)]
    else:
        weight = np.ascontiguousarray(weight.T)
        nodes = [helper.make_node("MatMul", ["x", "weight"], ["p"]), helper.make_node("Add", ["p", "bias"], ["y"])]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *example.shape[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *[None] * (example.ndim - 1)])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _array(module: nn.Module, name: str) -> "np.ndarray[Any, np.dtype[np.float32]]":
    return module.get_parameter(name).detach().numpy()
