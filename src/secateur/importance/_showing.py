"""Where in a running model the channels of an axis can be seen."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from secateur.graph import ChannelGraph

IntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def readers(model: nn.Module, example: tuple[Any, ...], names: set[str]) -> dict[str, str]:
    """Run once: which batch norm reads the very tensor that a module returns.

    Args:
        model: Runs on the example with hooks, which are removed again. It should be a copy in evaluation mode.
        example: Positional arguments.
        names: Modules of interest.

    Returns:
        Module name to batch norm name, for the modules that have one.
    """
    outputs: list[tuple[str, Tensor]] = []  # holding the tensors keeps their identities unique
    found: dict[str, str] = {}

    def returned(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, output))

        return hook

    def read(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for producer, output in outputs:
                if inputs and inputs[0] is output:
                    found[producer] = name

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(returned(name)) for name in sorted(names)]
    norms = [(name, module) for name, module in model.named_modules() if _is_batch_norm(module)]
    hooks += [module.register_forward_pre_hook(read(name)) for name, module in norms]
    try:
        model(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def channel_positions(graph: ChannelGraph, module: str, axis: str) -> IntArray | None:
    """(axis size, multiplicity) positions of the channels of an axis in a module's output, along its main dimension.

    None if the output does not show every channel equally often.
    """
    activation = graph.activations.get(module)
    return None if activation is None else _positions(graph, axis, activation.axis, activation.channel)


def shown_along(graph: ChannelGraph, module: str, axis: str) -> tuple[int, IntArray] | None:
    """The dimension of a module's output along which an axis runs, and `channel_positions` along it."""
    activation = graph.activations.get(module)
    if activation is None:
        return None
    lanes = [(activation.dim, activation.axis, activation.channel)]
    lanes += [(lane.dim, lane.axis, lane.channel) for lane in activation.others]
    found = ((dim, _positions(graph, axis, axes, channels)) for dim, axes, channels in lanes)
    return next(((dim, positions) for dim, positions in found if positions is not None), None)


def _positions(graph: ChannelGraph, axis: str, axes: IntArray, channels: IntArray) -> IntArray | None:
    number = next(index for index, each in enumerate(graph.axes) if each.name == axis)
    here = np.flatnonzero(axes == number)
    counts = np.bincount(channels[here], minlength=graph.axes[number].size)
    if counts.min() < 1 or counts.min() != counts.max():
        return None
    return here[np.argsort(channels[here], kind="stable")].reshape(len(counts), -1)


def _is_batch_norm(module: nn.Module) -> bool:
    """A module that keeps a running variance for each channel."""
    return isinstance(getattr(module, "running_var", None), Tensor)
