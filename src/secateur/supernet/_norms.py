"""Which batch norms stand between a producing layer and everybody who reads its channels."""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def norms_after(model: nn.Module, example: tuple[Any, ...], modules: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Run once: the batch norms through which alone all others see what a module returns.

    A stream that goes past the norm that reads it (pre-activation blocks, dense layers) is seen without it.

    Args:
        model: Runs on the example with hooks, which are removed again. It should be a copy in evaluation mode.
        example: Positional arguments.
        modules: Names of those that return something of interest.

    Returns:
        Module name to the norms that read it, one for each different one of its calls; modules of which any call is
        read by something else, too, are left out.
    """
    reads = _Reads()
    # Holding the tensors keeps their identities unique: one that is freed leaves its number to a later one.
    returned: list[tuple[str, Tensor]] = []
    norms: dict[int, tuple[Tensor, str]] = {}

    def after(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                returned.append((name, output))
                reads.times[id(output)] = 0

        return hook

    def before(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs:
                norms[id(inputs[0])] = (inputs[0], name)

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(after(name)) for name in sorted(modules)]
    found = [(name, module) for name, module in model.named_modules() if is_batch_norm(module)]
    hooks += [module.register_forward_pre_hook(before(name)) for name, module in found]
    try:
        with torch.no_grad(), reads:
            model(*example)
    finally:
        for hook in hooks:
            hook.remove()
    seen: dict[str, list[str]] = {}
    for name, output in returned:
        alone = reads.times[id(output)] == 1
        _, norm = norms.get(id(output), (output, ""))
        seen.setdefault(name, []).append(norm if alone else "")
    return {name: tuple(dict.fromkeys(after)) for name, after in seen.items() if all(after)}


class _Reads(TorchDispatchMode):
    """Counts the operations that read each tensor, by its identity."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times.update(id(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor))
        return func(*args, **(kwargs or {}))


def is_batch_norm(module: nn.Module) -> bool:
    """A module that keeps a running variance for each channel."""
    return isinstance(getattr(module, "running_var", None), Tensor)
