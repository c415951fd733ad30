"""Where every value of a forward pass comes from and goes to: what residual branches are found in.

A *step* is one ATen call, numbered in order of execution; a model input counts as one too. The value a tensor holds is
named by the step that wrote it last, through whichever view that was.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

ADDITION = "add"
INPUT = "input"
CONSTANT = -1
"""Stands for a parameter, a buffer or any other value that no step has written."""
_RUNS = itertools.count()


def _memory(tensor: torch.Tensor) -> int:
    """What tensors that share their numbers have in common, as long as one of them lives."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


@cache
def is_pointwise(func: Any) -> bool:
    """Whether an ATen overload is said to work elementwise."""
    return torch.Tag.pointwise in func.tags


@cache
def is_mutable(func: Any) -> bool:
    """Whether an ATen overload writes into an argument."""
    return bool(func._schema.is_mutable)


class Reading(NamedTuple):
    """Where what a tensor holds comes from.

    Attributes:
        value: The step that wrote it; `CONSTANT` if none did.
        fed: Whether it depends on the model's input.
        hollow: Whether it was not computed, or from something that was not.
    """

    value: int
    fed: bool
    hollow: bool


@dataclass(frozen=True)
class Addition:
    """A sum of two tensors of the same shape that both depend on the model's input.

    No other sums are counted. Whether a linear layer adds its bias by one depends on the batch size.

    Attributes:
        number: How many such sums came before it in the forward pass.
        left: The value of the first operand.
        right: The value of the second operand.
    """

    number: int
    left: int
    right: int


@dataclass(eq=False)
class ModuleCall:
    """One call of a module.

    Attributes:
        module: Qualified name.
        begin: First step that ran in it.
        taken: The value of its first tensor argument.
        taken_shape: Its shape.
        end: The step after the last one that ran in it.
        given: The value of its first output tensor.
        given_shape: Its shape.
        items: Length of the tuple it returns; None if it returns a tensor, 0 if something else than tensors and None.
        others: The values of the other tensors of that tuple.
    """

    module: str
    begin: int
    taken: int = CONSTANT
    taken_shape: tuple[int, ...] = ()
    end: int = -1
    given: int = CONSTANT
    given_shape: tuple[int, ...] = ()
    items: int | None = 0
    others: tuple[int, ...] = ()


