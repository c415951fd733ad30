"""One more forward pass of a traced model, to see where its values come from and go to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.graph._call import MIXING_KINDS, base_name
from secateur.graph._flow import Flow
from secateur.graph._record import shadow_of
from secateur.graph._running import undisturbed


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
    def __init__(self, run: Run, names: dict[int, str]):
        super().__init__()
        self._run, self._names = run, names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = tuple(t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        out = func(*args, **kwargs)
        outputs = tuple(t for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        name = base_name(func)
        if name in MIXING_KINDS:
            self._run.mixings[len(self._run.mixings)] = len(self._run.flow.names)
        self._run.flow.step(func, name, not kwargs, inputs, outputs)
        self._run.stored.append(tuple(self._names[id(t)] for t in inputs if id(t) in self._names))
        return out


def watch(model: nn.Module, example: tuple[Any, ...]) -> Run:
    """Run a shadow of a model once.

    Args:
        model: The traced model; not modified.
        example: Positional arguments, tensors at batch 1.
    """
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
    with undisturbed(model), torch.no_grad(), _Watching(run, names):
        out = shadow(*example)
    run.flow.finish(out)
    return run
