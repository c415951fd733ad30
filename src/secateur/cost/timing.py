"""The clockwork of latency: passes timed in turns, and single layers of any width timed alone."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from secateur._runtime import Clock, no_garbage_collection

Pass = Callable[[], object]
"""One forward pass, finished when it returns."""

_MIN_TURN_S = 0.02
"""Seconds that a turn takes at least, by repeating short passes: far above the overhead of clock and call."""
_MAX_CALLS = 1000


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a measured quantity.

    Attributes:
        lower: First quartile.
        median: Second quartile.
        upper: Third quartile.
    """

    lower: float
    median: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        """Compute the quartiles of at least two values."""
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    @property
    def spread(self) -> float:
        """(upper - lower) / median, dimensionless; half of all values lie in that range."""
        return (self.upper - self.lower) / self.median


def time_in_turns(passes: Sequence[Pass], clock: Clock, rounds: int, warmup: int) -> list[tuple[float, ...]]:
    """Time passes in turns, so that whatever slows down the machine slows down all of them.

    The order is reversed from one round to the next.

    Args:
        passes: What to time.
        clock: What counts as time.
        rounds: Rounds to measure.
        warmup: Rounds that are run first and not counted.

    Returns:
        For each round the seconds per call of every pass.
    """
    calls = [_calls_per_turn(run, clock) for run in passes]
    found: list[tuple[float, ...]] = []
    forth = range(len(passes))
    with no_garbage_collection():
        for number in range(warmup + rounds):
            order = forth if number % 2 == 0 else reversed(forth)
            turn = {which: seconds_per_call(passes[which], calls[which], clock) for which in order}
            if number >= warmup:
                found.append(tuple(turn[which] for which in forth))
    return found


def seconds_per_call(run: Pass, calls: int, clock: Clock) -> float:
    """Return the mean seconds of some calls in a row."""
    begin = clock.read()
    for _ in range(calls):
        run()
    return (clock.read() - begin) / calls


def _calls_per_turn(run: Pass, clock: Clock) -> int:
    run()
    return min(_MAX_CALLS, max(1, round(_MIN_TURN_S / max(seconds_per_call(run, 3, clock), 1e-9))))


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ConvolutionShape:
    """A convolution with bias at given widths.

    Attributes:
        out: Output channels.
        read: Input channels of one group.
        groups: Number of groups; read * groups input channels.
        size: Size of the input without batch and channels.
        kernel: Size of the window; it, stride, padding and dilation have as many numbers as ``size``.
        stride: Stride of the window.
        padding: Padding on both sides.
        dilation: Dilation of the window.
    """

    out: int
    read: int
    groups: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    def module(self) -> nn.Module:
        """The layer, with random weights from a generator of its own."""
        kind = _CONVOLUTIONS[len(self.kernel) - 1]
        layer = kind(
            self.read * self.groups,
            self.out,
            self.kernel,  # pyright: ignore[reportArgumentType]
            self.stride,  # pyright: ignore[reportArgumentType]
            self.padding,  # pyright: ignore[reportArgumentType]
            self.dilation,  # pyright: ignore[reportArgumentType]
            self.groups,
            device="meta",
        )
        return _with_random_weights(layer)

    def example(self, batch: int) -> Tensor:
        """Return an input of random numbers."""
        return _noise(batch, self.read * self.groups, *self.size)


@dataclass(frozen=True)
class LinearShape:
    """A linear layer with bias at given widths.

    Attributes:
        out: Output features.
        read: Input features.
        rows: Number of vectors it is applied to for one sample, such as tokens.
    """

    out: int
    read: int
    rows: int

    def module(self) -> nn.Module:
        """The layer, with random weights from a generator of its own."""
        return _with_random_weights(nn.Linear(self.read, self.out, device="meta"))

    def example(self, batch: int) -> Tensor:
        """Return an input of random numbers: (batch, read) with one row for each sample, else (batch, rows, read)."""
        return _noise(batch, self.read) if self.rows == 1 else _noise(batch, self.rows, self.read)


LayerShape = ConvolutionShape | LinearShape


