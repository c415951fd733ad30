"""Measure the latency of models: one, several in turns, or two as pairs; and a cache of measurements on disk."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur._caller_state import in_default_state
from secateur._files import write_atomic
from secateur._provenance import sha256_of_json, this_machine
from secateur._runtime import load_average
from secateur.cost.denormals import without_denormals
from secateur.cost.runtimes import OnnxRuntime, Target, TorchEager
from secateur.cost.timing import Pass, Quartiles, time_in_turns
from secateur.errors import ExportError
from secateur.export._common import InputTensors

_FORMAT = 1


def cache_folder() -> Path:
    """Return the folder of measurements: ``$XDG_CACHE_HOME/secateur/latency``, by default in ``~/.cache``.

    Users without a home folder, as in containers, get a path at which nothing can be written: nothing is kept.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        place = Path(home) if home else Path.home() / ".cache"
    except RuntimeError:
        place = Path(os.devnull)
    return place / "secateur" / "latency"


@dataclass(eq=False)
class LatencyCache:
    """Seconds by what was measured, for one machine and one target, in one JSON file.

    The name of the file depends on the processor, the system, the runtime with its version, threads and batch size, so
    measurements from elsewhere are never used. It is written atomically, together with what other processes have
    written meanwhile. A file that cannot be read or written is ignored: measuring again costs only time.

    Attributes:
        path: The file.
        seconds: By what was measured, as text.
        asked: What was asked for, in order: the measurements that a result depends on.
    """

    path: Path
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    _about: dict[str, object] = field(default_factory=dict[str, object])
    asked: dict[str, None] = field(default_factory=dict[str, None], init=False)

    @classmethod
    def of(cls, target: Target, folder: Path | None = None) -> "LatencyCache":
        """Return the cache of a target on this machine.

        Args:
            target: The target of the measurements.
            folder: None means `cache_folder`.
        """
        about: dict[str, object] = {"target": target.key, "machine": this_machine()}
        name = sha256_of_json(about)[:16]
        path = (folder or cache_folder()) / f"{name}.json"
        return cls(path, _read(path), about)

    def get(self, what: str, measured: Callable[[], float]) -> float:
        """Return the seconds of something; measure them if they are not known. Nothing is written yet."""
        if what not in self.seconds:
            self.seconds[what] = measured()
        return self.known(what)

    def known(self, what: str) -> float:
        """Return known seconds."""
        self.asked[what] = None
        return self.seconds[what]

    def write(self) -> None:
        """Write the file: what is known, and what other processes have written."""
        self.seconds = {**_read(self.path), **self.seconds}
        content = {"format": _FORMAT, **self._about, "seconds": dict(sorted(self.seconds.items()))}
        with contextlib.suppress(OSError):
            write_atomic(self.path, json.dumps(content, indent=0))


