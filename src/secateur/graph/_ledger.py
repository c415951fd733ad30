"""What is learned while a model runs: which channel ids must go together, which must stay, what sizes depend on them.

Every position of every dimension of every parameter and buffer gets an integer id. An activation carries, for each
dimension along which channels run, the vector of ids at its positions. The ledger only collects; `_solve` concludes.

One recorded ATen call, and what its rules have in common."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch

from secateur._arrays import BoolArray, IntArray
from secateur.graph._size_ints import Expression
from secateur.graph.blocks import is_mutable
from secateur.graph.graph import Block, Role

ChannelIds = dict[int, IntArray]
"""Dimension to the ids of its positions. A dimension that is not named carries no channels."""

_MARK = "_secateur_channel_ids"
_OWN = "_secateur_own"


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A parameter or buffer and its ids. It is held, as a model may drop it: another tensor would get its identity."""

    tensor: torch.Tensor
    name: str
    is_parameter: bool
    shape: tuple[int, ...]
    ids: ChannelIds


@dataclass(frozen=True, eq=False)
class SizeBinding:
    """A python int that must stay equal to the number of kept ids (or to its old value, if ids is None)."""

    expression: Expression
    ids: IntArray | None
    where: str


@dataclass(frozen=True, eq=False)
class CountedOperation:
    """An operation to count: factor times the product of the (numbers of ids | constants)."""

    module: str
    kind: str
    factor: float
    dims: tuple[IntArray | int, ...]


@dataclass(frozen=True, eq=False)
class ModuleOutput:
    """Ids of the first output tensor of a module call."""

    module: str
    shape: tuple[int, ...]
    ids: ChannelIds
    calls: int


@dataclass(frozen=True, eq=False)
class RecordedMixingCall:
    """A call that computes over channels: (tensor, dimension, ids) of what it reads and writes."""

    number: int
    kind: str
    read: tuple[tuple[int, int, IntArray], ...]
    written: tuple[tuple[int, int, IntArray], ...]