def shape_of(layer: nn.Module, macs: float) -> LayerShape | None:
    """Return the shape of a layer of a traced model at its full widths.

    Args:
        layer: Any module.
        macs: Multiply-accumulates of its one operation for one sample, which tell how often its weights are used.

    Returns:
        None if it is neither a convolution nor a linear layer. The input of a convolution is assumed to be square, with
        the smallest size that gives its outputs.
    """
    weight = cast(Tensor | None, getattr(layer, "weight", None))
    if weight is None or not weight.numel():
        return None
    uses = max(1, round(macs / weight.numel()))
    if isinstance(layer, nn.Linear):
        return LinearShape(layer.out_features, layer.in_features, uses)
    if not isinstance(layer, _CONVOLUTIONS):
        return None
    kernel, stride, dilation = (_numbers(getattr(layer, name)) for name in ("kernel_size", "stride", "dilation"))
    # timm's convolutions pad in their own forward and have zeros here; torch's padding may be a string.
    padding = tuple(0 for _ in kernel) if isinstance(layer.padding, str) else _numbers(layer.padding)
    side = max(1, round(uses ** (1 / len(kernel))))
    size = tuple(
        max((side - 1) * s + d * (k - 1) + 1 - 2 * p, 1)
        for k, s, p, d in zip(kernel, stride, padding, dilation, strict=True)
    )
    return ConvolutionShape(
        layer.out_channels,
        layer.in_channels // layer.groups,
        layer.groups,
        size,
        kernel,
        stride,
        padding,
        dilation,
    )


def macs_of(shape: LayerShape) -> float:
    """Return the multiply-accumulates for one sample."""
    if isinstance(shape, LinearShape):
        return float(shape.out * shape.read * shape.rows)
    parts = zip(shape.size, shape.kernel, shape.stride, shape.padding, shape.dilation, strict=True)
    places = math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in parts)
    return float(shape.out * shape.read * math.prod(shape.kernel) * places)


def _numbers(value: object) -> tuple[int, ...]:
    return tuple(int(each) for each in cast(tuple[int, ...], value))


def _with_random_weights(layer: nn.Module) -> nn.Module:
    layer = layer.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            # Small numbers, but not denormal ones, which would be slow.
            parameter.uniform_(-0.1, 0.1, generator=generator)
    return layer


def _noise(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) + 0.5


_TIMED_RUNS = 13
WARMUP_RUNS = 3
_MIN_SECONDS = 1e-3
KERNELS = ("Conv", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul")
"""Names of ONNX Runtime for the kernel of a layer; other nodes convert memory layouts around it."""


def typical(seconds: Sequence[float]) -> float:
    """Return the mean of the lower half without its lowest value, in seconds.

    Other work of the machine can only add time, so the upper half says more about that than about the layer. The mean
    of several is finer than the clock of a profile, which counts microseconds.
    """
    ordered = sorted(seconds)
    return statistics.fmean(ordered[1 : max(2, (len(ordered) + 1) // 2)] if len(ordered) > 1 else ordered)


def call_seconds(run: Callable[[], object], clock: Clock) -> float:
    """Time a pass, called often enough in a row for the clock."""
    run()
    began = clock.read()
    run()
    calls = max(1, round(_MIN_SECONDS / max(clock.read() - began, 1e-7)))
    found: list[float] = []
    for _ in range(_TIMED_RUNS):
        began = clock.read()
        for _ in range(calls):
            run()
        found.append((clock.read() - began) / calls)
    return typical(found)


def kernel_seconds(session: Any, shape: LayerShape, batch: int) -> float:
    """Time the kernel of a one-layer session that was opened with a profile."""
    fed = {session.get_inputs()[0].name: shape.example(batch).numpy()}
    for _ in range(WARMUP_RUNS + _TIMED_RUNS):
        session.run(None, fed)
    return profiled(json.loads(Path(session.end_profiling()).read_text()))


def profiled(events: object) -> float:
    """Sum the seconds of the kernels in a profile of ONNX Runtime of one layer; the first runs are left out."""
    by_node: dict[str, list[float]] = {}
    for event in cast(list[dict[str, Any]], events):
        name, operator = str(event.get("name", "")), event.get("args", {}).get("op_name")
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and operator in KERNELS:
            by_node.setdefault(name, []).append(1e-6 * float(event["dur"]))
    return sum(typical(seconds[WARMUP_RUNS:] or seconds) for seconds in by_node.values())


def onnx_of(shape: LayerShape, batch: int) -> bytes:
    """Write one layer as the content of an ONNX file, without an exporter, which would take seconds for each."""
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