def _read(path: Path) -> dict[str, float]:
    try:
        found = cast(dict[str, Any], json.loads(path.read_text()))
        if found["format"] != _FORMAT:
            return {}
        seconds = {str(what): float(value) for what, value in found["seconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return {what: value for what, value in seconds.items() if 0 < value < math.inf}


@dataclass(frozen=True)
class Latency:
    """Seconds per forward pass of one model on one target.

    Attributes:
        seconds: Median and quartiles over the rounds.
        runtime: Name and version of the runtime, and the device.
        batch_size: Samples per pass.
        threads: Threads on the CPU.
        rounds: Rounds that were measured, after warm-up.
        clock: ``processor time`` with one thread on the CPU, else ``elapsed time``. One thread's processor time is the
            elapsed time on an idle machine, without the time that other programs had the processor: beside eight busy
            programs on two cores, elapsed times of single passes gave a speedup of 6.5 where 2.4 was right.
        load: Average number of running programs, this one included, in the minute before and the minute after; None
            where the system does not say.
        machine: What it ran on, as text.
    """

    seconds: Quartiles
    runtime: str
    batch_size: int
    threads: int
    rounds: int
    clock: str
    load: tuple[float, float] | None = None
    machine: Mapping[str, str] = field(default_factory=this_machine)

    def to_json(self) -> dict[str, object]:
        """Return a JSON object."""
        return {**asdict(self), "machine": dict(self.machine), "load": None if self.load is None else list(self.load)}


@dataclass(frozen=True)
class LatencyRecord:
    """Seconds per forward pass of the original and the compressed model in one runtime.

    Attributes:
        runtime: ``onnxruntime`` or ``torch``, with its version.
        batch_size: Samples per pass.
        threads: Threads the runtime was given.
        rounds: Pairs that were measured, after warm-up.
        clock: See `Latency`.
        before: Seconds per pass of the original.
        after: Seconds per pass of the compressed model.
        speedup: Original time / compressed time of each pair (above 1: faster now). Its median is the number
            to quote: both passes of a pair ran one after the other, so drift of the machine's speed cancels.
        load: See `Latency`.
        machine: What it ran on, as text.
    """

    runtime: str
    batch_size: int
    threads: int
    rounds: int
    clock: str
    before: Quartiles
    after: Quartiles
    speedup: Quartiles
    load: tuple[float, float] | None = None
    machine: Mapping[str, str] = field(default_factory=this_machine)

    def to_json(self) -> dict[str, object]:
        """Return a JSON object."""
        return {**asdict(self), "machine": dict(self.machine), "load": None if self.load is None else list(self.load)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "LatencyRecord":
        """Read what `to_json` wrote."""
        fields = dict(data)
        fields |= {name: Quartiles(**data[name]) for name in ("before", "after", "speedup")}
        fields["load"] = None if data["load"] is None else (float(data["load"][0]), float(data["load"][1]))
        return cls(**fields)


@in_default_state
def measure(
    model: nn.Module, target: Target, shape: Sequence[int] | Tensor | InputTensors, *, rounds: int = 30, warmup: int = 5
) -> Latency:
    """Measure one model.

    Args:
        model: Any device or mode; not changed.
        target: Runtime, threads and batch size.
        shape: Of one input without the batch, such as (3, 224, 224), for seeded noise; or real samples, which are
            repeated to ``target.batch`` of them.
        rounds: Rounds to measure, at least 3; each repeats short passes until it takes 20 ms.
        warmup: Rounds that are run first and not counted.

    Raises:
        ExportError: If an argument cannot be used or the model cannot be brought to the target.
    """
    return measure_all([model], target, shape, rounds=rounds, warmup=warmup)[0]


def measure_all(
    models: Sequence[nn.Module],
    target: Target,
    shape: Sequence[int] | Tensor | InputTensors,
    *,
    rounds: int = 30,
    warmup: int = 5,
) -> list[Latency]:
    """Measure several models that take turns, so that they are compared under the same conditions; see `measure`."""
    return measure_each([(model, shape) for model in models], target, rounds=rounds, warmup=warmup)


def measure_each(
    models: Sequence[tuple[nn.Module, Sequence[int] | Tensor | InputTensors]],
    target: Target,
    *,
    rounds: int = 30,
    warmup: int = 5,
) -> list[Latency]:
    """Measure several models with inputs of their own, given as (model, shape) pairs; see `measure_all`."""
    prepared = [(model, inputs_for(target, shape)) for model, shape in models]
    found, load = _rounds(prepared, target, rounds, warmup)
    return [
        Latency(
            Quartiles.of(seconds), target.runtime, target.batch, target.threads, rounds, target.clock.name, load=load
        )
        for seconds in zip(*found, strict=True)
    ]


@in_default_state
def measure_pairs(
    before: nn.Module,
    after: nn.Module,
    target: Target,
    shape: Sequence[int] | Tensor | InputTensors,
    *,
    rounds: int = 30,
    warmup: int = 5,
) -> LatencyRecord:
    """Measure two models in alternating pairs, A B, B A, A B...; see `measure` for the arguments.

    The first model is measured without its denormal numbers: what a cut gains by removing them is not its merit.
    """
    return measure_against(before, [after], target, shape, rounds=rounds, warmup=warmup)[0]


@in_default_state
def measure_against(
    before: nn.Module,
    after: Sequence[nn.Module],
    target: Target,
    shape: Sequence[int] | Tensor | InputTensors,
    *,
    rounds: int = 30,
    warmup: int = 5,
) -> list[LatencyRecord]:
    """Measure several models that take turns with one other; the record of each is that of a pair, see `measure_pairs`.

    Args:
        before: The model that all others are compared with; measured without its denormal numbers.
        after: The others, at least one.
        target: See `measure`.
        shape: See `measure`.
        rounds: See `measure`.
        warmup: See `measure`.

    Raises:
        ExportError: If an argument cannot be used or a model cannot be brought to the target.
    """
    inputs = inputs_for(target, shape)
    models = [(without_denormals(before), inputs), *((model, inputs) for model in after)]
    found, load = _rounds(models, target, rounds, warmup)
    return [_record(target, [(turn[0], turn[place]) for turn in found], load) for place in range(1, len(models))]


def measure_files(
    before: Path | bytes,
    after: Path | bytes,
    target: OnnxRuntime,
    example: Tensor | InputTensors,
    *,
    rounds: int = 30,
    warmup: int = 5,
) -> LatencyRecord:
    """Measure two ONNX files (or their content) in alternating pairs, such as a float one and its int8 one.

    Args:
        before: One file.
        after: The other, of the same inputs.
        target: Threads and batch size.
        example: Real samples, repeated to ``target.batch`` of them.
        rounds: See `measure`.
        warmup: See `measure`.

    Raises:
        ExportError: If an argument cannot be used.
    """
    _check(rounds, warmup, target.threads)
    inputs = inputs_for(target, example)
    passes = [target.opened_file(each, inputs) for each in (before, after)]
    return _record(target, *_timed(passes, target, rounds, warmup))


@in_default_state
def measure_latency(
    original: nn.Module,
    compressed: nn.Module,
    example: Tensor | InputTensors,
    *,
    threads: int = 1,
    rounds: int = 30,
    warmup: int = 5,
) -> tuple[LatencyRecord, LatencyRecord]:
    """Measure two models with ONNX Runtime and with PyTorch on the CPU, taking turns.

    Args:
        original: Any device or mode; not changed.
        compressed: Any device or mode; not changed.
        example: One batch, as it will be used; its batch size is measured.
        threads: Threads of each runtime; decides the clock, see `Latency`. PyTorch's setting is restored.
        rounds: Pairs to measure, at least 3.
        warmup: Pairs that are run first and not counted.

    Returns:
        The record of ONNX Runtime and the one of PyTorch.

    Raises:
        ExportError: If an argument cannot be used or a model cannot be exported.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    _check(rounds, warmup, threads)
    batch = inputs[0].shape[0]
    by_onnx = measure_pairs(original, compressed, OnnxRuntime(threads, batch), inputs, rounds=rounds, warmup=warmup)
    by_torch = measure_pairs(original, compressed, TorchEager(threads, batch), inputs, rounds=rounds, warmup=warmup)
    return by_onnx, by_torch


def inputs_for(target: Target, shape: Sequence[int] | Tensor | InputTensors) -> InputTensors:
    """Return one batch for a target, on the CPU; see `measure`."""
    if isinstance(shape, Tensor):
        shape = (shape,)
    given = tuple(each for each in shape if isinstance(each, Tensor))
    if given:
        picked = torch.arange(target.batch)
        return tuple(tensor.detach().cpu()[picked % len(tensor)] for tensor in given)
    sides = [int(side) for side in shape if not isinstance(side, Tensor)]
    if not sides or min(sides) < 1:
        raise ExportError(f"`shape` must be that of one input without the batch, such as (3, 224, 224); got {shape}.")
    return (torch.randn(target.batch, *sides, generator=torch.Generator().manual_seed(0)),)


def _rounds(
    models: Sequence[tuple[nn.Module, InputTensors]], target: Target, rounds: int, warmup: int
) -> tuple[list[tuple[float, ...]], tuple[float, float] | None]:
    """Return the seconds of every model in every round, and the load before and after."""
    _check(rounds, warmup, target.threads)
    if not models:
        raise ExportError("`models` must be at least one model; got none.")
    with ExitStack() as stack:
        passes = [stack.enter_context(target.opened(model, inputs)) for model, inputs in models]
        return _timed(passes, target, rounds, warmup)


def _timed(
    passes: Sequence[Pass], target: Target, rounds: int, warmup: int
) -> tuple[list[tuple[float, ...]], tuple[float, float] | None]:
    before = load_average()
    found = time_in_turns(passes, target.clock, rounds, warmup)
    after = load_average()
    return found, None if before is None or after is None else (before, after)


def _record(
    target: Target, seconds: Sequence[tuple[float, ...]], load: tuple[float, float] | None = None
) -> LatencyRecord:
    return LatencyRecord(
        runtime=target.runtime,
        batch_size=target.batch,
        threads=target.threads,
        rounds=len(seconds),
        clock=target.clock.name,
        before=Quartiles.of([before for before, _ in seconds]),
        after=Quartiles.of([after for _, after in seconds]),
        speedup=Quartiles.of([before / after for before, after in seconds]),
        load=load,
    )


def _check(rounds: int, warmup: int, threads: int) -> None:
    if rounds < 3 or warmup < 0 or threads < 1:
        raise ExportError(
            "`rounds` must be at least 3, `threads` at least 1 and `warmup` at least 0; got "
            f"rounds={rounds}, threads={threads}, warmup={warmup}. The defaults (30, 1, 5) suit most models."
        )
