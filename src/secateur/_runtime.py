"""The processes that torchrun has started for one program. Nothing here loads torch.

Ending a long loop in good order: it writes a checkpoint after its next step and raises `Stopped`.

Contexts in which a model runs.

Deep copies of models, quicker than `copy.deepcopy` because most of what a module holds is plain or empty.

Clocks, and the settings of the process that hold while time is taken."""

import contextlib
import copy
import gc
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import TrainingError


def processes() -> int:
    """How many processes torchrun has started for this program; 1 without it.

    Raises:
        TrainingError: If its variables are no numbers.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 1
    text = os.environ["WORLD_SIZE"] or "1"
    if not text.isdecimal() or int(text) < 1:
        raise TrainingError(f"WORLD_SIZE must be a number of processes, as torchrun sets it; got {text!r}. Unset it.")
    return int(text)


def is_first() -> bool:
    """Whether this process is the first of them, or alone: the one that speaks."""
    return os.environ.get("RANK", "0") in ("", "0")


class Stopped(KeyboardInterrupt):
    """A loop that was asked to stop has stopped. No error: it goes on where it was when it is started again.

    A `KeyboardInterrupt`, so that nothing takes it for a failure and goes on.

    Attributes:
        folder: Where the checkpoint lies that was written last; None if the loop was given no folder for checkpoints.
    """

    def __init__(self, folder: Path | None) -> None:
        where = "nothing was kept, because there is no folder for checkpoints" if folder is None else f"see {folder}"
        super().__init__(f"stopped on request; {where}")
        self.folder = folder


class StopRequest:
    """Whether the loops inside of a `stoppable` block shall stop. Safe to use in signal handlers: it takes no locks.

    Attributes:
        asked: Whether `ask` was called.
        heard: Whether a loop is running that will obey after its next step. Outside of loops nobody listens: then it
            is the next loop that stops, in its first step, unless the caller ends the work in another way.
    """

    def __init__(self) -> None:
        self.asked = False
        self.heard = False

    def ask(self) -> None:
        """Ask the loops to stop; once is enough."""
        self.asked = True


_current: ContextVar[StopRequest | None] = ContextVar("secateur_stop", default=None)


@contextmanager
def stoppable() -> Generator[StopRequest]:
    """A block whose trainings and searches can be asked to stop; of several blocks the innermost counts.

    Loops that run in this block (in this thread, or this task of asyncio) obey. For example::

        with stoppable() as stop:
            signal.signal(signal.SIGTERM, lambda *_: stop.ask())
            distill(...)  # raises Stopped after a step, with a checkpoint
    """
    request = StopRequest()
    token = _current.set(request)
    try:
        yield request
    finally:
        _current.reset(token)


def asked_to_stop() -> bool:
    """Whether the block that this runs in was asked to stop."""
    request = _current.get()
    return request is not None and request.asked


@contextmanager
def listening() -> Generator[StopRequest]:
    """A loop that obeys the request of the block it runs in; outside of such a block nobody can ask."""
    request = _current.get() or StopRequest()
    before, request.heard = request.heard, True
    try:
        yield request
    finally:
        request.heard = before


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a forward call."""


@contextlib.contextmanager
def without_fast_path() -> Generator[None]:
    """Switch off the fast path of `torch.nn.MultiheadAttention`, which is one opaque operation, and put it back."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def preserving_state(model: nn.Module) -> Generator[None]:
    """Run a model in the open: random state and settings are put back afterward."""
    # Nothing can lie on a device that was never asked for anything.
    parameters = model.parameters() if torch.cuda.is_initialized() else ()
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]), without_fast_path():
        yield


def run_under_(model: nn.Module, mode: Callable[[Inputs], AbstractContextManager[Any]]) -> nn.Module:
    """Enter a context whenever a model runs, in the open, and leave it when that is done or has failed; returns it.

    Args:
        model: Gets two hooks.
        mode: Makes the context from the inputs of the call.
    """
    running: list[ExitStack] = []

    def begin(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = ExitStack()
        stack.enter_context(without_fast_path())
        stack.enter_context(mode((args, kwargs)))
        running.append(stack)

    def end(*_: Any) -> None:
        running.pop().close()

    model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
    model.register_forward_hook(end, always_call=True)
    return model


_PLAIN = frozenset({int, float, bool, str, type(None), torch.Size, torch.dtype, torch.device, type(torch.relu)})
_CONTAINERS = frozenset({dict, OrderedDict, set, list})
_USUAL = ("__setstate__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__")
_CONVOLUTION = nn.modules.conv._ConvNd  # pyright: ignore[reportPrivateUsage]
"""Its ``__setstate__`` only adds what very old pickles lack, so that its copies are the usual ones."""


def copy_model(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy; what is in ``memo`` is taken from there.

    Args:
        model: Left as it is.
        memo: By identity, what stands for an object of the model in the copy, as for `copy.deepcopy`.
    """
    known = memo.get(id(model))
    if known is not None:
        return known
    kind = type(model)
    if not _copies_as_usual(kind):
        return copy.deepcopy(model, memo)  # it has its own idea of a copy
    twin = kind.__new__(kind)
    memo[id(model)] = twin
    held = vars(twin)
    for name, value in vars(model).items():
        kind = type(value)
        if kind in _CONTAINERS and not value:
            held[name] = memo.setdefault(id(value), kind())
        elif kind in _PLAIN or _is_plain(value):
            held[name] = value
        elif name == "_modules":
            children = value.items()
            held[name] = type(value)(
                (key, None if child is None else copy_model(child, memo)) for key, child in children
            )
        elif name in {"_parameters", "_buffers"}:
            held[name] = type(value)((key, _copy_tensor(tensor, memo)) for key, tensor in value.items())
        else:
            held[name] = copy.deepcopy(value, memo)
    return twin


@lru_cache(256)
def _copies_as_usual(kind: type[nn.Module]) -> bool:
    own = [name for name in _USUAL if getattr(kind, name, None) is not getattr(nn.Module, name, None)]
    return not own or (own == ["__setstate__"] and kind.__setstate__ is _CONVOLUTION.__setstate__)


def _copy_tensor(tensor: Any, memo: dict[int, Any]) -> Any:
    known = memo.get(id(tensor))
    if known is not None:
        return known
    plain = type(tensor) is torch.Tensor and not tensor.requires_grad and tensor.is_contiguous()
    if not plain or tensor.untyped_storage().nbytes() != tensor.nbytes:
        return copy.deepcopy(tensor, memo)  # a view must go on sharing its storage
    memo[id(tensor)] = tensor.clone()
    return memo[id(tensor)]


def _is_plain(value: Any) -> bool:
    return type(value) in _PLAIN or (type(value) is tuple and all(map(_is_plain, value)))


@dataclass(frozen=True)
class Clock:
    """Seconds from some fixed moment, and what they count."""

    name: str
    read: Callable[[], float]


ELAPSED = Clock("elapsed time", time.perf_counter)
# Windows counts a thread's processor time in steps of 16 ms. Both runtimes do all work on the calling thread.
ONE_THREAD = ELAPSED if os.name == "nt" else Clock("processor time", time.thread_time)


def load_average() -> float | None:
    """Programs that were running or waiting, on average of the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


@contextmanager
def torch_threads(threads: int) -> Generator[None]:
    """PyTorch's threads on the CPU for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def same_environment() -> Generator[None]:
    """Environment variables are at the end what they were before; compilers leave notes to themselves in them."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def no_garbage_collection() -> Generator[None]:
    """No pause for garbage."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
