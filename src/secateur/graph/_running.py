"""Contexts in which a model runs."""

import contextlib
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a forward call."""


@contextlib.contextmanager
def in_the_open() -> Generator[None]:
    """Switch off the fast path of `torch.nn.MultiheadAttention`, which is one opaque operation, and put it back."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """Run a model in the open: random state and settings are put back afterwards."""
    # Nothing can lie on a device that was never asked for anything.
    parameters = model.parameters() if torch.cuda.is_initialized() else ()
    devices = {p.device for p in parameters if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]), in_the_open():
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
        stack.enter_context(in_the_open())
        stack.enter_context(mode((args, kwargs)))
        running.append(stack)

    def end(*_: Any) -> None:
        running.pop().close()

    model.register_forward_pre_hook(begin, prepend=True, with_kwargs=True)
    model.register_forward_hook(end, always_call=True)
    return model
