"""What is learnt while a model runs: which channel ids must go together, which must stay, what sizes depend on them.

Every position of every dimension of every parameter and buffer gets an integer id. An activation carries, for each
dimension along which channels run, the vector of ids at its positions. The ledger only collects; `_solve` concludes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from secateur.graph._channels import Block, IntArray, Role
from secateur.graph._sizes import Expression

BoolArray = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
ChannelIds = dict[int, IntArray]
"""Dimension to the ids of its positions. A dimension that is not named carries no channels."""

_MARK = "_secateur_channel_ids"
_OWN = "_secateur_own"


@dataclass(frozen=True, eq=False)
class Stored:
    """A parameter or buffer and its ids. It is held, as a model may drop it: another tensor would get its identity."""

    tensor: torch.Tensor
    name: str
    is_parameter: bool
    shape: tuple[int, ...]
    ids: ChannelIds


@dataclass(frozen=True, eq=False)
class Binding:
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
class MixedCall:
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

    stored: dict[int, Stored] = field(default_factory=dict)
    ties: list[tuple[IntArray, IntArray]] = field(default_factory=list)
    freezes: list[tuple[IntArray, str]] = field(default_factory=list)
    bindings: list[Binding] = field(default_factory=list)
    operations: list[CountedOperation] = field(default_factory=list)
    mixings: list[MixedCall] = field(default_factory=list)
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
        self.stored[id(tensor)] = Stored(tensor, name, isinstance(tensor, torch.nn.Parameter), tuple(tensor.shape), ids)

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
        self.bindings.append(Binding(expression, ids, where))
