"""The reference for a cut without a second set of weights: a full model that zeroes weights and branches as it runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from secateur._arrays import IntArray
from secateur._runtime import add_run_context_
from secateur.graph._ledger import base_name, tensors_in
from secateur.graph._shadow import SharedMemory, storage_key, written_tensors
from secateur.graph.blocks import DataFlow
from secateur.graph.channel_rules.recurrent import WholeCallMode
from secateur.graph.graph import Block


class ZeroBranchesMode(WholeCallMode):
    """A mode in which one run of a full model adds zeros instead of some residual branches.

    It identifies the branches by the number of the sum in the forward pass, independently of modules.

    Args:
        blocks: The blocks whose branches are zeroed.
        inputs: The inputs of the run, on which the counted sums depend.
    """

    def __init__(self, blocks: Iterable[Block], inputs: Any):
        super().__init__()
        # The numbers are those of the trace, which sees a recurrent layer as one call: hence a `WholeCallMode`.
        self._operands = {block.addition: block.operand for block in blocks}
        self._flow = DataFlow()
        self._flow.add_inputs(inputs)

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call, with zeros in place of a branch if it is the sum that adds one."""
        name = base_name(func)
        inputs = tensors_in(args, *kwargs.values())
        # Before the call, because an operation in place overwrites its operand.
        read = [self._flow.origin_of(tensor) for tensor in inputs]
        operand = self._operands.get(self._flow.addition_number(name, inputs, read))  # type: ignore[arg-type]
        given = args
        if operand == 1:
            given = (args[0], torch.zeros_like(args[1]))
        elif operand == 0:
            # An addition in place must still write into its first operand.
            given = (args[0].zero_() if func._schema.is_mutable else torch.zeros_like(args[0]), args[1])
        # The original arguments define the data flow, so that later sums have the same numbers.
        out = func(*given, **kwargs)
        self._flow.add_step(func, name, not kwargs, inputs, tensors_in(out), read=read)
        return out


def zero_branches_(model: nn.Module, blocks: Iterable[Block]) -> nn.Module:
    """Make a full model add zeros instead of some residual branches whenever it runs, and return it."""
    blocks = tuple(blocks)
    return add_run_context_(model, lambda inputs: ZeroBranchesMode(blocks, inputs))


class UnexpectedCallError(Exception):
    """A run makes another call than the expected one."""


class WrittenParameterError(Exception):
    """A run writes to a parameter whose product with zeros and ones takes its place."""


class ExpectedCalls:
    """The calls that a run must make, in order.

    Args:
        names: The ATen names of the calls.
    """

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._made = 0

    @property
    def complete(self) -> bool:
        """Whether all calls were made."""
        return self._made == len(self._names)

    def make(self, name: str) -> None:
        """Check the name of the next call; raise `UnexpectedCallError` if it is not the expected one."""
        if self.complete or self._names[self._made] != name:
            raise UnexpectedCallError(f"call {self._made} is {name}")
        self._made += 1


