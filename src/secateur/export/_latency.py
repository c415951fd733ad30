"""How long one forward pass takes, before and after, measured side by side."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from secateur.artifact import this_machine
from secateur.errors import ExportError
from secateur.export._onnx import feed, onnx_bytes, open_session
from secateur.export._parity import Inputs
from secateur.export._program import eval_copy

_LEAST_TURN_S = 0.02
"""A turn repeats short passes until it takes at least this long, far above the clock's and the call's overhead."""
_MOST_CALLS = 1000


@dataclass(frozen=True)
class Clock:
    """Seconds from some fixed moment, and what they count."""

    name: str
    read: Callable[[], float]


ELAPSED = Clock("elapsed time", time.perf_counter)
# Windows counts a thread's processor time in steps of 16 ms. Both runtimes do all work on the calling thread.
ONE_THREAD = ELAPSED if os.name == "nt" else Clock("processor time", time.thread_time)


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a measured quantity.

    Attributes:
        lower: First quartile.
        median: The middle.
        upper: Third quartile.
    """

    lower: float
    median: float
    upper: float


@dataclass(frozen=True)
class LatencyRecord:
    """Seconds per forward pass of the original and the compressed model in one runtime.

    Attributes:
        runtime: ``onnxruntime`` or ``torch``, with its version.
        batch_size: Samples per pass.
        threads: Threads the runtime was given.
        rounds: Pairs of turns that were measured, after warm-up.
        clock: ``processor time`` with one thread, else ``elapsed time``. One thread's processor time is the elapsed
            time on an idle machine, without the time that other programs had the processor: beside eight busy programs
            on two cores, elapsed times of single passes gave a speedup of 6.5 where 2.4 was right.
        before: Seconds per pass of the original.
        after: Seconds per pass of the compressed model.
        speedup: Original time / compressed time of each pair (above 1: faster now). Its median is *the* number: both
            turns of a pair ran one after the other, so drift of the machine's clock cancels.
        machine: What it ran on, in words.
    """

    runtime: str
    batch_size: int
    threads: int
    rounds: int
    clock: str
    before: Quartiles
    after: Quartiles
    speedup: Quartiles
    machine: Mapping[str, str] = field(default_factory=this_machine)

    def to_json(self) -> dict[str, object]:
        """A JSON object."""
        return {**asdict(self), "machine": dict(self.machine)}


def measure_latency(
    original: nn.Module,
    compressed: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    threads: int = 1,
    rounds: int = 30,
    warmup: int = 5,
) -> tuple[LatencyRecord, LatencyRecord]:
    """Measure two models with ONNX Runtime and with PyTorch on the CPU, taking turns.

    Args:
        original: Any device or mode; not changed.
        compressed: The same.
        example: One batch, as it will be used; its batch size is measured.
        threads: Threads of each runtime; decides the clock, see `LatencyRecord`. PyTorch's setting is put back.
        rounds: Pairs of turns to measure, at least 3.
        warmup: Pairs of turns that are run first and not counted.

    Returns:
        The record of ONNX Runtime, and that of PyTorch.

    Raises:
        ExportError: If an argument cannot be used or a model cannot be exported.
    """
    inputs = tuple(t.detach().cpu() for t in (example if isinstance(example, tuple) else (example,)))
    if rounds < 3 or warmup < 0 or threads < 1:
        raise ExportError(
            "`rounds` must be at least 3, `threads` at least 1 and `warmup` at least 0; got "
            f"rounds={rounds}, threads={threads}, warmup={warmup}. The defaults (30, 1, 5) suit most models."
        )
    models = eval_copy(original), eval_copy(compressed)
    sessions = [_session_pass(model, inputs, threads) for model in models]
    clock = ONE_THREAD if threads == 1 else ELAPSED
    seconds = _take_turns(sessions, clock, rounds, warmup)
    by_onnx = _record(_runtime("onnxruntime"), inputs, threads, clock, seconds)
    with _torch_threads(threads), torch.inference_mode():
        seconds = _take_turns([_eager_pass(model, inputs) for model in models], clock, rounds, warmup)
    return by_onnx, _record(_runtime("torch"), inputs, threads, clock, seconds)


def _session_pass(model: nn.Module, inputs: Inputs, threads: int) -> Callable[[], object]:
    session = open_session(onnx_bytes(model, inputs), threads=threads)
    fed = feed(session, inputs)
    return lambda: session.run(None, fed)


def _eager_pass(model: nn.Module, inputs: Inputs) -> Callable[[], object]:
    return lambda: model(*inputs)


def _take_turns(
    passes: Sequence[Callable[[], object]], clock: Clock, rounds: int, warmup: int
) -> list[tuple[float, float]]:
    """Seconds per pass of (first, second) in each round; who goes first changes from round to round."""
    calls = [_calls_per_turn(run, clock) for run in passes]
    found: list[tuple[float, float]] = []
    with _no_garbage_collection():
        for number in range(warmup + rounds):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            turn = {which: _seconds(passes[which], calls[which], clock) for which in order}
            if number >= warmup:
                found.append((turn[0], turn[1]))
    return found


def _seconds(run: Callable[[], object], calls: int, clock: Clock) -> float:
    begin = clock.read()
    for _ in range(calls):
        run()
    return (clock.read() - begin) / calls


def _calls_per_turn(run: Callable[[], object], clock: Clock) -> int:
    run()
    return min(_MOST_CALLS, max(1, round(_LEAST_TURN_S / max(_seconds(run, 3, clock), 1e-9))))


def _record(
    runtime: str, inputs: Inputs, threads: int, clock: Clock, seconds: Sequence[tuple[float, float]]
) -> LatencyRecord:
    return LatencyRecord(
        runtime=runtime,
        batch_size=inputs[0].shape[0],
        threads=threads,
        rounds=len(seconds),
        clock=clock.name,
        before=_quartiles([before for before, _ in seconds]),
        after=_quartiles([after for _, after in seconds]),
        speedup=_quartiles([before / after for before, after in seconds]),
    )


def _quartiles(values: Sequence[float]) -> Quartiles:
    return Quartiles(*statistics.quantiles(values, n=4, method="inclusive"))


def _runtime(package: str) -> str:
    import importlib.metadata

    return f"{package} {importlib.metadata.version(package)}"


@contextmanager
def _torch_threads(threads: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Generator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