@dataclass(eq=False)
class Flow:
    """Append-only record of the steps and the module calls of one forward pass.

    Attributes:
        names: ATen name of each step.
        sources: The values each step reads, one for each tensor, `CONSTANT` included.
        fed: Whether the result of each step depends on the model's input.
        hollow: Whether the numbers of each step's result were not computed; see `_unread`.
        pointwise: Whether each step works elementwise.
        call: The innermost module call each step ran in; -1 for none.
        additions: The sums of two tensors, by step.
        calls: Module calls in order of their begin.
        given: The values that leave the record: the model returns them, or python reads their numbers.
    """

    names: list[str] = field(default_factory=list[str])
    sources: list[tuple[int, ...]] = field(default_factory=list[tuple[int, ...]])
    fed: list[bool] = field(default_factory=list[bool])
    hollow: list[bool] = field(default_factory=list[bool])
    pointwise: list[bool] = field(default_factory=list[bool])
    call: list[int] = field(default_factory=list[int])
    additions: dict[int, Addition] = field(default_factory=dict[int, Addition])
    calls: list[ModuleCall] = field(default_factory=list[ModuleCall])
    given: set[int] = field(default_factory=set[int])
    _open: list[int] = field(default_factory=list[int])
    _writers: dict[int, int] = field(default_factory=dict[int, int])
    _uncomputed: set[int] = field(default_factory=set[int])
    _added: int = 0
    _mark: str = field(default_factory=lambda: f"_secateur_step_{next(_RUNS)}")

    def read(self, tensor: torch.Tensor) -> Reading:
        """Where what a tensor holds comes from.

        Its memory tells too whether it was computed: ``x.data`` and the like are made by no step.
        """
        value: int = getattr(tensor, self._mark, CONSTANT)
        uncomputed = False
        if (self._writers or self._uncomputed) and tensor.layout == torch.strided:
            memory = _memory(tensor)
            value = max(value, self._writers.get(memory, CONSTANT))
            uncomputed = memory in self._uncomputed
        if value < 0:
            return Reading(value, False, uncomputed)
        return Reading(value, self.fed[value], uncomputed or self.hollow[value])

    def value_of(self, tensor: torch.Tensor) -> int:
        """The step that wrote what a tensor holds."""
        return self.read(tensor).value

    def is_hollow(self, tensor: torch.Tensor) -> bool:
        """Whether what a tensor holds was not computed, or from something that was not."""
        return self.read(tensor).hollow

    def feed(self, example: Any) -> None:
        """The inputs of the model."""
        for tensor in tree_leaves(example):
            if isinstance(tensor, torch.Tensor):
                self.hollow.append(False)
                self._append(INPUT, (), fed=True, pointwise=False)
                # By its storage: the caller's tensor is not to carry a mark of ours.
                self._writers[_memory(tensor)] = len(self.names) - 1

    def addition(self, name: str, inputs: Sequence[torch.Tensor], read: Sequence[Reading]) -> int | None:
        """The number of a sum of two tensors that is about to run; None if it is none that counts."""
        if name != ADDITION or len(inputs) != 2 or inputs[0].shape != inputs[1].shape:
            return None
        return self._added if all(reading.fed for reading in read) else None

    def step(
        self,
        func: Any,
        name: str,
        plain: bool,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        *,
        read: Sequence[Reading],
        hollow: bool = False,
    ) -> None:
        """One ATen call that has just run.

        Args:
            func: The ATen overload.
            name: Its base name.
            plain: Whether it was given positional arguments only (no ``alpha``).
            inputs: The tensors it was given.
            outputs: The tensors it returned.
            read: Where what the inputs held came from.
            hollow: Whether it was not run at all, and others stand in for what it would return.
        """
        sources = tuple(reading.value for reading in read)
        number = len(self.names)
        added = self.addition(name, inputs, read)
        if added is not None:
            self._added += 1
            if plain:
                self.additions[number] = Addition(added, sources[0], sources[1])
        self.hollow.append(hollow or any(reading.hollow for reading in read))
        self._append(name, sources, any(reading.fed for reading in read), is_pointwise(func))
        if not outputs:
            self.given.add(number)
        for tensor in outputs:
            setattr(tensor, self._mark, number)
        strided = [_memory(tensor) for tensor in outputs if tensor.layout == torch.strided]
        if is_mutable(func):
            self._writers.update(dict.fromkeys(strided, number))
        if self.hollow[number]:
            self._uncomputed.update(strided)
        else:
            self._uncomputed.difference_update(strided)  # Memory that was freed since, and is used again.

    def _append(self, name: str, sources: tuple[int, ...], fed: bool, pointwise: bool) -> None:
        self.names.append(name)
        self.sources.append(sources)
        self.fed.append(fed)
        self.pointwise.append(pointwise)
        self.call.append(self._open[-1] if self._open else -1)

    def enter(self, module: str, args: Any, kwargs: Any) -> None:
        """A module begins to run."""
        call = ModuleCall(module, len(self.names))
        tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
        if tensor is not None:
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                call.taken, call.taken_shape = self.value_of(tensor), tensor.shape
        self._open.append(len(self.calls))
        self.calls.append(call)

    def leave(self, out: Any) -> None:
        """The innermost running module has returned."""
        call = self.calls[self._open.pop()]
        call.end = len(self.names)
        first, *rest = out if type(out) is tuple and out else (out,)
        if isinstance(first, torch.Tensor):
            with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
                call.given, call.given_shape = self.value_of(first), first.shape
                call.others = tuple(self.value_of(item) for item in rest if isinstance(item, torch.Tensor))
            if all(item is None or isinstance(item, torch.Tensor) for item in rest):
                call.items = len(out) if type(out) is tuple else None

    def finish(self, out: Any) -> None:
        """The model has returned."""
        self.given.update(self.value_of(t) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        self.given.discard(CONSTANT)
