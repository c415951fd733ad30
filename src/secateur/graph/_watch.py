"""One more forward pass of a traced model, to see where its values come from and go to."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.graph._call import MIXING_KINDS, base_name, tensors_in
from secateur.graph._flow import Flow, Reading
from secateur.graph._record import shadow_of
from secateur.graph._running import undisturbed
from secateur.graph._unread import READERS, STAND_INS, NumbersReadError, reads_numbers, stand_in


@dataclass(eq=False)
class Run:
    """One forward pass in evaluation mode.

    Attributes:
        flow: Its steps and module calls.
        mixings: Number of each call that computes over channels, to its step.
        stored: For each step, the names of the parameters and buffers that it reads itself.
    """

    flow: Flow = field(default_factory=Flow)
    mixings: dict[int, int] = field(default_factory=dict[int, int])
    stored: list[tuple[str, ...]] = field(default_factory=list[tuple[str, ...]])


class _Watching(TorchDispatchMode):
    def __init__(self, run: Run, names: dict[int, str], *, computed: bool):
        super().__init__()
        self._run, self._names, self._computed = run, names, computed
        self.was_read = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tensors_in(args, *kwargs.values())
        read = [self._run.flow.read(tensor) for tensor in inputs]
        name = base_name(func)
        made = None if self._computed else self._unread(func, name, args, kwargs, inputs, read)
        out = func(*args, **kwargs) if made is None else made
        if name in MIXING_KINDS:
            self._run.mixings[len(self._run.mixings)] = len(self._run.flow.names)
        self._run.flow.step(func, name, not kwargs, inputs, tensors_in(out), read=read, hollow=made is not None)
        self._run.stored.append(tuple(self._names[id(t)] for t in inputs if id(t) in self._names))
        return out

    def _unread(  # noqa: PLR0917
        self, func: Any, name: str, args: Any, kwargs: Any, inputs: tuple[torch.Tensor, ...], read: list[Reading]
    ) -> Any:
        """What stands in for the result of the call; None if it is to be made."""
        hollow = [tensor for tensor, reading in zip(inputs, read, strict=True) if reading.hollow]
        if hollow and reads_numbers(func, name, hollow):
            self.refuse()
        fed = func in STAND_INS and any(reading.fed for reading in read)
        return stand_in(func, args, kwargs) if fed else None

    def refuse(self) -> NoReturn:
        """Numbers are about to be read that were not computed. Noted too, as a model may catch what is raised."""
        self.was_read = True
        raise NumbersReadError


class _Guarding(TorchFunctionMode):
    """Sees numbers handed out without any ATen call."""

    def __init__(self, watching: _Watching, flow: Flow):
        super().__init__()
        self._watching, self._flow = watching, flow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READERS and self._flow.is_hollow(args[0]):
            self._watching.refuse()
        return func(*args, **(kwargs or {}))


def watch(model: nn.Module, example: tuple[Any, ...]) -> Run:
    """Run a shadow of a model once; what nobody reads is not computed, see `_unread`.

    Args:
        model: The traced model; not modified.
        example: Positional arguments, tensors at batch 1.
    """
    with contextlib.suppress(NumbersReadError):
        return _watch(model, example, computed=False)
    return _watch(model, example, computed=True)


def _watch(model: nn.Module, example: tuple[Any, ...], *, computed: bool) -> Run:
    run = Run()
    run.flow.feed(example)
    run.stored.extend(() for _ in run.flow.names)
    shadow = shadow_of(model)

    def enter(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: run.flow.enter(name, args, kwargs)

    for name, module in shadow.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):
            module.register_forward_pre_hook(enter(name), with_kwargs=True)
            module.register_forward_hook(lambda _module, _args, out: run.flow.leave(out))
    names = {id(tensor): name for name, tensor in (*shadow.named_parameters(), *shadow.named_buffers())}
    watching = _Watching(run, names, computed=computed)
    with undisturbed(model), torch.no_grad(), _Guarding(watching, run.flow), watching:
        out = shadow(*example)
    run.flow.finish(out)
    if watching.was_read:
        raise NumbersReadError
    return run
