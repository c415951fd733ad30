"""The reference for a cut: the original in which removed channels have zero weights and removed branches give zero."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur._arrays import IntArray
from secateur._runtime import add_run_context_
from secateur.graph._ledger import base_name, tensors_in
from secateur.graph.blocks import DataFlow
from secateur.graph.graph import Block


class ZeroBranchesMode(TorchDispatchMode):
    """While active, one run of a full model adds zeros in the place of some residual branches.

    It knows nothing of modules, only in which sums of the forward pass the branches end.

    Args:
        blocks: Whose branches.
        inputs: Of the run, which the sums that count depend on.
    """

    def __init__(self, blocks: Iterable[Block], inputs: Any):
        super().__init__()
        self._operands = {block.addition: block.operand for block in blocks}
        self._flow = DataFlow()
        self._flow.feed(inputs)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = base_name(func)
        inputs = tensors_in(args, *kwargs.values())
        read = [self._flow.read(tensor) for tensor in inputs]
        operand = self._operands.get(self._flow.addition(name, inputs, read))  # type: ignore[arg-type]
        given = args
        if operand == 1:
            given = (args[0], torch.zeros_like(args[1]))
        elif operand == 0:
            # An addition in place must still write into its first operand.
            given = (args[0].zero_() if func._schema.is_mutable else torch.zeros_like(args[0]), args[1])
        out = func(*given, **kwargs)
        self._flow.step(func, name, not kwargs, inputs, tensors_in(out), read=read)
        return out


def zero_branches_(model: nn.Module, blocks: Iterable[Block]) -> nn.Module:
    """Make a full model add zeros in the place of some residual branches whenever it runs; returns it."""
    blocks = tuple(blocks)
    return add_run_context_(model, lambda inputs: ZeroBranchesMode(blocks, inputs))


class UnexpectedCallError(Exception):
    """A run makes another call than it has to."""


class ExpectedCalls:
    """The calls that a run has to make, one after the other.

    Args:
        names: Their ATen names.
    """

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._made = 0

    @property
    def all_made(self) -> bool:
        """Whether none is missing."""
        return self._made == len(self._names)

    def make(self, name: str) -> None:
        """The next call; raises `UnexpectedCallError` if it is not the one expected."""
        if self.all_made or self._names[self._made] != name:
            raise UnexpectedCallError(f"call {self._made} is {name}")
        self._made += 1


class ZeroWeightsMode(TorchDispatchMode):
    """While active, every call of a run gets some parameters with zeros in places.

    They are made for each call and dropped after it, so that no second set of weights is held, nor memory for one
    touched. A weight that is not finite stays so: it is multiplied by zero.

    Args:
        factors: By the identity of a parameter, what it is multiplied by.
        expected: The calls that the run has to make; None if it may make any.
    """

    def __init__(self, factors: Mapping[int, tuple[torch.Tensor, ...]], expected: ExpectedCalls | None):
        super().__init__()
        self._factors = factors
        self._expected = expected

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._expected is not None:
            self._expected.make(base_name(func))
        kwargs = kwargs or {}
        if self._spares((*args, *kwargs.values())):
            return func(*args, **kwargs)
        return func(*map(self._zeroed, args), **{key: self._zeroed(value) for key, value in kwargs.items()})

    def _spares(self, arguments: tuple[Any, ...]) -> bool:
        """Whether none of them is to be zeroed; lists are not looked into."""
        return self._factors.keys().isdisjoint(map(id, arguments)) and list not in map(type, arguments)

    def _zeroed(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return list(map(self._zeroed, argument))
        factors = self._factors.get(id(argument))
        if factors is None:
            return argument
        first, *others = factors
        product = argument * first
        for factor in others:
            product.mul_(factor)
        return product


def zero_weights_(
    model: nn.Module, kept: Mapping[str, Mapping[int, IntArray]], expected: ExpectedCalls | None = None
) -> nn.Module:
    """Make a model compute with zeros in the places of some of its weights whenever it runs; returns it.

    Args:
        model: Gets two hooks; its parameters stay as they are.
        kept: By the name of a parameter, the positions that stay of some of its dimensions. Other names are ignored.
        expected: The calls that it has to make when it runs, once; any other raises `UnexpectedCallError`.
    """
    make = _FactorCache()
    factors = {
        id(parameter): make.of(parameter.detach(), kept[name])
        for name, parameter in model.named_parameters()
        if kept.get(name)
    }
    return add_run_context_(model, lambda _: ZeroWeightsMode(factors, expected))


class _FactorCache:
    """Zeros and ones for parameters; those that keep the same positions of equally long dimensions share them."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], torch.Tensor] = {}
        self._held: list[IntArray] = []

    def of(self, tensor: torch.Tensor, kept: Mapping[int, IntArray]) -> tuple[torch.Tensor, ...]:
        """(*shape[1:]) and (shape[0], 1, ...): products along the memory instead of one per dimension."""
        first = [self._vector(tensor, 0, kept[0])] if 0 in kept else []
        others = [dim for dim in kept if dim]
        if not others:
            return tuple(first)
        key = (tensor.shape[1:], tensor.dtype, tensor.device, *((dim, id(kept[dim])) for dim in others))
        if key not in self._made:
            rest = tensor.new_ones(tensor.shape[1:])
            for dim in others:
                rest *= self._vector(tensor, dim, kept[dim])
            self._made[key] = rest
        return (self._made[key], *first)

    def _vector(self, tensor: torch.Tensor, dim: int, positions: IntArray) -> torch.Tensor:
        """Of the shape that multiplies along one dimension."""
        key = (tensor.size(dim), tensor.dtype, tensor.device, id(positions))
        if key not in self._made:
            self._held.append(positions)  # As long as it lives, nothing else has its identity.
            index = torch.from_numpy(positions).to(tensor.device)
            self._made[key] = tensor.new_zeros(tensor.size(dim)).index_fill_(0, index, 1)
        return self._made[key].view(-1, *[1] * (tensor.dim() - 1 - dim))
