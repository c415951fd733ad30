"""The state of the process and of the models that run in it.

In reading order: the processes that torchrun started, requests to stop a long loop, contexts in which a model runs
without side effects, `copy_model`, and the clocks and settings for measuring time.
"""

import contextlib
import copy
import gc
import os
import random
import time
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur._caller_state import OPEN, default_state, leaving_open_contexts, preserved_random_state
from secateur.errors import ModelError, TrainingError

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def process_count() -> int:
    """Return the number of processes that torchrun started for this program; 1 without torchrun.

    Raises:
        TrainingError: If ``WORLD_SIZE`` is not a positive number.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 1
    text = os.environ["WORLD_SIZE"] or "1"
    if not text.isdecimal() or int(text) < 1:
        raise TrainingError(f"WORLD_SIZE must be a number of processes, as torchrun sets it; got {text!r}. Unset it.")
    return int(text)


def is_main_process() -> bool:
    """Return whether this process is the first one, or the only one. Only this process prints and logs."""
    return os.environ.get("RANK", "0") in ("", "0")


class Stopped(KeyboardInterrupt):
    """Raised by a training or search loop that was asked to stop. The loop can be resumed from its checkpoint.

    It is a `KeyboardInterrupt`, so that code that handles ordinary failures does not swallow it.

    Attributes:
        folder: The folder of the last checkpoint; None if the loop had no folder for checkpoints.
    """

    def __init__(self, folder: Path | None) -> None:
        where = "nothing was kept, because there is no folder for checkpoints" if folder is None else f"see {folder}"
        super().__init__(f"stopped on request; {where}")
        self.folder = folder


class StopRequest:
    """Tells the loops inside a `stoppable` block to stop. It takes no locks, so signal handlers may use it.

    Attributes:
        asked: Whether `ask` was called.
        acknowledged: Whether a loop is running that will stop after its next step. If none is running, the next loop
            stops in its first step, unless the caller ends the work in another way.
    """

    def __init__(self) -> None:
        self.asked = False
        self.acknowledged = False

    def ask(self) -> None:
        """Ask the loops to stop; once is enough."""
        self.asked = True


_current: ContextVar[StopRequest | None] = ContextVar("secateur_stop", default=None)


@contextmanager
def stoppable() -> Generator[StopRequest]:
    """Open a block whose training and search loops can be asked to stop.

    The request reaches the loops in this thread, or this asyncio task; of nested blocks, only those of the innermost
    one. For example::

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


def stop_requested() -> bool:
    """Return whether the innermost enclosing `stoppable` block was asked to stop."""
    request = _current.get()
    return request is not None and request.asked


@contextmanager
def accept_stop_requests() -> Generator[StopRequest]:
    """Declare that the code inside will obey the request of the enclosing `stoppable` block, and yield that request."""
    request = _current.get() or StopRequest()
    before, request.acknowledged = request.acknowledged, True
    try:
        yield request
    finally:
        request.acknowledged = before


Batch = tuple[Tensor, Tensor]
"""Inputs of a model and the labels that belong to them, on one device."""

CallArguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a forward call."""


@contextlib.contextmanager
def without_fast_path() -> Generator[None]:
    """Disable the fast path of `torch.nn.MultiheadAttention`, one opaque operation, and restore it afterward."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def seeded_initialization(seed: int) -> Generator[None]:
    """Seed the CPU's random generator, from which modules draw their initial values, and restore it afterward."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Put a model into evaluation mode, and give every module its own mode back afterward."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def with_recurrent_gradients_(model: ModuleType) -> ModuleType:
    """Let gradients pass through the recurrent layers of a model in evaluation mode, in place, and return the model.

    On GPUs, cuDNN computes them in training mode only. Without dropout, such a layer computes the same in both modes.
    """
    for module in model.modules():
        if type(module) in {nn.LSTM, nn.GRU, nn.RNN}:
            vars(module).update(training=True, dropout=0.0)
    return model


@contextlib.contextmanager
def run_isolated(model: nn.Module, seed: int = 0) -> Generator[None]:
    """Run a model without any effect on the random states, and without any effect of them and of the caller's settings.

    The random generators of Python, NumPy, the CPU and the devices of the model are seeded, and restored afterward.
    Opaque operations are disabled. What `default_state` leaves is left here too, except that the model may run on a
    default device of its own.
    """
    # Without an initialized CUDA context, no parameter can be on a GPU.
    parameters = model.parameters() if torch.cuda.is_initialized() else ()
    devices = sorted({p.device.index or 0 for p in parameters if p.device.type == "cuda"})
    with default_state(model), without_fast_path(), preserved_random_state(), leaving_open_contexts():
        random.seed(seed)
        np.random.seed(seed)
        # Not `torch.manual_seed`, which would also seed devices that are not restored.
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def add_run_context_(model: nn.Module, mode: Callable[[CallArguments], AbstractContextManager[Any]]) -> nn.Module:
    """Enter a context whenever a model runs, and leave it when the call returns or raises.

    Hooks do not see what is no `Exception`, such as Ctrl-C: then `leaving_open_contexts` leaves the context.

    Args:
        model: Changed in place: it gets two hooks. Its calls also run without the fast path of attention.
        mode: Makes the context from the inputs of the call.

    Returns:
        The model.
    """
    running: list[ExitStack] = []

    def begin(_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack = ExitStack()
        stack.enter_context(without_fast_path())
        stack.enter_context(mode((args, kwargs)))
        running.append(stack)
        OPEN.stacks.append(stack)

    def end(*_: Any) -> None:
        stack = running.pop()
        OPEN.stacks.remove(stack)
        stack.close()

    model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
    model.register_forward_hook(end, always_call=True)
    return model


def check_hashable(model: nn.Module) -> None:
    """Refuse a module that PyTorch itself cannot list, with its parameters, among the modules of a model.

    Raises:
        ModelError: If a class defines ``__eq__`` without ``__hash__``.
    """
    pending, seen = [model], set[int]()
    while pending:
        module = pending.pop()
        if type(module).__hash__ is None:
            kind = type(module).__name__
            raise ModelError(
                f"the modules of `model` must be hashable, as PyTorch lists them in sets; got {kind}, which defines "
                f"__eq__ without __hash__. Write `__hash__ = torch.nn.Module.__hash__` into {kind}."
            )
        if id(module) not in seen:
            seen.add(id(module))
            pending += [child for child in vars(module).get("_modules", {}).values() if child is not None]


_PLAIN = frozenset({
    int, float, complex, bool, str, bytes, type(None), torch.Size, torch.dtype, torch.device, range,
    types.FunctionType, types.BuiltinFunctionType,
})  # fmt: skip
"""Types whose values cannot change, so that a copy may share them."""
_CONTAINERS = frozenset({dict, OrderedDict, set, list})
_WITHOUT_SETSTATE = (nn.Module.__setstate__, nn.modules.conv._ConvNd.__setstate__)  # pyright: ignore[reportPrivateUsage]
"""Both only add attributes that very old pickles lack, so that a copy need not call them."""


def copy_model(model: ModuleType, memo: dict[Any, Any] | None = None) -> ModuleType:
    """Return an independent copy of a model; the model itself is never changed.

    It is what `copy.deepcopy` would return, with three differences. A tensor that was computed from others, such as the
    last output that a module keeps for display, is copied without its gradient history instead of being refused. What
    cannot be copied at all (open files, locks, generators, Python modules) is shared with the original. A weak
    reference to a part of the model refers to the same part of the copy.

    Args:
        model: Any module, with hooks and attributes of any kind.
        memo: What stands for an object of the model in the copy, by the `id` of the object, as for `copy.deepcopy`.

    Raises:
        ModelError: If a module defines how it is copied (``__deepcopy__``, ``__reduce__``) and that fails.
    """
    try:
        return _Copier({} if memo is None else memo).module(model)
    except Exception as error:
        raise ModelError(
            f"`model` ({type(model).__name__}) cannot be copied: {error}. Change how its modules define "
            "`__deepcopy__` or `__reduce__`, or remove that definition."
        ) from error


class _Copier:
    """One copy under construction.

    Every module is allocated before any attribute is copied, and the tensors of all modules are copied first. So what
    refers back to a part of the model (a hook, a parent, a weak reference) finds that part's copy in the memo.
    """

    def __init__(self, memo: dict[Any, Any]) -> None:
        self.memo = memo
        # Temporary objects whose ids are in the memo: a new object must not get the id of a dead one.
        self.temporary: list[Any] = []

    def module(self, module: ModuleType) -> ModuleType:
        known = self.memo.get(id(module))
        if known is not None:
            return known
        if _copies_itself(type(module)):
            self._copy_computed_tensors(module)
            return copy.deepcopy(module, self.memo)
        pending: list[tuple[nn.Module, nn.Module]] = []
        self._allocate(module, pending)
        for original, _ in pending:
            for kind in ("_parameters", "_buffers"):
                for tensor in vars(original).get(kind, {}).values():
                    if tensor is not None and id(tensor) not in self.memo:
                        self.value(tensor)
        for original, twin in pending:
            self._fill(original, twin)
        return self.memo[id(module)]

    def _allocate(self, module: nn.Module, pending: list[tuple[nn.Module, nn.Module]]) -> None:
        if id(module) in self.memo or _copies_itself(type(module)):
            return
        kind = type(module)
        self.memo[id(module)] = kind.__new__(kind)
        pending.append((module, self.memo[id(module)]))
        for child in vars(module).get("_modules", {}).values():
            if child is not None and type(child) not in _WEAK:
                self._allocate(child, pending)

    def _copy_computed_tensors(self, module: nn.Module) -> None:
        """Put into the memo what `copy.deepcopy` refuses: tensors that were computed from others."""
        for inner in module.modules():
            for value in (*vars(inner).values(), *inner.buffers(recurse=False)):
                if isinstance(value, Tensor) and not value.is_leaf:
                    self.tensor(value)

    def _fill(self, module: nn.Module, twin: nn.Module) -> None:
        state = vars(module)
        reads, writes = _state_methods(type(module))
        if reads:
            state: Any = module.__getstate__()  # type: ignore[no-redef]
            self.temporary.append(state)
        # Nearly all that a module holds is plain or empty, which needs no further call.
        copied: dict[str, Any] = {} if writes else vars(twin)
        for name, value in state.items():
            kind = type(value)
            if kind in _PLAIN:
                copied[name] = value
            elif kind in _CONTAINERS and not value:
                copied[name] = self.memo.setdefault(id(value), kind())
            else:
                copied[name] = self.value(value)
        if writes:
            twin.__setstate__(copied)

    def value(self, value: Any) -> Any:
        """Return the copy of anything."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        known = self.memo.get(id(value))
        if known is not None:
            return known
        if kind in _WEAK:
            return self._weak(value)
        if isinstance(value, Tensor | nn.Module):
            return self.tensor(value) if isinstance(value, Tensor) else self.module(value)
        return self._container(value) if kind in _CONTAINERS or kind is tuple else self._object(value)

    def tensor(self, tensor: Tensor) -> Tensor:
        known = self.memo.get(id(tensor))
        if known is not None:
            return known
        if not tensor.is_leaf:
            self.memo[id(tensor)] = tensor.detach().clone()
            return self.memo[id(tensor)]
        if tensor.is_inference():
            return self._ordinary(tensor)
        if type(tensor) is not Tensor or tensor.requires_grad or not tensor.is_contiguous():
            return copy.deepcopy(tensor, self.memo)
        # Views of the same memory must share it in the copy too; `copy.deepcopy` finds copied storages in this table.
        storage, storages = tensor.untyped_storage(), self.memo.setdefault("torch", {})
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if storage.nbytes() != tensor.nbytes or key in storages:
            return copy.deepcopy(tensor, self.memo)
        twin = self.memo[id(tensor)] = tensor.clone()
        storages[key] = twin.untyped_storage()
        return twin

    def _ordinary(self, tensor: Tensor) -> Tensor:
        """Copy a tensor that was created in inference mode, which no recorder sees, to an ordinary one."""
        with torch.inference_mode(mode=False):
            twin = tensor.clone()
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, tensor.requires_grad)
        self.memo[id(tensor)] = twin
        return twin

    def _container(self, value: Any) -> Any:
        kind = type(value)
        if kind is tuple:
            items = tuple(map(self.value, value))
            same = all(item is old for item, old in zip(items, value, strict=True))
            # A tuple that contains itself, by way of a list, is in the memo by now.
            return self.memo.setdefault(id(value), value if same else items)
        twin = self.memo[id(value)] = kind()
        if kind is list:
            twin.extend(map(self.value, value))
        elif kind is set:
            twin.update(map(self.value, value))
        else:
            for key, item in value.items():
                known = self.memo.get(id(item))
                twin[key if type(key) is str else self.value(key)] = self.value(item) if known is None else known
        return twin

    def _weak(self, value: Any) -> Any:
        """Return a weak reference to what stands for the same object in the copy."""
        if type(value) is weakref.ReferenceType:
            twin = self.memo.get(id(value()))
            return value if twin is None else weakref.ref(twin)
        twin = self.memo.get(id(value.__repr__.__self__))
        return value if twin is None else weakref.proxy(twin)

    def _object(self, value: Any) -> Any:
        """Copy an object by the pickle protocol, part by part; share it if it does not support that."""
        if isinstance(value, type | types.ModuleType):
            return value
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self.value(value.__self__))
        if isinstance(value, torch.Generator) or hasattr(value, "__deepcopy__"):
            return self._ask_for_copy(value)
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:
            return value
        if isinstance(reduced, str):
            return value
        self.temporary.append(reduced)
        try:
            parts: list[Any] = [*reduced, None, None, None]
            make, args, state, items, pairs = parts[:5]
            twin: Any = make(*map(self.value, args))
            self.memo[id(value)] = twin
            self._set_state(twin, state)
            for item in items or ():
                twin.append(self.value(item))
            for key, item in pairs or ():
                twin[self.value(key)] = self.value(item)
        except Exception:
            twin = self.memo[id(value)] = value
        return twin

    def _ask_for_copy(self, value: Any) -> Any:
        if isinstance(value, torch.Generator):
            # A shared one would be advanced by every run of the copy.
            self.memo[id(value)] = torch.Generator(value.device).set_state(value.get_state())
            return self.memo[id(value)]
        known = len(self.memo)
        try:
            return copy.deepcopy(value, self.memo)
        except Exception:
            for key in list(self.memo)[known:]:  # What was copied until then may be incomplete.
                del self.memo[key]
            return value

    def _set_state(self, twin: Any, state: Any) -> None:
        if state is None:
            return
        state = self.value(state)
        if hasattr(twin, "__setstate__"):
            twin.__setstate__(state)
            return
        held, slots = state if isinstance(state, tuple) else (state, None)
        vars(twin).update(held or {})
        for name, item in (slots or {}).items():
            setattr(twin, name, item)


