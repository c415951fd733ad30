"""What a caller has set around a call: it neither changes a result nor hides anything from a recorder."""

import contextlib
import random
import threading
from collections.abc import Callable, Generator
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes  # pyright: ignore[reportPrivateUsage]

from secateur._kinds import check_arguments

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


class OpenContexts(threading.local):
    """The contexts that hooks of running models have entered in this thread, the last one at the end."""

    def __init__(self) -> None:
        self.stacks: list[contextlib.ExitStack] = []


OPEN = OpenContexts()


@contextlib.contextmanager
def default_state(*models: nn.Module) -> Generator[None]:
    """Leave what the caller has set around a call, and return to it afterward.

    These are inference mode, ``no_grad``, autocast, modes that intercept operations (``TorchFunctionMode``,
    ``TorchDispatchMode``), and a default device on which no weight of the models is. Inference mode, for example,
    would hide the operations from every recorder, and autocast would change the precision of a comparison.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_function_modes(models))
        stack.enter_context(_disable_current_modes())
        # In this order, because leaving inference mode also enables gradients.
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(leaving_open_contexts())
        yield


@contextlib.contextmanager
def leaving_open_contexts() -> Generator[None]:
    """Leave the contexts that hooks of models entered in the block and could not leave.

    That is so if Ctrl-C or an exit ended a forward pass. A mode of ours that stayed would intercept whatever the caller
    computes from then on. Enter this one last, so that these contexts are left before those around them.
    """
    entered = len(OPEN.stacks)
    try:
        yield
    finally:
        while len(OPEN.stacks) > entered:
            OPEN.stacks.pop().close()


@contextlib.contextmanager
def _without_function_modes(models: tuple[nn.Module, ...]) -> Generator[None]:
    core: Any = torch._C  # pyright: ignore[reportPrivateUsage]
    removed: list[Any] = []
    kept: list[Any] = []
    while core._len_torch_function_stack():
        mode = core._pop_torch_function_stack()
        removed.append(mode)
        # A default device is such a mode. A model on that device may need it for the tensors that it creates.
        if isinstance(mode, DeviceContext) and _has_weight_on(models, mode.device.type):
            kept.append(mode)
    try:
        for mode in reversed(kept):
            core._push_on_torch_function_stack(mode)
        with _own_default_device(kept):
            yield
    finally:
        while core._len_torch_function_stack():
            core._pop_torch_function_stack()
        for mode in reversed(removed):
            core._push_on_torch_function_stack(mode)


@contextlib.contextmanager
def _own_default_device(kept: list[Any]) -> Generator[None]:
    """Undo ``torch.set_default_device`` of code in the block, where the default device is the kept mode, or none.

    PyTorch also remembers the mode of the default device elsewhere, and leaves that one when it is set anew.
    """
    remembered: Any = torch._GLOBAL_DEVICE_CONTEXT  # pyright: ignore[reportPrivateUsage]
    before = getattr(remembered, "device_context", None)
    inside = before if before in kept else None
    remembered.device_context = inside
    try:
        yield
    finally:
        if remembered.device_context is not inside:
            torch.set_default_device(None)
        remembered.device_context = before


def _has_weight_on(models: tuple[nn.Module, ...], device: str) -> bool:
    # "meta" is no device that a model runs on.
    return device != "meta" and any(p.device.type == device for model in models for p in model.parameters())


def in_default_state(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
    """Make a function independent of the settings that a caller has made around it; see `default_state`.

    The global random states of Python, NumPy and PyTorch are as before when it returns.

    Tensors that were created in inference mode are replaced by ordinary copies, directly among the arguments and in
    tuples, lists and dicts. Arguments of the wrong type are refused, see `check_arguments`.
    """

    @wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        check_arguments(function, args, kwargs)
        models = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, nn.Module))
        with contextlib.ExitStack() as stack:
            stack.enter_context(default_state(*models))
            stack.enter_context(preserved_random_state())
            run: Any = function
            return run(*_without_inference_tensors(args), **_without_inference_tensors(kwargs))

    return call


@contextlib.contextmanager
def preserved_random_state() -> Generator[None]:
    """Restore the global random states of Python, NumPy and PyTorch, on all devices in use, afterward."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)


def _without_inference_tensors(value: Any) -> Any:
    """Return the value itself if no tensor in it was created in inference mode."""
    kind = type(value)
    if isinstance(value, Tensor):
        return value.clone() if kind is Tensor and value.is_inference() else value
    if kind is dict:
        items: Any = {key: _without_inference_tensors(item) for key, item in value.items()}
        return items if any(items[key] is not item for key, item in value.items()) else value
    if kind is tuple or kind is list:
        items = kind(map(_without_inference_tensors, value))
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    return value