@dataclass(eq=False)
class Ledger:
    """Append-only record of one traced forward pass.

    Attributes:
        attended: By module, ids that are multiplied with those of another activation, as in attention.
        contracted: Ids over which two activations are multiplied and summed: so they are read, if by no layer.
        scaled: Ids whose number sets a scale (``head_dim ** -0.5``): fewer of them would change it.
        scaling: Modules that take such a scale.
        by_head: Ids (of an earlier run) that stay or go by whole heads.
    """

    stored: dict[int, StoredTensor] = field(default_factory=dict)
    ties: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    freezes: list[tuple[IntArray, str]] = field(default_factory=list)
    bindings: list[SizeBinding] = field(default_factory=list)
    operations: list[CountedOperation] = field(default_factory=list)
    mixings: list[RecordedMixingCall] = field(default_factory=list)
    roles: list[tuple[IntArray, Role]] = field(default_factory=list)
    touched: list[tuple[str, IntArray]] = field(default_factory=list)
    outputs: dict[str, ModuleOutput] = field(default_factory=dict)
    attended: dict[str, list[IntArray]] = field(default_factory=dict[str, list[IntArray]])
    contracted: list[IntArray] = field(default_factory=list)
    scaled: list[IntArray] = field(default_factory=list)
    scaling: set[str] = field(default_factory=set[str])
    by_head: BoolArray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    blocks: tuple[Block, ...] = ()
    calls: tuple[str, ...] = ()
    seen: set[int] = field(default_factory=set[int])
    count: int = 0

    def unseen(self) -> tuple[str, ...]:
        """Parameters that took part in no operation so far."""
        return tuple(s.name for number, s in self.stored.items() if s.is_parameter and number not in self.seen)

    def new(self, number: int) -> IntArray:
        """Fresh ids."""
        first = self.count
        self.count += number
        return np.arange(first, first + number, dtype=np.int64)

    def store(self, name: str, tensor: torch.Tensor) -> None:
        """Give every dimension of a parameter or buffer its ids."""
        ids = {dim: self.new(size) for dim, size in enumerate(tensor.shape) if size > 1}
        self.stored[id(tensor)] = StoredTensor(
            tensor, name, isinstance(tensor, torch.nn.Parameter), tuple(tensor.shape), ids
        )

    def ids_of(self, tensor: torch.Tensor) -> ChannelIds:
        """The ids a tensor carries; empty if none."""
        marked: ChannelIds | None = getattr(tensor, _MARK, None)
        if marked is not None:
            return marked
        stored = self.stored.get(id(tensor))
        return stored.ids if stored else {}

    def mark(self, tensor: torch.Tensor, ids: ChannelIds, *, own: bool = False) -> None:
        """Remember the ids of an activation for as long as it lives, and whether it is computed from weights only."""
        if id(tensor) not in self.stored:
            setattr(tensor, _MARK, ids)
            setattr(tensor, _OWN, own)

    def is_own(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter or buffer of the model, or computed from nothing else."""
        return id(tensor) in self.stored or bool(getattr(tensor, _OWN, False))

    def tie(self, first: IntArray, second: IntArray) -> IntArray:
        """Positions that must be kept or removed together; returns a representative vector."""
        if first is not second:
            self.ties.append((first, second))
        return first

    def tie_rows(self, matrix: IntArray) -> IntArray:
        """Tie every row of a matrix to the first one."""
        if matrix.shape[0] > 1:
            self.ties.append((np.broadcast_to(matrix[:1], matrix[1:].shape).reshape(-1), matrix[1:].reshape(-1)))
        return matrix[0]

    def freeze(self, ids: IntArray, reason: str) -> None:
        """These channels must stay."""
        self.freezes.append((ids, reason))

    def freeze_all(self, tensors: Sequence[ChannelIds], reason: str) -> None:
        """Every channel of these tensors must stay."""
        for channel_ids in tensors:
            for ids in channel_ids.values():
                self.freeze(ids, reason)

    def note_attention(self, module: str, vectors: Iterable[IntArray]) -> None:
        """These ids are head dimensions (or channels) of two activations that are multiplied with each other."""
        self.attended.setdefault(module, []).extend(vectors)

    def is_by_head(self, ids: IntArray) -> bool:
        """Whether channels are to be divided by heads: known from an earlier run of the same model."""
        known = ids[ids < len(self.by_head)]
        return bool(self.by_head[known].any())

    def bind(self, expression: Expression, ids: IntArray | None, where: str) -> None:
        """A python int must follow the number of kept ids."""
        self.bindings.append(SizeBinding(expression, ids, where))


# fmt: off
ATTENTION_KINDS = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
# fmt: on
MIXING_KINDS = frozenset(
    {
        "native_layer_norm",
        "_fused_rms_norm",
        "native_group_norm",
        "_softmax",
        "_log_softmax",
        "_safe_softmax",
        "cumsum",
        "cumprod",
        "mean",
        "sum",
        "amax",
        "amin",
        "var",
        "var_mean",
        "std",
        "std_mean",
        "linalg_vector_norm",
        "norm",
        "prod",
        "logsumexp",
        "any",
        "all",
        "max",
        "min",
        "convolution",
        "native_batch_norm",
        "_native_batch_norm_legit",
        "cudnn_batch_norm",
        "_native_batch_norm_legit_functional",
        "batch_norm",
        *ATTENTION_KINDS,
    }
)  # fmt: skip
"""ATen names of the calls that are numbered, whether they meet channels or not."""


@cache
def base_name(operator: Any) -> str:
    """Name of an ATen overload without namespace and without the underscore of an in-place form."""
    name: str = operator._schema.name.split("::")[1]
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


@cache
def _arguments(operator: Any) -> Mapping[str, tuple[int, Any]]:
    """Position and default of every argument of an ATen overload, by name."""
    return {a.name: (number, a.default_value) for number, a in enumerate(operator._schema.arguments)}


def tensors_in(*values: Any) -> tuple[torch.Tensor, ...]:
    """The tensors among arguments or results of an ATen call, in order; they lie in lists and tuples at most."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
    return tuple(found)


@dataclass(frozen=True, eq=False)
class Call:
    """One recorded ATen call.

    Attributes:
        ledger: Where conclusions go.
        operator: The ATen overload.
        name: Its base name without a trailing in-place underscore.
        module: Qualified name of the module whose forward made the call.
        args: Positional arguments.
        kwargs: Keyword arguments.
        inputs: Tensors among the arguments, in order.
        outputs: Tensors returned.
        number: How many calls that compute over channels came before it (`_mixing.MIXING_KINDS`).
    """

    ledger: Ledger
    operator: Any
    name: str
    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    number: int = 0

    @property
    def where(self) -> str:
        """For a human."""
        return f"`{self.name}` in {self.module or 'the model itself'}"

    @property
    def full_name(self) -> str:
        """With its namespace: ``aten::relu``, ``my_lib::my_op``."""
        return str(self.operator._schema.name)

    def ids(self, tensor: torch.Tensor) -> ChannelIds:
        """Channel ids of an argument."""
        return self.ledger.ids_of(tensor)

    def argument(self, position: int, default: Any = None) -> Any:
        """A positional argument that may have been left out."""
        return self.args[position] if len(self.args) > position else default

    def named(self, name: str) -> Any:
        """An argument by its name in the operator's schema; the default if left out, None if there is no such."""
        position, default = _arguments(self.operator).get(name, (None, None))
        if position is None:
            return None
        given = self.args[position] if len(self.args) > position else self.kwargs.get(name)
        return default if given is None else given

    def dims(self, name: str = "dim") -> set[int] | None:
        """Dimensions of the first input that an argument names, counted from the front; None if it names none."""
        value = self.named(name)
        if value is None or value == []:
            return None
        rank = max(self.inputs[0].dim(), 1)
        return {int(d) % rank for d in ([value] if isinstance(value, int) else value)}

    def mix(self, results: Sequence[ChannelIds]) -> Sequence[ChannelIds]:
        """Note that the call computes over channels, which a cut model does over the kept ones only."""
        if is_mutable(self.operator) or self.name not in MIXING_KINDS:
            return freeze_inputs(self)
        read = tuple((t, dim, ids) for t, tensor in enumerate(self.inputs) for dim, ids in self.ids(tensor).items())
        written = tuple((t, dim, ids) for t, found in enumerate(results) for dim, ids in found.items())
        self.ledger.mixings.append(RecordedMixingCall(self.number, self.name, read, written))
        return results


Rule = Callable[[Call], Sequence[ChannelIds]]


def cuts_whole_groups(groups: int, each: int) -> bool:
    """Whether whole groups go, or else the same positions of every group: whichever leaves more to choose from.

    With G groups of c channels, whole groups leave G units, equal positions leave c.
    """
    return groups >= each


def freeze_inputs(call: Call) -> Sequence[ChannelIds]:
    """No rule: everything that comes in stays whole."""
    call.ledger.freeze_all([call.ids(t) for t in call.inputs], f"{call.where} has no channel rule")
    return [{} for _ in call.outputs]


def merge_operands(call: Call, operands: Sequence[tuple[IntArray | None, int]]) -> IntArray | None:
    """Ids of one dimension after an elementwise operation of several operands (ids or None, length)."""
    carried = [ids for ids, _ in operands if ids is not None]
    if not carried:
        return None
    for ids in carried[1:]:
        call.ledger.tie(carried[0], ids)
    if any(ids is None and length > 1 for ids, length in operands):
        call.ledger.freeze(carried[0], f"{call.where} meets a tensor that does not follow the channels")
    return carried[0]