_WEAK = frozenset({weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType})


@lru_cache(256)
def _copies_itself(kind: type[nn.Module]) -> bool:
    """Whether a class of modules defines how it is copied."""
    own = [name for name in ("__deepcopy__", "__reduce__", "__reduce_ex__") if _overrides(kind, name)]
    return bool(own) and not (own == ["__deepcopy__"] and _is_parametrized(kind))


@lru_cache(256)
def _state_methods(kind: type[nn.Module]) -> tuple[bool, bool]:
    """Whether a class of modules has a ``__getstate__``, and a ``__setstate__``, that a copy must call."""
    if _is_parametrized(kind):
        return False, False
    return _overrides(kind, "__getstate__"), kind.__setstate__ not in _WITHOUT_SETSTATE


def _is_parametrized(kind: type[nn.Module]) -> bool:
    """Whether `torch.nn.utils.parametrize` made the class: its methods only refuse pickling."""
    return getattr(getattr(kind, "__deepcopy__", None), "__module__", "") == "torch.nn.utils.parametrize"


def _overrides(kind: type[nn.Module], name: str) -> bool:
    return getattr(kind, name, None) is not getattr(nn.Module, name, None)


@dataclass(frozen=True)
class Clock:
    """A function that returns seconds since some fixed moment, and the name of what it measures."""

    name: str
    read: Callable[[], float]


ELAPSED_TIME = Clock("elapsed time", time.perf_counter)
# Windows counts a thread's processor time in steps of 16 ms. Both runtimes do all work on the calling thread.
PROCESSOR_TIME = ELAPSED_TIME if os.name == "nt" else Clock("processor time", time.thread_time)


def load_average() -> float | None:
    """Return the mean number of runnable programs in the last minute; None where the system does not report it."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


@contextmanager
def torch_threads(threads: int | None) -> Generator[None]:
    """Set the number of CPU threads of PyTorch, unless it is None, and restore it afterward."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def preserve_environment() -> Generator[None]:
    """Restore the environment variables afterward. Compilers store notes to themselves there."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def no_garbage_collection() -> Generator[None]:
    """Disable garbage collection, whose pauses would be measured, and restore it afterward."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
