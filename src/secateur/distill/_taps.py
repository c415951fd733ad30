"""Taps: modules of student and teacher whose outputs are compared, by name."""

import difflib
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from secateur.errors import TrainingError
from secateur.graph import undisturbed

Taps = Mapping[str, str]
"""Module names of the student, each with the module of the teacher that it is compared with, in order."""

Features = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""The student's outputs at some taps, and the teacher's, in the order of the taps."""

_SUGGESTIONS = 4


def listen(model: nn.Module, name: str, seen: dict[str, Tensor], owner: str) -> RemovableHandle:
    """Remember the first tensor of a module's output at every forward pass, until the hook is removed.

    Args:
        model: Student or teacher.
        name: Of the module.
        seen: Where the tensor is put, under the name of the module.
        owner: "student" or "teacher", for messages.

    Raises:
        TrainingError: If there is no such module; with the names nearest to it.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, [n for n in modules if n], n=_SUGGESTIONS)
        meant = f" Did you mean {', '.join(near)}?" if near else ""
        raise TrainingError(
            f"`{owner}` must have the tapped module {name!r}; it has none.{meant} "
            "A student whose block was removed cannot be compared there: name other `modules`."
        )

    def remember(_module: nn.Module, _inputs: Any, output: Any) -> None:
        # The first tensor in the order of the tracer, which the graph's activation describes.
        first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        if first is not None:
            seen[name] = first

    return modules[name].register_forward_hook(remember)


class TapWatch:
    """The tapped outputs of the latest forward passes of both models; made by `watch_taps`."""

    def __init__(self) -> None:
        self.student: dict[str, Tensor] = {}
        self.teacher: dict[str, Tensor] = {}

    def features(self, taps: Taps) -> Features:
        """What both models have put out at the taps.

        Raises:
            TrainingError: If a tapped module has not run since `forget`.
        """
        return (
            tuple(_heard(self.student, name, "student") for name in taps),
            tuple(_heard(self.teacher, name, "teacher") for name in taps.values()),
        )

    def forget(self) -> None:
        """Let go of the outputs, so that those of an earlier batch are never taken for those of the next."""
        self.student.clear()
        self.teacher.clear()


def _heard(seen: Mapping[str, Tensor], name: str, owner: str) -> Tensor:
    if name not in seen:
        raise TrainingError(
            f"`{owner}` must run module {name!r} before the features are compared; it did not. "
            "Run both models on the batch, and tap modules that always run."
        )
    return seen[name]


@contextmanager
def watch_taps(student: nn.Module, teacher: nn.Module, *taps: Taps) -> Generator[TapWatch]:
    """Listen to both models while the context is open; nothing is left on them afterwards.

    Args:
        student: The model that learns.
        teacher: The model it learns from.
        taps: Any number of them; they may name the same modules.

    Raises:
        TrainingError: If a model lacks a tapped module; with the names nearest to it.
    """
    watch = TapWatch()
    with ExitStack() as handles:
        for name in dict.fromkeys(name for some in taps for name in some):
            handles.callback(listen(student, name, watch.student, "student").remove)
        for name in dict.fromkeys(name for some in taps for name in some.values()):
            handles.callback(listen(teacher, name, watch.teacher, "teacher").remove)
        yield watch


def tapped(student: nn.Module, teacher: nn.Module, taps: Taps, example: Tensor) -> Features:
    """The features of one dry forward pass of each model, in eval mode and without gradients.

    Modes, buffers and random state of both are put back or left as they were.

    Args:
        student: The model that learns.
        teacher: The model it learns from; may lie on another device.
        taps: See `Taps`.
        example: An input that both take, on any device.

    Raises:
        TrainingError: If there are no taps, or a model lacks a tapped module or does not run it.
    """
    if not taps:
        raise TrainingError('`taps` must name at least one pair of modules; got none. Such as {"layer2": "layer2"}.')
    with watch_taps(student, teacher, taps) as watch, torch.no_grad():
        for model in (student, teacher):
            with undisturbed(model), _evaluating(model):
                device = next((p.device for p in model.parameters()), example.device)
                model(example.to(device))
        return watch.features(taps)


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