class ObservedCalls:
    """The names of the calls of a run, any of which it may make."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def make(self, name: str) -> None:
        """Remember the name of the next call."""
        self.names.append(name)


class ZeroWeightsMode(WholeCallMode):
    """A mode in which every call of a run gets some parameters multiplied by zeros and ones.

    The products of large models exist only during the call, so that there is no second set of weights in memory. A
    weight that is not finite stays so when it is multiplied by zero.

    Args:
        factors: The factors of a parameter, by its `id`.
        expected: The calls that the run must make; None if it may make any.
        memory: What the model shares with another one, which must stay as it is.
        products: Where to keep the products for the next runs; None if they exist only during a call.
    """

    def __init__(
        self,
        factors: Mapping[int, tuple[torch.Tensor, ...]],
        expected: ExpectedCalls | ObservedCalls | None,
        memory: SharedMemory | None = None,
        products: dict[int, torch.Tensor] | None = None,
    ):
        super().__init__()
        self._factors = factors
        self._products = products
        self._expected = expected
        self._memory = memory
        # Storages of products that a view refers to, by their number, which another one gets when they are freed.
        self._viewed: dict[int, StorageWeakRef] = {}

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a call with the products of its parameters."""
        if self._expected is not None:
            self._expected.make(base_name(func))
        self._refuse_writes(func, args, kwargs)
        if not self._has_factors((*args, *kwargs.values())):
            return func(*args, **kwargs)
        out = func(*map(self._zeroed, args), **{key: self._zeroed(value) for key, value in kwargs.items()})
        if func.is_view:
            self._viewed.update({storage_key(tensor): _weak_storage(tensor) for tensor in tensors_in(out)})
        return out

    def _refuse_writes(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuse to write to a product, because the parameter itself would stay as it was."""
        for tensor in written_tensors(func, args, kwargs):
            if id(tensor) in self._factors or self._is_viewed(tensor):
                raise WrittenParameterError(f"{base_name(func)} writes to a parameter that is cut")
        if self._memory is not None:
            self._memory.before_call(func, args, kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._memory is not None:
            self._memory.after_run()

    def _is_viewed(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of a product; what was freed is another tensor's memory by now."""
        viewed = self._viewed.get(storage_key(tensor))
        return viewed is not None and not viewed.expired()

    def _has_factors(self, arguments: Iterable[Any]) -> bool:
        """Whether an argument has factors, or something in a list, such as the tensors that are concatenated."""
        return any(
            self._has_factors(cast(list[Any], each)) if isinstance(each, list) else id(each) in self._factors
            for each in arguments
        )

    def _zeroed(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return list(map(self._zeroed, cast(list[Any], argument)))
        factors = self._factors.get(id(argument))
        if factors is None:
            return argument
        if self._products is not None and id(argument) in self._products:
            return self._products[id(argument)]
        first, *others = factors
        product = argument * first
        for factor in others:
            product.mul_(factor)
        if self._products is not None:
            self._products[id(argument)] = product
        return product


def _weak_storage(tensor: torch.Tensor) -> StorageWeakRef:
    # Recorders take the access to a storage for the reading of values.
    with torch._C.DisableTorchFunction():  # pyright: ignore[reportPrivateUsage]
        return StorageWeakRef(tensor.untyped_storage())


_MOST_KEPT_BYTES = 2**28


def zero_weights_(
    model: nn.Module,
    kept: Mapping[str, Mapping[int, IntArray]],
    expected: Callable[[], ExpectedCalls | ObservedCalls | None] = lambda: None,
    memory: SharedMemory | None = None,
) -> nn.Module:
    """Make a model compute with zeros in place of some weights whenever it runs, and return it.

    Args:
        model: Gets two hooks; its parameters are not changed.
        kept: The kept positions by dimension, by the name of a weight; see `kept_weights`. Other names are ignored.
        expected: Returns the calls that it must make when it runs next; any other raises `UnexpectedCallError`.
        memory: What the model shares with another one, which must stay as it is.

    A run that writes to one of the parameters raises `WrittenParameterError`.
    """
    make = _FactorCache()
    tensors = (*model.named_parameters(), *model.named_buffers())
    cut = {name: tensor for name, tensor in tensors if kept.get(name)}
    factors = {id(parameter): make.of(parameter.detach(), kept[name]) for name, parameter in cut.items()}
    # A second set of small weights does not matter, and saves making the products again in every run.
    few = sum(parameter.nbytes for parameter in cut.values()) <= _MOST_KEPT_BYTES
    products: dict[int, torch.Tensor] | None = {} if few else None
    return add_run_context_(model, lambda _: ZeroWeightsMode(factors, expected(), memory, products))


class _FactorCache:
    """A cache of factors for parameters, shared by those that keep the same positions of equally long dimensions."""

    def __init__(self) -> None:
        self._cache: dict[tuple[Any, ...], torch.Tensor] = {}
        self._held: list[IntArray] = []

    def of(self, tensor: torch.Tensor, kept: Mapping[int, IntArray]) -> tuple[torch.Tensor, ...]:
        """Return factors of shapes (*shape[1:]) and (shape[0], 1, ...): at most two products, not one per dimension."""
        first = [self._vector(tensor, 0, kept[0])] if 0 in kept else []
        others = [dim for dim in kept if dim]
        if not others:
            return tuple(first)
        key = (tensor.shape[1:], tensor.dtype, tensor.device, *((dim, id(kept[dim])) for dim in others))
        if key not in self._cache:
            rest = tensor.new_ones(tensor.shape[1:])
            for dim in others:
                rest *= self._vector(tensor, dim, kept[dim])
            self._cache[key] = rest
        return (self._cache[key], *first)

    def _vector(self, tensor: torch.Tensor, dim: int, positions: IntArray) -> torch.Tensor:
        """Return zeros and ones of the shape that multiplies along one dimension."""
        key = (tensor.size(dim), tensor.dtype, tensor.device, id(positions))
        if key not in self._cache:
            self._held.append(positions)  # While it exists, no other array can have its `id`.
            index = torch.from_numpy(positions).to(tensor.device)
            self._cache[key] = tensor.new_zeros(tensor.size(dim)).index_fill_(0, index, 1)
        return self._cache[key].view(-1, *[1] * (tensor.dim() - 1 - dim))
